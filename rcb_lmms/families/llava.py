"""LLaVA-1.5 on `LlavaForConditionalGeneration`: one square view per image, no newline tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from rcb_lmms.families.clip import ClipFamily
from rcb_lmms.families.images import Visual, central_square_region, pad_to_square
from rcb_lmms.families.sizes import Size, resized
from rcb_lmms.pruners.base import VisualTokens

if TYPE_CHECKING:
    from PIL.Image import Image


class Llava(ClipFamily):
    """LLaVA-1.5.

    Preprocessing presets: `rcb` resizes the short side and crops the centre, as the paper's evaluation did and the
    public processor does; `pad` pads to a square of the mean colour first, as LLaVA's own evaluation.
    """

    name = "llava"
    model_type = "llava"
    checkpoint = "llava-hf/llava-1.5-7b-hf"
    codebook = "llava-1.5-7b"
    preprocessing = ("rcb", "pad")
    geometry: ClassVar[dict[str, str]] = {"rcb": "centre_crop", "pad": "padded_square"}
    paper_template = "vicuna"

    def _encode(self, visuals: list[Visual], needs: set[str], size: Size | None) -> list[list[VisualTokens]]:
        import torch

        grid = self.grid if size is None else size(self.grid, 1)
        pixels = self.processor.image_processor(
            [self._prepare(visual.image) for visual in visuals], return_tensors="pt"
        )
        with torch.inference_mode():
            output = self.model.get_image_features(
                resized(pixels["pixel_values"], grid, self.grid, self.patch_px).to(self.device, self.dtype),
                output_hidden_states=True,
                return_dict=True,
                interpolate_pos_encoding=size is not None,
            )
            hidden = output.hidden_states[self.model.config.vision_feature_layer]
            fields = self.tower_fields(hidden, needs)
        return [
            [
                VisualTokens(
                    features,
                    grid,
                    key=visual.key,
                    native=math.prod(self.grid),
                    **{name: rows[i] for name, rows in fields.items()},
                )
            ]
            for i, (visual, features) in enumerate(zip(visuals, output.pooler_output, strict=True))
        ]

    def _prepare(self, image: Image) -> Image:
        if self.preprocess == "pad":
            mean = self.processor.image_processor.image_mean
            return pad_to_square(image, tuple(int(255 * channel) for channel in mean))
        return central_square_region(image)
