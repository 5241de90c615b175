"""LLaVA-OneVision on `LlavaOnevisionForConditionalGeneration`: one image in tiles, several images, video."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rcb_lmms.families.images import Visual, pad_to_square
from rcb_lmms.families.packed import Rows
from rcb_lmms.families.sizes import Size
from rcb_lmms.families.tiles import TiledFamily, flat
from rcb_lmms.families.towers import PATCHES
from rcb_lmms.pruners.base import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor

# Optional fields that a video frame's pooled tokens have too.
POOLED = ("encoder_features", "received_attention", "object_attention")


class LlavaOnevision(TiledFamily):
    """LLaVA-OneVision; packing is described in `tiles`, a video always ends with one newline.

    One image is a base view (stretched to a square) and its tiles row by row, each of several images a base view, a
    video a base view per frame, pooled to half the side behind the projector. Pruning acts on each view; in a video
    on the pooled tokens.

    Preprocessing presets, which agree on a single image: `rcb` stretches each of several images and each frame to a
    square by Pillow, as the paper's evaluation; `native` pads each of several images to a square of the mean colour
    and stretches frames by torchvision (up to one grey level apart), as the Hugging Face processors.
    """

    name = "llava_onevision"
    model_type = "llava_onevision"
    checkpoint = "llava-hf/llava-onevision-qwen2-7b-ov-hf"
    codebook = "llava-onevision-qwen2-7b"
    preprocessing = ("rcb", "native")
    geometry: ClassVar[dict[str, str]] = {"rcb": "stretched", "native": "padded_square"}
    paper_template = "qwen"
    paper_split = False
    provides = PATCHES
    several = "base"
    single_repeats = 27
    pad_token_id = 151643  # <|endoftext|>

    @property
    def most_views(self) -> int:
        """See `TiledFamily`: the number at the end of `anyres_max_9`."""
        return int(self.model.config.vision_aspect_ratio.rpartition("_")[2])

    @property
    def pooled_grid(self) -> tuple[int, int]:
        """Rows and columns of a frame's tokens."""
        return _halved(self.grid)

    def open_video(self, path: str | Path, start: float | None = None, end: float | None = None) -> list[Visual]:
        """One visual of all frames; see `Family.open_video`."""
        return [Visual(self.reader.read(path, start, end), "video")]

    def pixels(self, visual: Visual) -> Tensor:
        """See `Family.pixels`: the base view first."""
        import torch

        if visual.role == "video":
            frames = self._native_frame if self.preprocess == "native" else self.base_pixels
            # One by one, since frames in a folder may differ in size.
            return torch.cat([frames(frame) for frame in visual.frames])
        if visual.role == "base" and self.preprocess == "native":
            return self.base_pixels(pad_to_square(visual.image, self.processor.image_processor.image_mean))
        return super().pixels(visual)

    def _native_frame(self, frame: Any) -> Tensor:
        import numpy as np

        video = [np.array(frame).transpose(2, 0, 1)[None]]
        return self.processor.video_processor(video, return_tensors="pt")["pixel_values_videos"][0]

    def tower_grid(self, visual: Visual, size: Size, views: int) -> tuple[int, int]:
        """See `Family.tower_grid`: what is wanted of frames is wanted behind their pooling."""
        if visual.role != "video":
            return super().tower_grid(visual, size, views)
        rows, columns = size(self.pooled_grid, views)
        return min(2 * rows, self.grid[0]), min(2 * columns, self.grid[1])

    def views(self, visual: Visual, fields: list[dict[str, Tensor]], grid: tuple[int, int]) -> list[VisualTokens]:
        """See `Family.views`; pooling stands behind the projector, so that a frame's keys are no tokens' keys.

        Attention and tower features are pooled as the tokens are (ours), for methods that compare tokens by them.
        """
        import torch

        views = super().views(visual, fields, grid)
        if visual.role != "video":
            return views
        native = math.prod(self.pooled_grid)
        pooled = {
            name: _pooled(torch.stack([own[name].reshape(len(own[name]), -1) for own in fields]), grid)
            for name in ("features", *POOLED)
            if name in fields[0]
        }
        return [
            VisualTokens(
                grid=_halved(grid),
                key=view.key,
                native=native,
                **{name: rows[n] if fields[0][name].ndim == 2 else rows[n, :, 0] for name, rows in pooled.items()},
            )
            for n, view in enumerate(views)
        ]

    def pack(self, views: Sequence[Tensor], visual: Visual | None = None, *, whole: bool = False) -> Rows:
        """See `Family.pack`."""
        if visual is not None and visual.role == "video":
            return flat(views, self.newline)
        return super().pack(views, visual, whole=whole)


def _halved(grid: tuple[int, int]) -> tuple[int, int]:
    return -(-grid[0] // 2), -(-grid[1] // 2)


def _pooled(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Frames `(v, h * w, d)` at half the side; the model's own `apply_pooling` knows one size."""
    from torch.nn.functional import interpolate

    frames = tokens.unflatten(1, grid).permute(0, 3, 1, 2).contiguous()
    return interpolate(frames, size=_halved(grid), mode="bilinear").permute(0, 2, 3, 1).flatten(1, 2)
