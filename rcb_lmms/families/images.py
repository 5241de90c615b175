"""Images as they come from people: opened once, checked, turned into RGB, named by content."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rcb_lmms.errors import UserError
from rcb_lmms.files import no_file

if TYPE_CHECKING:
    from PIL.Image import Image

# Past this aspect ratio, resizing the short side first would make an image of gigabytes for a crop of one square.
MAX_ASPECT = 16
# 300 MB as RGB, as much again for each copy.
MAX_PIXELS = 100_000_000


@dataclass(frozen=True)
class Visual:
    """What stands behind one placeholder of a prompt.

    Attributes:
        frames: RGB images; exactly one, unless the role is `video`.
        role: `image` may be cut into tiles; `base` is seen in one view (one of several images, a video frame given as
            an image, the codebook builder's images); `video` is a sequence of frames that is packed as one.
    """

    frames: tuple[Image, ...]
    role: Literal["image", "base", "video"] = "image"

    @cached_property
    def key(self) -> str:
        """Content key: equal visuals are encoded once, whatever they are called."""
        if self.role == "image":
            return content_key(self.image)
        return hashlib.sha256(" ".join([self.role, *map(content_key, self.frames)]).encode()).hexdigest()

    @property
    def image(self) -> Image:
        """The only frame.

        Raises:
            ValueError: a video.
        """
        (frame,) = self.frames
        return frame


def as_rgb(image: Image | str | Path) -> Image:
    """An RGB image: files are opened, transparency is laid on white, CMYK and palettes are converted.

    Raises:
        UserError: the file is missing, empty, cut off or no image, or the image has more than `MAX_PIXELS`.
    """
    from PIL import Image as pil

    is_path = isinstance(image, (str, Path))
    name = str(image) if is_path else "an image"
    if is_path and (problem := no_file(image)):
        raise _unreadable(name, problem)
    try:
        with whole_images_only():
            opened = pil.open(image) if is_path else image
            check_size(opened.size, name)
            opened.load()
    except (UserError, MemoryError):
        raise
    except Exception as error:  # decoders raise whatever their parsing runs into, struct.error and IndexError too
        raise _unreadable(name, str(error) or type(error).__name__) from error
    if 0 in opened.size:
        raise _unreadable(name, f"an empty image of {opened.width} x {opened.height} pixels")
    if opened.mode in ("RGBA", "LA", "PA") or "transparency" in opened.info:
        rgba = opened.convert("RGBA")
        return pil.alpha_composite(pil.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return opened.convert("RGB")


def check_size(size: tuple[int, int], name: str) -> None:
    """Refuse an image, before it is decoded, that would take gigabytes.

    Raises:
        UserError: more than `MAX_PIXELS`.
    """
    width, height = size
    if width * height > MAX_PIXELS:
        raise UserError(
            wanted=f"read {name}",
            found=f"{width} x {height} pixels",
            allowed=f"up to {MAX_PIXELS / 1e6:.0f} million pixels",
            next_step="make the image smaller: the vision tower sees a few hundred thousand pixels of it",
        )


def _unreadable(name: str, found: str) -> UserError:
    return UserError(
        wanted=f"read {name}",
        found=found,
        allowed="a complete image file that Pillow can read (PNG, JPEG, WebP, ...), of at least one pixel",
        next_step="remove or replace the image",
    )


@contextlib.contextmanager
def whole_images_only() -> Iterator[None]:
    """Inside, cut-off files are errors: lmms-eval makes Pillow fill what is missing with grey, and scores that."""
    from PIL import ImageFile

    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def content_key(image: Image) -> str:
    """The sha256 of an RGB image's size and pixels: equal images are encoded once, whatever they are called."""
    digest = hashlib.sha256(f"{image.mode} {image.width}x{image.height}".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def central_square_region(image: Image) -> Image:
    """Cut the far ends off extremely long images, which a centre crop would discard anyway."""
    limit = MAX_ASPECT * min(image.size)
    if max(image.size) <= limit:
        return image
    width, height = min(image.width, limit), min(image.height, limit)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def pad_to_square(image: Image, mean: Sequence[float]) -> Image:
    """The image centred on a square of the `mean` colour (0 to 1), as LLaVA's own `image_aspect_ratio: pad`."""
    from PIL import Image as pil

    side = max(image.size)
    if image.width == image.height:
        return image
    check_size((side, side), f"an image of {image.width} x {image.height} pixels padded to a square")
    square = pil.new("RGB", (side, side), tuple(int(255 * channel) for channel in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def not_finite(visual: Visual, dtype: Any) -> UserError:
    """The error of an image whose visual tokens are no numbers."""
    return UserError(
        wanted=f"visual tokens of the {visual.role} {visual.key[:12]} ({visual.frames[0].size} pixels)",
        found=f"values that are infinite or no number, in {str(dtype).removeprefix('torch.')}",
        allowed="finite values",
        next_step="dtype=bfloat16 or float32 if float16 is too narrow for the model; else look at the image",
    )
