"""Views shown to the vision tower at a smaller size than it was trained for."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# (rows and columns of a view's tokens at its full size, number of the visual's views) -> rows and columns wanted.
Size = Callable[[tuple[int, int], int], tuple[int, int]]


def resized(pixels: Tensor, grid: tuple[int, int], native: tuple[int, int], patch_px: int) -> Tensor:
    """Views `(v, 3, side, side)` as the pixels of `grid` patches, `(v, 3, h, w)`; of the `native` grid as they are.

    What is resized are the processor's pixels and not the image: base views, tiles and frames alike then show what
    they show at full size (crop, padding, cut into tiles), and nothing but the resolution changes.
    """
    from torch.nn.functional import interpolate

    if grid == native:
        return pixels
    side = [patch_px * patches for patches in grid]
    return interpolate(pixels.float(), size=side, mode="bicubic", antialias=True)


def batches(views: Iterable[T], most: int, pixels: Callable[[T], Tensor]) -> Iterator[list[T]]:
    """Runs of views in their order, of one size each and `most` at a time."""
    for _, run in itertools.groupby(views, key=lambda view: pixels(view).shape):
        while batch := list(itertools.islice(run, most)):
            yield batch
