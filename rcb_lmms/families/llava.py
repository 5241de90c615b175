"""LLaVA-1.5 on `LlavaForConditionalGeneration`: one square view per image, no newline tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from rcb_lmms.families.base import Family
from rcb_lmms.families.images import Visual, central_square_region, pad_to_square
from rcb_lmms.families.towers import WITH_CLS

if TYPE_CHECKING:
    from torch import Tensor


class Llava(Family):
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
    provides = WITH_CLS

    def pixels(self, visual: Visual) -> Tensor:
        """See `Family.pixels`: one view."""
        processor, image = self.processor.image_processor, visual.image
        if self.preprocess == "pad":
            image = pad_to_square(image, processor.image_mean)
        return processor([central_square_region(image)], return_tensors="pt")["pixel_values"]
