"""A tiny random LLaVA checkpoint with tokenizer, processor and template, and a POPE tree to ask it about."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

SIDE_PX, PATCH_PX = 56, 14
WIDTH = 48
TEMPLATE = (
    "{% for m in messages %}{{ m.role.upper() + ': ' }}"
    "{% for c in m.content %}{% if c.type == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE_PX,
    "patch_size": PATCH_PX,
    "projection_dim": 32,
    "initializer_range": 0.3,
}
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}


def free_port() -> str:
    """A port for processes that meet; another run of the suite on the machine gets another one."""
    import socket

    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return str(opened.getsockname()[1])


def build_tokenizer():
    """Bytes and five special tokens: `<unk>`, `<s>`, `</s>`, `<pad>` and, as id 4, `<image>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "<pad>", "<image>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )


def save(folder: Path, model, processor) -> Path:
    # Every second token ends an answer, so that random answers are short.
    model.generation_config.eos_token_id = [2, *range(5, len(processor.tokenizer), 2)]
    model.generation_config.pad_token_id = model.config.get_text_config().pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_llava(folder: Path, **text) -> Path:
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    side = {"height": SIDE_PX, "width": SIDE_PX}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE_PX}, crop_size=side),
        tokenizer=tokenizer,
        patch_size=PATCH_PX,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(vocab_size=len(tokenizer), **{**TEXT, **text}),
        image_token_id=4,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return save(folder, LlavaForConditionalGeneration(config), processor)


def random_image(seed: int, width: int = 80, height: int = 60):
    from PIL import Image

    blocks = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


def save_pope(folder: Path, images: int = 6, questions: int = 4, change: Callable[[list], list] = list) -> Path:
    """A POPE tree, its rows changed, in which upstream's `pope` runs when it is the current directory."""
    from datasets import Dataset, Features, Image, Value

    rows = [
        {
            "id": str(number := image * questions + question),
            "question_id": str(number),
            "question": f"Is there a thing {question} in the image?" + "?" * image,
            "answer": ("yes", "no")[question % 2],
            "image_source": f"image{image}",
            "category": ("random", "popular", "adversarial")[question % 3],
            "image": random_image(image),
        }
        for image in range(images)
        for question in range(questions)
    ]
    columns = Features({name: Value("string") for name in rows[0] if name != "image"} | {"image": Image()})
    data = Dataset.from_list(change(rows), features=columns)
    save_data(folder / "lmms-lab-encoder" / "POPE", {"default": ("test", data)})
    return folder


def cut_off(rows: list[dict]) -> list[dict]:
    """POPE's rows with the third image's file cut off."""
    from datasets import Image

    for row in rows[8:12]:
        row["image"] = Image().encode_example(row["image"])
        row["image"]["bytes"] = row["image"]["bytes"][:60]
    return rows


def save_data(folder: Path, configurations: dict[str, tuple[str, Any]]) -> None:
    """Data sets in a folder, each one split of a configuration, with the card by which `datasets` finds them."""
    card = ["---", "configs:"]
    for name, (split, rows) in configurations.items():
        buffer = io.BytesIO()
        rows.to_parquet(buffer)
        # The name counts: datasets caches by relative path and file name, and would serve another tree's rows.
        path = folder / name / f"{split}-{hashlib.sha256(buffer.getvalue()).hexdigest()[:12]}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
        card += [f"- config_name: {name}", "  data_files:", f"  - split: {split}", f"    path: {name}/{path.name}"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))


def save_codebook(path: Path, width: int = WIDTH, rows: int = 12) -> Path:
    from rcb_lmms import Codebook

    prototypes = torch.randn(rows, width, generator=torch.Generator().manual_seed(5))
    return Codebook(prototypes, {"id": "tiny", "model": "a tiny random model"}).save(path)


def save_clip(folder: Path) -> Path:
    """A whole CLIP model of texts up to 20 bytes; the end of a text is its largest id, as CLIP's is."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<start>", "<end>"]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ends = [("<start>", 256), ("<end>", 257)]
    tokenizer.post_processor = TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 0}
    text = {**sizes, **ids, "vocab_size": 258, "max_position_embeddings": 20}
    torch.manual_seed(3)
    CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<start>", eos_token="<end>").save_pretrained(folder)
    return folder
