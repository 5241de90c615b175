"""Pixels are the original's to the last bit: against Pillow's bicubic filter and the original's steps, written anew.

Pillow 13 resizes some portraits otherwise, up to 11 grey levels apart: this says so wherever it is installed.
"""

from __future__ import annotations

import numpy as np
import pytest
import tiny_next
import tiny_onevision
import torch
from PIL import Image

from rcb_lmms.families import load_family
from rcb_lmms.families.images import Visual

SIDE = 56
SIZES = [(97, 71), (71, 97), (40, 200), (333, 58), (56, 56), (30, 20), (57, 113)]


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def filter_weights(old: int, new: int) -> np.ndarray:
    """`(new, old)` weights of the bicubic filter with a = -0.5, in units of 2 ** -22, as Pillow rounds them."""
    weights = np.zeros((new, old), dtype=np.int64)
    stretch = max(old / new, 1.0)
    for place in range(new):
        centre = (place + 0.5) * old / new
        first, last = max(int(centre - 2 * stretch + 0.5), 0), min(int(centre + 2 * stretch + 0.5), old)
        x = np.abs((np.arange(first, last) - centre + 0.5) / stretch)
        near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
        values = np.where(x < 1, near, np.where(x < 2, far, 0.0))
        scaled = values / values.sum() * 2**22
        weights[place, first:last] = np.trunc(scaled + np.where(scaled < 0, -0.5, 0.5)).astype(np.int64)
    return weights


def bicubic(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Rows are filtered first, then columns; each pass rounds to whole grey levels."""
    for axis, new in ((1, width), (0, height)):
        old = pixels.shape[axis]
        if old != new:
            summed = np.moveaxis(np.tensordot(filter_weights(old, new), pixels.astype(np.int64), (1, axis)), 0, axis)
            pixels = np.clip((summed + 2**21) >> 22, 0, 255).astype(np.uint8)
    return pixels


def normalised(pixels: np.ndarray, processor) -> torch.Tensor:
    scaled = (pixels * (1 / 255)).astype(np.float32)
    mean, deviation = (np.array(getattr(processor, name), dtype=np.float32) for name in ("image_mean", "image_std"))
    return torch.from_numpy(((scaled - mean) / deviation).transpose(2, 0, 1))


def cropped(pixels: np.ndarray) -> np.ndarray:
    """The short side resized, the centre cut out: LLaVA-1.5 in the paper's evaluation."""
    height, width = pixels.shape[:2]
    short, long = min(width, height), max(width, height)
    longer = int(SIDE * long / short)
    resized = bicubic(pixels, *((SIDE, longer) if width <= height else (longer, SIDE)))
    top, left = (resized.shape[0] - SIDE) // 2, (resized.shape[1] - SIDE) // 2
    return resized[top : top + SIDE, left : left + SIDE]


def padded(pixels: np.ndarray, mean) -> np.ndarray:
    """The image in the middle of a square of the mean colour, then resized: LLaVA-1.5's own evaluation."""
    height, width = pixels.shape[:2]
    side = max(height, width)
    square = np.empty((side, side, 3), dtype=np.uint8)
    square[:] = [int(255 * channel) for channel in mean]
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = pixels
    return bicubic(square, SIDE, SIDE)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, checkpoint):
    home = tmp_path_factory.mktemp("pixels")
    return {
        "llava": checkpoint,
        "llava_next": tiny_next.save_next(home / "next"),
        "llava_onevision": tiny_onevision.save_onevision(home / "onevision"),
    }


@pytest.mark.parametrize("size", SIZES)
def test_pillow_filters_as_it_did(size):
    pixels = noise(*size)
    for new in ((SIDE, SIDE), (43, 120), (120, 43)):
        found = np.asarray(Image.fromarray(pixels).resize(new, Image.Resampling.BICUBIC))
        assert np.array_equal(found, bicubic(pixels, *new)), new


@pytest.mark.parametrize("preset", ["rcb", "pad"])
@pytest.mark.parametrize("size", SIZES)
def test_llava_sees_the_originals_pixels(folders, size, preset):
    family = load_family(str(folders["llava"]), preprocess=preset)
    processor, pixels = family.processor.image_processor, noise(*size)
    expected = cropped(pixels) if preset == "rcb" else padded(pixels, processor.image_mean)
    (found,) = family.pixels(Visual((Image.fromarray(pixels),)))
    assert torch.equal(found, normalised(expected, processor))


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_the_originals_pixels(folders, name, size):
    family = load_family(str(folders[name]))
    processor, pixels = family.processor.image_processor, noise(*size)
    found = family.pixels(Visual((Image.fromarray(pixels),)))
    assert torch.equal(found[0], normalised(bicubic(pixels, SIDE, SIDE), processor))
    height, width = tiles_of(size, processor.image_grid_pinpoints)
    scale_w, scale_h = width / size[0], height / size[1]
    if scale_w < scale_h:
        new_w, new_h = width, min(int(np.ceil(size[1] * scale_w)), height)
    else:
        new_w, new_h = min(int(np.ceil(size[0] * scale_h)), width), height
    canvas = np.zeros((height, width, 3), dtype=np.uint8)
    top, left = (height - new_h) // 2, (width - new_w) // 2
    canvas[top : top + new_h, left : left + new_w] = bicubic(pixels, new_w, new_h)
    corners = [(y, x) for y in range(0, height, SIDE) for x in range(0, width, SIDE)]
    assert len(found) == 1 + len(corners)
    for tile, (y, x) in zip(found[1:], corners, strict=True):
        assert torch.equal(tile, normalised(canvas[y : y + SIDE, x : x + SIDE], processor))


def tiles_of(size, grids):
    """The grid (height, width) that keeps most of the image, and of those the smallest; the first of equals."""

    def kept(grid):
        scale = min(grid[1] / size[0], grid[0] / size[1])
        return min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])

    return max(grids, key=lambda grid: (kept(grid), kept(grid) - grid[0] * grid[1]))


def test_an_image_that_is_one_of_several_is_stretched(folders):
    family = load_family(str(folders["llava_onevision"]))
    pixels = noise(71, 97)
    (found,) = family.pixels(Visual((Image.fromarray(pixels),), "base"))
    assert torch.equal(found, normalised(bicubic(pixels, SIDE, SIDE), family.processor.image_processor))
