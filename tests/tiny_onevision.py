"""A tiny random LLaVA-OneVision checkpoint with tokenizer, image and video processor, and template."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch

SIDE_PX, PATCH_PX = 56, 14
WIDTH = 48
# Height and width in tiles; 3 x 3 tiles are more than `anyres_max_4` lets through without interpolation.
GRIDS = ((1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (3, 3))
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' }}"
    "{% for c in m.content %}{% if c.type == 'image' %}<image>{% endif %}{% endfor %}"
    "{% for c in m.content %}{% if c.type == 'video' %}<video>{% endif %}{% endfor %}"
    "{% for c in m.content %}{% if c.type == 'text' %}{{ '\n' + c.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")


def _tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<image>", "<video>"],
    )


def _processor(side_px: int):
    from transformers import LlavaOnevisionImageProcessorPil, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    # As the public checkpoint has them; the classes' own defaults are CLIP's.
    pixels = {
        "size": {"height": side_px, "width": side_px},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessorPil(image_grid_pinpoints=_pinpoints(side_px), **pixels),
        video_processor=LlavaOnevisionVideoProcessor(**pixels),
        tokenizer=_tokenizer(),
        num_image_tokens=(side_px // PATCH_PX) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
        chat_template=TEMPLATE,
    )


def _pinpoints(side_px: int) -> list[list[int]]:
    return [[height * side_px, width * side_px] for height, width in GRIDS]


def save_onevision(folder: Path, side_px: int = SIDE_PX, width: int = WIDTH) -> Path:
    """SigLIP of three layers read to the end, Qwen2 of four layers, four heads, and width 48 or another."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    torch.manual_seed(4)
    processor = _processor(side_px)
    tokenizer = processor.tokenizer
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=side_px,
            patch_size=PATCH_PX,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=0,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=_pinpoints(side_px),
        vision_aspect_ratio="anyres_max_4",
    )
    return tiny.save(folder, LlavaOnevisionForConditionalGeneration(config), processor)
