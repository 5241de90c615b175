"""Where visual tokens lie on the original image: crop, padding, stretch, tiles and pooling are undone in its pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from rcb_lmms.families.images import central_square_region

if TYPE_CHECKING:
    import numpy as np


class Place(NamedTuple):
    """Where a view lies: the number of its frame, and left, top, right, bottom on that frame, in pixels of it.

    Where the view shows padding, the region reaches over the frame's edge.
    """

    frame: int
    region: tuple[float, float, float, float]

    def boxes(self, grid: tuple[int, int]) -> np.ndarray:
        """`(n, 4)` left, top, right, bottom of the tokens of a view with `grid` rows and columns, in raster order.

        A pooled view has fewer tokens over the same region, each over its even share of it.
        """
        return split_region(self.region, grid)


def split_region(region: tuple[float, float, float, float], grid: tuple[int, int]) -> np.ndarray:
    """`(n, 4)` boxes of an even grid of rows and columns over a region, in raster order."""
    import numpy as np

    left, top, right, bottom = region
    rows, columns = np.mgrid[: grid[0], : grid[1]].reshape(2, -1)
    width, height = (right - left) / grid[1], (bottom - top) / grid[0]
    x, y = left + columns * width, top + rows * height
    return np.stack([x, y, x + width, y + height], axis=1)


def patch_boxes(
    image_size: tuple[int, int], grid: tuple[int, int], geometry: str, resize: int, crop: int | None = None
) -> np.ndarray:
    """Where each visual token of a base view lies on the original image: `(n, 4)`, see `Place.boxes`.

    Args:
        image_size: width and height of the original image.
        grid: rows and columns of tokens.
        geometry: `centre_crop` (of the short side resized to `resize`), `padded_square` or `stretched`.
        resize: pixels of the short side after resizing.
        crop: side of the centre crop; by default `resize`.
    """
    return split_region(base_region(image_size, geometry, resize, crop or resize), grid)


def base_region(image_size: tuple[int, int], geometry: str, resize: int, crop: int) -> tuple[float, ...]:
    """Left, top, right, bottom of a base view on the original image; arguments as in `patch_boxes`."""
    return _REGIONS[geometry](*image_size, resize, crop)


def _centre_crop(width: int, height: int, resize: int, crop: int) -> tuple[float, float, float, float]:
    from PIL import Image as pil

    # Extremely long images lose their ends before they are resized.
    used = central_square_region(pil.new("1", (width, height))).size
    offsets = [(whole - part) // 2 for whole, part in zip((width, height), used, strict=True)]
    # The long side is rounded down and the crop's offset too, as in the image processor.
    resized = [int(resize * side / min(used)) for side in used]
    scales = [before / after for before, after in zip(used, resized, strict=True)]
    starts = [(side - crop) // 2 for side in resized]
    left, top = (offset + start * scale for offset, start, scale in zip(offsets, starts, scales, strict=True))
    return left, top, left + crop * scales[0], top + crop * scales[1]


def _padded_square(width: int, height: int, resize: int, crop: int) -> tuple[float, float, float, float]:
    side = max(width, height)
    margin = side * (resize - crop) / resize / 2
    left, top = -((side - width) // 2) + margin, -((side - height) // 2) + margin
    return left, top, left + side - 2 * margin, top + side - 2 * margin


def _whole(width: int, height: int, resize: int, crop: int) -> tuple[float, float, float, float]:
    return 0, 0, width, height


_REGIONS = {"centre_crop": _centre_crop, "padded_square": _padded_square, "stretched": _whole}


def tile_regions(image_size: tuple[int, int], pinpoints: Any, side: int) -> list[tuple[float, float, float, float]]:
    """Regions of an image's tiles, row by row, on the original image; black padding reaches over its edge.

    Args:
        image_size: width and height of the original image.
        pinpoints: the sizes (height, width) that the processor may choose.
        side: of a tile in pixels.
    """
    import numpy as np
    from transformers.image_processing_utils import get_patch_output_size, select_best_resolution

    width, height = image_size
    best = select_best_resolution((height, width), pinpoints)
    blank = np.broadcast_to(np.zeros(1, np.uint8), (height, width, 1))  # the function reads a size off an image
    resized_height, resized_width = get_patch_output_size(blank, best, input_data_format="channels_last")
    # Half the padding, rounded down, lies at the left and at the top.
    left, top = (best[1] - resized_width) // 2, (best[0] - resized_height) // 2
    across, down = width / resized_width, height / resized_height
    return [
        ((x - left) * across, (y - top) * down, (x + side - left) * across, (y + side - top) * down)
        for y in range(0, best[0], side)
        for x in range(0, best[1], side)
    ]


def owners(image_size: tuple[int, int], boxes: np.ndarray) -> np.ndarray:
    """`(height, width)` int64: the box that holds the centre of each pixel, or -1; of boxes that overlap, the last."""
    import numpy as np

    width, height = image_size
    owner = np.full((height, width), -1)
    for number, (left, top, right, bottom) in enumerate(np.ceil(boxes - 0.5).astype(int).clip(0)):
        owner[top:bottom, left:right] = number
    return owner


def kept_mask(image_size: tuple[int, int], boxes: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """`(height, width)` whether the centre of each pixel lies in one of the `chosen` boxes."""
    return owners(image_size, boxes[chosen]) >= 0


def painted(image_size: tuple[int, int], boxes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`(height, width)` float64: each pixel has the value of the token that it lies in, NaN where there is none."""
    import numpy as np

    return np.append(values.astype(float), np.nan)[owners(image_size, boxes)]
