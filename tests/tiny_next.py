"""A tiny random LLaVA-NeXT checkpoint: 4 x 4 patches per view, one to three tiles in a row or column, or 2 x 2."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch

SIDE_PX, PATCH_PX, WIDTH = tiny.SIDE_PX, tiny.PATCH_PX, tiny.WIDTH
# (height, width), in the order of the public checkpoint.
PINPOINTS = [[SIDE_PX * rows, SIDE_PX * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]


def save_next(folder: Path) -> Path:
    """Tokenizer, template and towers are those of the tiny LLaVA checkpoint; the weights are others."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessorPil,
        LlavaNextProcessor,
    )

    torch.manual_seed(7)
    tokenizer = tiny.build_tokenizer()
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": SIDE_PX},
            crop_size={"height": SIDE_PX, "width": SIDE_PX},
            image_grid_pinpoints=PINPOINTS,
        ),
        tokenizer=tokenizer,
        patch_size=PATCH_PX,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tiny.TEMPLATE,
    )
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**tiny.VISION),
        text_config=LlamaConfig(vocab_size=len(tokenizer), **tiny.TEXT),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return tiny.save(folder, LlavaNextForConditionalGeneration(config), processor)
