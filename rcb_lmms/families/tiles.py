"""Families that cut an image into tiles, and how they pack what is kept.

Newlines, which are never pruned and never counted as visual tokens, by the option `pack`:

| pack          | base view and tiles                                      | base view alone       |
|---------------|----------------------------------------------------------|-----------------------|
| flat          | no newline: five whole views are the paper's 2880 tokens | no newline            |
| flat_newline  | one newline behind the last tile                         | one newline behind it |
| spatial_unpad | padding cut off, one newline behind every row of tiles   | one newline behind it |
| auto          | as flat                                                  | one newline behind it |

`spatial_unpad` is the model's own packing and needs whole views. Base views alone (paper: "w/o split") end with the
newline that the original code gives them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rcb_lmms.errors import UserError, choose
from rcb_lmms.families.base import Family
from rcb_lmms.families.images import Visual
from rcb_lmms.families.packed import Rows
from rcb_lmms.families.places import Place, tile_regions

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

PACKINGS = ("auto", "flat", "flat_newline", "spatial_unpad")


class TiledFamily(Family):
    """A family with a base view and tiles.

    Args:
        model: the Hugging Face model.
        processor: its processor.
        split: cut a single image into tiles; `False` sees it in its base view alone.
        pack: how views become one sequence, see the module.
        grid: `auto` takes the best of the checkpoint's resolutions for each image; one of them, as `672` or `336x672`
            (height and width in pixels), is taken for all. VisPruner and CDPruner always see five views: `grid=672`.
        options: see `Family`.

    Raises:
        UserError: a packing or a resolution that there is not.
    """

    options = ("split", "pack", "grid")
    # The views' number of tokens from which tiles are shrunk, as a multiple of one view's; `None` is never.
    most_views: int | None = None

    def __init__(
        self, model: Any, processor: Any, *, split: bool = True, pack: str = "auto", grid: str = "auto", **options: Any
    ):
        super().__init__(model, processor, **options)
        self.split, self.packing = split, choose("pack", pack, PACKINGS)
        known = {f"{height}x{width}": [height, width] for height, width in model.config.image_grid_pinpoints}
        named = grid if grid == "auto" or "x" in grid else f"{grid}x{grid}"
        self.pinpoints = list(known.values()) if grid == "auto" else [known[choose("grid", named, tuple(known))]]

    def pixels(self, visual: Visual) -> Tensor:
        """See `Family.pixels`: the base view first."""
        if self.split and visual.role == "image":
            tiled = self.processor.image_processor(
                visual.image, image_grid_pinpoints=self.pinpoints, return_tensors="pt"
            )
            return tiled["pixel_values"][0]
        return self.base_pixels(visual.image)

    def places(self, visual: Visual) -> list[Place]:
        """See `Family.places`: presets differ in one of several images alone."""
        if visual.role == "base":
            return super().places(visual)
        places = [Place(number, (0, 0, *frame.size)) for number, frame in enumerate(visual.frames)]
        if self.split and visual.role == "image":
            places += [Place(0, tile) for tile in tile_regions(visual.image.size, self.pinpoints, self.side_px)]
        return places

    def base_pixels(self, image: Image) -> Tensor:
        """Pixels `(1, 3, side, side)` of the base view alone.

        It does not depend on the tiles: the processor is asked for one, the least there can be, which is dropped.
        """
        one = [[self.side_px, self.side_px]]
        views = self.processor.image_processor(image, image_grid_pinpoints=one, return_tensors="pt")
        return views["pixel_values"][0, :1]

    def pack(self, views: Sequence[Tensor], visual: Visual | None = None, *, whole: bool = False) -> Rows:
        """See `Family.pack`; a single view ends with a newline unless the packing is `flat`.

        Raises:
            UserError: `spatial_unpad` of pruned tiles.
        """
        newline = self.newline
        if len(views) == 1:
            return flat(views, None if self.packing == "flat" else newline)
        if self.packing != "spatial_unpad":
            return flat(views, newline if self.packing == "flat_newline" else None)
        if not whole:
            raise UserError(
                wanted="pack=spatial_unpad for pruned tiles",
                found="tiles of which some tokens are gone; rows are unpadded and ended by newlines on the whole grid",
                allowed="pack=flat or pack=flat_newline; spatial_unpad without pruning before the language model",
                next_step="pack=flat",
            )
        return self._unpadded(views, visual.image, newline)

    @property
    def newline(self) -> Tensor:
        """`(d,)` embedding that ends a row, or a view."""
        from accelerate.utils import align_module_device

        with align_module_device(self.model.model):
            return self.model.model.image_newline.detach()

    def _unpadded(self, views: Sequence[Tensor], image: Image, newline: Tensor) -> Rows:
        """The whole base view, then the tiles as one plane: its padding cut off, a newline behind every row."""
        import torch
        from transformers.image_processing_utils import select_best_resolution

        best = select_best_resolution((image.height, image.width), self.pinpoints)
        rows, columns = (side // self.side_px for side in best)
        plane = torch.stack(list(views[1:])).view(rows, columns, *self.grid, -1).permute(4, 0, 2, 1, 3)
        plane = plane.flatten(3, 4).flatten(1, 2)  # (d, rows of tokens, columns of tokens)
        _, height, width = plane.shape
        top, left = padding(image.size, (width, height), exact=self.original)
        plane = self._shrunk(plane[:, top : height - top, left : width - left])
        _, height, width = plane.shape
        tiles = torch.cat([plane, newline.to(plane)[:, None, None].expand(-1, height, 1)], dim=2).flatten(1).T
        newlines = tuple(len(views[0]) + (width + 1) * row + width for row in range(height))
        return Rows(torch.cat([views[0], tiles.to(views[0])]), newlines)

    def _shrunk(self, plane: Tensor) -> Tensor:
        """Tiles `(d, h, w)` brought down to about the tokens of `most_views` views, where they have many more."""
        from torch.nn.functional import interpolate

        if self.most_views is None:
            return plane
        height, width = plane.shape[1:]
        ratio = math.sqrt(height * width / (self.most_views * self.grid[0] ** 2))
        if ratio <= 1.1:
            return plane
        return interpolate(plane[None], [int(height // ratio), int(width // ratio)], mode="bilinear")[0]


def padding(image: tuple[int, int], plane: tuple[int, int], *, exact: bool) -> tuple[int, int]:
    """Rows cut off at the top and at the bottom, and columns at the left and at the right, of a plane of tokens.

    Args:
        image: width and height of the image in pixels.
        plane: width and height of the plane in tokens, in whose middle the image lies.
        exact: truncate as the original code does; else as Hugging Face's, which rounds to seven digits before. Where a
            product should be whole and comes out just below (704 x 396 on two tiles by two), they differ by two rows.
    """
    (width, height), (columns, rows) = image, plane

    def whole(value: float) -> int:
        return int(value if exact else round(value, 7))

    if width / height > columns / rows:
        return (rows - whole(height * (columns / width))) // 2, 0
    return 0, (columns - whole(width * (rows / height))) // 2


def flat(views: Sequence[Tensor], newline: Tensor | None = None) -> Rows:
    """Views `(k, d)` one behind the other, and one `newline (d,)` at the end if given."""
    import torch

    if newline is None:
        return Rows(torch.cat(list(views)))
    rows = torch.cat([*views, newline[None].to(views[0])])
    return Rows(rows, (len(rows) - 1,))
