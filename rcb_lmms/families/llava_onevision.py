"""LLaVA-OneVision on `LlavaOnevisionForConditionalGeneration`: one image in tiles, several images, video.

Newlines, which are never pruned and never counted as visual tokens, by the option `pack`:

| pack          | one image: base view and tiles                      | base view alone       | video               |
|---------------|-----------------------------------------------------|-----------------------|---------------------|
| flat          | no newline                                          | no newline            | one at the very end |
| flat_newline  | one newline behind the last tile                    | one newline behind it | one at the very end |
| spatial_unpad | padding cut off, many tiles shrunk, newline per row | one newline behind it | one at the very end |
| auto          | as flat                                             | one newline behind it | one at the very end |

`spatial_unpad` is the Hugging Face model's own packing and needs whole views.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rcb_lmms.families.base import Family, choose
from rcb_lmms.families.images import Visual, pad_to_square
from rcb_lmms.families.packed import Rows
from rcb_lmms.families.sizes import Size, batches, resized
from rcb_lmms.families.tiles import PACKINGS, by_policy, flat
from rcb_lmms.pruners.base import VisualTokens

if TYPE_CHECKING:
    from torch import Tensor


class LlavaOnevision(Family):
    """LLaVA-OneVision.

    One image is a base view (stretched to a square) and its tiles row by row, each of several images a base view, a
    video a base view per frame, pooled to half the side behind the projector. Pruning acts on each view; in a video
    on the pooled tokens.

    Preprocessing presets, which agree on a single image: `rcb` stretches each of several images and each frame to a
    square by Pillow, as the paper's evaluation; `native` pads each of several images to a square of the mean colour
    and stretches frames by torchvision (up to one grey level apart), as the Hugging Face processors.

    Args:
        model: the Hugging Face model.
        processor: its processor.
        split: cut a single image into tiles; `False` sees it in its base view alone.
        pack: how views become one sequence, see the module.
        options: see `Family`.
    """

    name = "llava_onevision"
    model_type = "llava_onevision"
    checkpoint = "llava-hf/llava-onevision-qwen2-7b-ov-hf"
    codebook = "llava-onevision-qwen2-7b"
    preprocessing = ("rcb", "native")
    geometry: ClassVar[dict[str, str]] = {"rcb": "stretched", "native": "padded_square"}
    paper_template = "qwen"
    options = ("split", "pack")
    several = "base"
    single_repeats = 27
    pad_token_id = 151643  # <|endoftext|>

    def __init__(self, model: Any, processor: Any, *, split: bool = True, pack: str = "auto", **options: Any):
        super().__init__(model, processor, **options)
        self.split, self.packing = split, choose("pack", pack, PACKINGS)
        if self.pad_token_id >= model.get_input_embeddings().num_embeddings:
            # Not Qwen's vocabulary; the laboratory's keeps its empty slot where the other families have theirs.
            self.pad_token_id = Family.pad_token_id
        vision = model.config.vision_config
        self.side_px = vision.image_size
        self.patch_px = vision.patch_size
        self.grid = (vision.image_size // self.patch_px,) * 2
        self.pooled_grid = (-(-self.grid[0] // 2),) * 2

    def open_video(self, path: str | Path, start: float | None = None, end: float | None = None) -> list[Visual]:
        """One visual of all frames; see `Family.open_video`."""
        return [Visual(self.reader.read(path, start, end), "video")]

    def _encode(self, visuals: list[Visual], needs: set[str], size: Size | None) -> list[list[VisualTokens]]:
        import torch

        encoded: list[list[Tensor]] = [[] for _ in visuals]
        grids: list[tuple[int, int]] = []

        def views() -> Iterator[tuple[int, Tensor]]:
            for number, visual in enumerate(visuals):
                pixels = self._pixels(visual)
                grids.append(self.grid if size is None else self._tower_grid(visual, size, len(pixels)))
                yield from ((number, view) for view in resized(pixels, grids[-1], self.grid, self.patch_px))

        with torch.inference_mode():
            for chunk in batches(views(), self.tower_batch, lambda numbered: numbered[1]):
                hidden = self._tower(torch.stack([view for _, view in chunk]), size is not None)
                for (number, _), rows in zip(chunk, hidden, strict=True):
                    encoded[number].append(rows)
            return [
                self._views(visual, torch.stack(own), grid, needs)
                for visual, own, grid in zip(visuals, encoded, grids, strict=True)
            ]

    def _tower_grid(self, visual: Visual, size: Size, views: int) -> tuple[int, int]:
        """Rows and columns of patches that give a visual's views the wanted size, of frames behind their pooling."""
        if visual.role != "video":
            return size(self.grid, views)
        rows, columns = size(self.pooled_grid, views)
        return min(2 * rows, self.grid[0]), min(2 * columns, self.grid[1])

    def _tower(self, pixels: Tensor, interpolate: bool) -> Tensor:
        """What the projector reads; the other layers' hidden states end with the call."""
        output = self.model.model.vision_tower(
            pixels.to(self.device, self.dtype), output_hidden_states=True, interpolate_pos_encoding=interpolate
        )
        return output.hidden_states[self.model.config.vision_feature_layer]

    def _views(self, visual: Visual, hidden: Tensor, grid: tuple[int, int], needs: set[str]) -> list[VisualTokens]:
        """Views of one visual from its tower features `(v, n, c)`.

        Pooling stands behind the projector, so that a frame's tokens have no encoder features.
        """
        tokens, native = self.project(hidden), self.grid
        encoder = hidden if "encoder_features" in needs and visual.role != "video" else [None] * len(hidden)
        if visual.role == "video":
            tokens, grid, native = *_pooled(tokens, grid), self.pooled_grid
        keys = [visual.key] if len(tokens) == 1 else [f"{visual.key}-{number}" for number in range(len(tokens))]
        return [
            VisualTokens(features, grid, encoder_features=rows, key=key, native=math.prod(native))
            for features, rows, key in zip(tokens, encoder, keys, strict=True)
        ]

    def _pixels(self, visual: Visual) -> Tensor:
        """Pixels of a visual's views, base view first, `(v, 3, side, side)`."""
        import torch

        if visual.role == "video":
            if self.preprocess == "native":
                return self._native_frames(visual)
            return torch.cat([self._pixels(Visual((frame,), "base")) for frame in visual.frames])
        processor, image = self.processor.image_processor, visual.image
        if self.split and visual.role == "image":
            return processor(image, return_tensors="pt")["pixel_values"][0]
        if self.preprocess == "native" and visual.role == "base":
            image = pad_to_square(image, tuple(int(255 * channel) for channel in processor.image_mean))
        # The base view does not depend on the tiles: ask for one, the least there can be, and drop it.
        only = processor(image, image_grid_pinpoints=[[self.side_px, self.side_px]], return_tensors="pt")
        return only["pixel_values"][0, :1]

    def _native_frames(self, visual: Visual) -> Tensor:
        import numpy as np
        import torch

        # One by one, since frames in a folder may differ in size.
        videos = [[np.array(frame).transpose(2, 0, 1)[None]] for frame in visual.frames]
        process = self.processor.video_processor
        return torch.cat([process(video, return_tensors="pt")["pixel_values_videos"][0] for video in videos])

    def project(self, encoder_features: Tensor) -> Tensor:
        """See `Family.project`."""
        import torch

        with torch.inference_mode():
            return self.model.model.multi_modal_projector(encoder_features)

    def pack(self, views: Sequence[Tensor], visual: Visual | None = None, *, whole: bool = False) -> Rows:
        """See `Family.pack`; newlines are described in the module."""
        model = self.model.model
        newline = model.image_newline.detach()
        if visual is not None and visual.role == "video":
            return flat(views, newline)

        def unpad(stacked: Tensor, newline: Tensor) -> Tensor:
            size, ratio = visual.image.size[::-1], self.model.config.vision_aspect_ratio
            return model.pack_image_features([stacked], [size], newline, vision_aspect_ratio=ratio)[0][0]

        return by_policy(self.packing, views, newline, unpad, whole=whole)


def _pooled(tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Frames `(v, h * w, d)` at half the side, and their grid; the model's own `apply_pooling` knows one size."""
    from torch.nn.functional import interpolate

    rows, columns = (-(-side // 2) for side in grid)
    frames = tokens.unflatten(1, grid).permute(0, 3, 1, 2).contiguous()
    pooled = interpolate(frames, size=(rows, columns), mode="bilinear")
    return pooled.permute(0, 2, 3, 1).flatten(1, 2), (rows, columns)
