"""The laboratory's models before training: real LLaVA classes of a few million parameters, tokenizer and processor."""

from __future__ import annotations

from pathlib import Path

from rcb_lmms.lab.checkpoint import lab_checkpoint
from rcb_lmms.lab.scenes import GRID, IMAGE_SIZE_PX, PATCH_PX
from training.vision import MEAN, STD, vision_config

TEXT_WIDTH = 160
UNKNOWN, BEGIN, END, PAD, IMAGE = SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
VIDEO = "<video>"
# In the manner of llava-1.5: "USER: <image>\nQUESTION ASSISTANT: ANSWER</s>"; images stand where the content has them.
CHAT_TEMPLATE = """\
{% for message in messages -%}
{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif -%}
{% for part in message['content'] -%}
{% if part['type'] in ('image', 'video') %}{{ '<' + part['type'] + '>\n' }}\
{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif -%}
{% endfor -%}
{{ '</s>' if message['role'] == 'assistant' else ' ' }}
{%- endfor -%}
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""


def make_tokenizer(family: str = "llava"):
    """Byte-level BPE over the laboratory's own texts: its words are single tokens, any other text is representable.

    Token 0 is unknown and never used: its embedding stays zero, which the codebook builder takes for an empty slot.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from training.vocabulary import vocabulary_texts

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(vocabulary_texts(), trainer)
    if family == "llava_onevision":
        tokenizer.add_special_tokens([VIDEO])
    begin = [(BEGIN, tokenizer.token_to_id(BEGIN))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=begin)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE} | ({"video_token": VIDEO} if family == "llava_onevision" else {}),
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


# (height, width) of the grids of tiles, those of LLaVA-NeXT; OneVision's model also takes one tile.
PINPOINTS = [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]


def _pinpoints(family: str) -> list[list[int]]:
    grids = [[1, 1], *PINPOINTS] if family == "llava_onevision" else PINPOINTS
    return [[rows * IMAGE_SIZE_PX, columns * IMAGE_SIZE_PX] for rows, columns in grids]


def make_processor(family: str = "llava"):
    """Image processor, tokenizer and chat template of a family's laboratory model."""
    import transformers

    side = {"height": IMAGE_SIZE_PX, "width": IMAGE_SIZE_PX}
    pixels = {"image_mean": list(MEAN), "image_std": list(STD)}
    common = {"tokenizer": make_tokenizer(family), "chat_template": CHAT_TEMPLATE}
    if family == "llava_onevision":
        return transformers.LlavaOnevisionProcessor(
            image_processor=transformers.LlavaOnevisionImageProcessor(
                size=side, image_grid_pinpoints=_pinpoints(family), **pixels
            ),
            video_processor=transformers.LlavaOnevisionVideoProcessor(size=side, **pixels),
            num_image_tokens=GRID * GRID,
            vision_feature_select_strategy="full",
            **common,
        )
    pixels |= {"size": {"shortest_edge": IMAGE_SIZE_PX}, "crop_size": side}
    common |= {"patch_size": PATCH_PX, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    if family == "llava_next":
        image_processor = transformers.LlavaNextImageProcessor(image_grid_pinpoints=_pinpoints(family), **pixels)
        return transformers.LlavaNextProcessor(image_processor=image_processor, **common)
    return transformers.LlavaProcessor(image_processor=transformers.CLIPImageProcessor(**pixels), **common)


def make_model(tokenizer, family: str = "llava"):
    """An untrained model of the family, whose embedding of token 0 is zero; all but LLaVA start from LLaVA's words."""
    import torch
    import transformers
    from transformers import GenerationConfig

    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 448,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "initializer_range": 0.05,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": True,
    }
    common = {
        "vision_config": vision_config(family),
        "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE),
        "tie_word_embeddings": True,
    }
    if family == "llava_onevision":
        config = transformers.LlavaOnevisionConfig(
            text_config=transformers.Qwen2Config(**sizes, **ends),
            video_token_id=tokenizer.convert_tokens_to_ids(VIDEO),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_9",
            image_grid_pinpoints=_pinpoints(family),
            **common,
        )
        model = transformers.LlavaOnevisionForConditionalGeneration(config)
    else:
        common |= {
            "text_config": transformers.LlamaConfig(**sizes, **ends),
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "image_seq_length": GRID * GRID,
        }
        if family == "llava_next":
            config = transformers.LlavaNextConfig(image_grid_pinpoints=_pinpoints(family), **common)
            model = transformers.LlavaNextForConditionalGeneration(config)
        else:
            model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**common))
    model.generation_config = GenerationConfig(do_sample=False, **ends)
    if family != "llava":
        return _continue_from_llava(model, family)
    with torch.no_grad():
        _start_by_matching(model)
        model.get_input_embeddings().weight[0] = 0
    return model


def _continue_from_llava(model, family: str):
    """Take over the language model of LLaVA-1.5's laboratory, and where the tower is of its kind the projector too."""
    import torch

    start = starting_model()
    text = start.model.language_model.state_dict()
    words = model.get_input_embeddings().weight.detach().clone()
    words[: len(text["embed_tokens.weight"])] = text["embed_tokens.weight"]
    # Qwen2 has biases that Llama lacks; they start at zero.
    model.model.language_model.load_state_dict(text | {"embed_tokens.weight": words}, strict=False)
    projector = model.model.multi_modal_projector
    with torch.no_grad():
        if family == "llava_next":
            projector.load_state_dict(start.model.multi_modal_projector.state_dict())
        else:
            projector.linear_2.weight *= _PROJECTOR_SCALE
        model.model.image_newline.normal_(std=0.05)
        model.get_input_embeddings().weight[0] = 0
    return model


def _start_by_matching(model) -> None:
    """Let half the heads begin by looking for what resembles their own token, and every block begin by adding little.

    A question's noun then finds the image tokens of that noun as soon as the projector speaks the language of the
    words; from a plain random start this alone takes most of a short training.
    """
    import torch

    model.get_input_embeddings().weight *= 2
    model.model.multi_modal_projector.linear_2.weight *= _PROJECTOR_SCALE
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        size, width = attention.head_dim, attention.q_proj.in_features
        # Only slowly turning pairs of the rotary embedding compare content across the length of a prompt.
        slow = torch.arange(size) % (size // 2) >= size * 2 // 10
        shared = torch.nn.init.orthogonal_(torch.empty(int(slow.sum()), width)) * _MATCH_SHARPNESS
        attention.k_proj.weight[:size][slow] = shared
        for head in range(attention.num_key_value_groups):
            attention.q_proj.weight[head * size : (head + 1) * size][slow] = shared
        attention.o_proj.weight *= 0.2
        layer.mlp.down_proj.weight *= 0.2


_MATCH_SHARPNESS = 1.2
_PROJECTOR_SCALE = 0.1


def save_checkpoint(model, processor, out: Path) -> Path:
    """Write a model as half-precision safetensors, with its processor; returns the folder."""
    import torch

    model.to(torch.float16).save_pretrained(out)
    (Path(out) / "model.safetensors").chmod(0o644)  # transformers leaves it readable by its owner alone
    processor.save_pretrained(out)
    return out


def starting_model():
    """The laboratory's LLaVA-1.5 in float32, from which the other families start."""
    import torch
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(lab_checkpoint("llava"), dtype=torch.float32)
