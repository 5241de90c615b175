"""LLaVA-NeXT on `LlavaNextForConditionalGeneration`: a stretched base view and up to four tiles per image.

Newlines, which are never pruned and never counted as visual tokens, by the option `pack`:

| pack          | base view and tiles                                      | base view alone       |
|---------------|----------------------------------------------------------|-----------------------|
| flat          | no newline: five whole views are the paper's 2880 tokens | no newline            |
| flat_newline  | one newline behind the last tile                         | one newline behind it |
| spatial_unpad | padding cut off, one newline behind every row of tiles   | one newline behind it |
| auto          | as flat                                                  | one newline behind it |

`spatial_unpad` is the Hugging Face model's own packing and needs whole views. It always has tiles: base views alone
(paper: "w/o split") end with the newline that the original code gives them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from rcb_lmms.families.base import choose
from rcb_lmms.families.clip import ClipFamily
from rcb_lmms.families.images import Visual
from rcb_lmms.families.packed import Rows
from rcb_lmms.families.sizes import Size, batches, resized
from rcb_lmms.families.tiles import PACKINGS, by_policy
from rcb_lmms.pruners.base import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


class LlavaNext(ClipFamily):
    """LLaVA-NeXT.

    Views of an image: the base view, which is the whole image stretched to a square, then its tiles row by row, the
    black padding included. Preprocessing presets: `rcb` and `native` are the same pixels, since the original code
    and the Hugging Face processor agree.

    Args:
        model: the Hugging Face model.
        processor: its processor.
        split: cut images into tiles; `False` sees every image in its base view alone.
        pack: how views become one sequence, see the module.
        options: see `Family`.
    """

    name = "llava_next"
    model_type = "llava_next"
    checkpoint = "llava-hf/llama3-llava-next-8b-hf"
    codebook = "llava-next-llama3-8b"
    preprocessing = ("rcb", "native")
    geometry: ClassVar[dict[str, str]] = dict.fromkeys(preprocessing, "stretched")
    paper_template = "llama_3"
    options = ("split", "pack")
    single_repeats = 24
    pad_token_id = 0  # "!" in Llama-3's vocabulary, and still the row that the released experiments used

    def __init__(self, model: Any, processor: Any, *, split: bool = True, pack: str = "auto", **options: Any):
        super().__init__(model, processor, **options)
        self.split, self.packing = split, choose("pack", pack, PACKINGS)

    def _encode(self, visuals: list[Visual], needs: set[str], size: Size | None) -> list[list[VisualTokens]]:
        import torch

        pixels = [self._pixels(visual) for visual in visuals]
        grids = [self.grid if size is None else size(self.grid, len(own)) for own in pixels]
        pixels = [resized(own, grid, self.grid, self.patch_px) for own, grid in zip(pixels, grids, strict=True)]
        chunks = batches((view for own in pixels for view in own), self.tower_batch, lambda view: view)
        tokens = iter([part for chunk in chunks for part in self._tokens(torch.stack(chunk), needs, size is not None)])
        return [
            [
                VisualTokens(
                    grid=grid,
                    key=visual.key if len(own) == 1 else f"{visual.key}-{number}",
                    native=math.prod(self.grid),
                    **next(tokens),
                )
                for number in range(len(own))
            ]
            for visual, own, grid in zip(visuals, pixels, grids, strict=True)
        ]

    def _pixels(self, visual: Visual) -> Tensor:
        """`(v, 3, side, side)`, the base view first."""
        processor = self.processor.image_processor
        if self.split and visual.role == "image":
            return processor(visual.image, return_tensors="pt")["pixel_values"][0]
        # The base view does not depend on the tiles: ask for one, the least there can be, and drop it.
        side = self.model.config.vision_config.image_size
        only = processor(visual.image, image_grid_pinpoints=[[side, side]], return_tensors="pt")
        return only["pixel_values"][0, :1]

    def _tokens(self, pixels: Tensor, needs: set[str], interpolate: bool) -> list[dict[str, Tensor]]:
        """Tensors of `VisualTokens` by name, for each of the views `(b, 3, h, w)`."""
        import torch

        with torch.inference_mode():
            output = self.model.model.vision_tower(
                pixels.to(self.device, self.dtype), output_hidden_states=True, interpolate_pos_encoding=interpolate
            )
            hidden = output.hidden_states[self.model.config.vision_feature_layer]
            fields = self.tower_fields(hidden, needs)
            fields["features"] = self.project(hidden[:, 1:] if self.has_cls else hidden)
        return [{name: rows[i] for name, rows in fields.items()} for i in range(len(pixels))]

    def pack(self, views: Sequence[Tensor], visual: Visual | None = None, *, whole: bool = False) -> Rows:
        """See `Family.pack`; newlines are described in the module."""
        model = self.model.model

        def unpad(stacked: Tensor, newline: Tensor) -> Tensor:
            size = (visual.image.height, visual.image.width)
            packed, _ = model.pack_image_features([stacked], [size], "default", image_newline=newline)
            return packed[0]

        return by_policy(self.packing, views, model.image_newline.detach(), unpad, whole=whole)
