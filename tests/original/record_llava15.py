"""Record what the original LLaVA-1.5 code makes of the tiny checkpoint: token ids, pixels and logits.

It needs an environment of its own, since the original code stands on old versions:

    python3.11 -m venv original
    original/bin/pip install transformers==4.37.2 "tokenizers<0.16" "numpy<2" torch torchvision pillow einops timm \
        sentencepiece protobuf requests accelerate safetensors
    original/bin/pip install --no-deps llava-torch==1.2.2.post1
    original/bin/python tests/original/record_llava15.py

It writes llava15.safetensors beside itself, which test_original.py compares with.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import make
import torch
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoTokenizer

QUESTION = "What is left of the red circle?"
STEP = 8


def main() -> None:
    """Run the original code on the checkpoint with its tower beside it and with a tuned one inside."""
    recorded = {}
    for tower in ("beside", "inside"):
        with tempfile.TemporaryDirectory() as folder:
            recorded |= {f"{tower}.{name}": value for name, value in record(Path(folder), tower).items()}
    metadata = {"question": QUESTION, "step": str(STEP)}
    save_file(recorded, make.HERE / "llava15.safetensors", metadata=metadata)
    print({name: tuple(value.shape) for name, value in recorded.items()})


def record(folder: Path, tower: str) -> dict[str, torch.Tensor]:
    """Ids, pixels and every eighth row of logits, all of the original code, in float32."""
    path = make.save(folder / "llava", "llava", tower=tower, form="bin", name=str(folder / "tiny-clip"))
    config = json.loads((path / "config.json").read_text())
    # Its own loader makes room for a tuned tower's weights only if told so.
    config["unfreeze_mm_vision_tower"] = tower == "inside"
    (path / "config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(path, use_fast=False)
    model, info = LlavaLlamaForCausalLM.from_pretrained(path, output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"], info
    encoder = model.get_vision_tower()
    if not encoder.is_loaded:
        encoder.load_model()
    image = Image.fromarray(make.pixels("llava"))
    config = type("Config", (), {"image_aspect_ratio": None})
    pixels = process_images([image], encoder.image_processor, config)
    conversation = conv_templates["llava_v1"].copy()
    conversation.append_message(conversation.roles[0], f"<image>\n{QUESTION}")
    conversation.append_message(conversation.roles[1], None)
    ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
    with torch.inference_mode():
        logits = model.eval()(ids[None], images=pixels, use_cache=False).logits[0]
    return {"ids": ids, "pixels": pixels, "logits": logits.flip(0)[::STEP].contiguous()}


if __name__ == "__main__":
    main()
