"""Kept visual tokens on the original image: the preprocessing is undone, pixel by pixel."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcb_lmms.engine.questions import Question
from rcb_lmms.engine.session import Session
from rcb_lmms.errors import UserError
from rcb_lmms.families.base import Family
from rcb_lmms.families.images import Visual
from rcb_lmms.families.places import kept_mask, patch_boxes
from rcb_lmms.files import write_atomic
from rcb_lmms.pruners.base import Pruner

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

QUESTION = "What does this image show?"
# Small images are drawn larger, so that borders of patches stay sharp; no image is drawn larger than the other number.
_SHORT_SIDE_PX, _LONG_SIDE_PX = 420, 1680


@dataclass(frozen=True)
class Kept:
    """What a method keeps of one image: indices `(k,)` of its view, and tokens it makes beside them (PruMerge's)."""

    indices: np.ndarray
    made: int = 0


def highlight(image: Image, boxes: np.ndarray, kept: np.ndarray) -> Image:
    """The image with kept patches as they are, pruned ones grey and dark, and what no patch covers nearly white."""
    import numpy as np
    from PIL import Image as pil

    pixels = np.asarray(image.convert("RGB"), dtype=float)
    seen = kept_mask(image.size, boxes, np.arange(len(boxes)))
    stays = kept_mask(image.size, boxes, kept)
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    drawn = np.where(seen[..., None], (0.3 * grey + 18)[..., None], (0.15 * grey + 215)[..., None])
    drawn = np.where(stays[..., None], pixels, drawn)
    return pil.fromarray(drawn.round().astype(np.uint8))


def kept_tokens(family: Family, pruner: Pruner, image: Image, question: str = QUESTION) -> Kept:
    """What a method keeps of an image's base view; methods that see the question are run on `question`.

    Raises:
        UserError: a method that keeps none of the image's own tokens.
    """
    if pruner.stage == "pixels":
        raise UserError(
            wanted="draw the tokens that downsample keeps",
            found="a method that makes the whole image smaller, so that each of its tokens is a new one",
            allowed="methods that choose among an image's tokens: rcb, prumerge, prumerge_plus, fastv, random, stride",
            next_step="leave downsample out",
        )
    trace = Session(family, pruner).trace(Question(question, [Visual((image,), "base")]))
    if trace.layer_kept:
        *_, kept = trace.layer_kept.values()
        return Kept(kept.numpy())
    selection = trace.selections[0][0]
    return Kept(selection.kept.cpu().numpy(), made=len(selection) - len(selection.kept))


def kept_tokens_picture(
    family: Family,
    pruners: Mapping[str, Pruner],
    images: Sequence[Image],
    out: Path,
    questions: Sequence[str] | None = None,
) -> Path:
    """Write a PNG: one row per image, the original first, then the tokens that every method keeps, with their count.

    Args:
        family: the loaded model.
        pruners: methods by the name over their column.
        images: opened images.
        out: the file to write.
        questions: one per image, for methods that see the question; shown under the originals.
    """
    from matplotlib.figure import Figure

    heights = [max(0.4, min(1.6, image.height / image.width)) for image in images]
    columns, inches = 1 + len(pruners), 1.75
    size = inches * columns, sum(inches * height + 0.22 for height in heights) + 0.5
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.02, w_pad=0.02, hspace=0.02, wspace=0.02)
    axes = figure.subplots(len(images), columns, squeeze=False, height_ratios=heights)
    for row, (panels, image) in enumerate(zip(axes, images, strict=True)):
        shown, boxes = _enlarged(family, image)
        question = questions[row] if questions else QUESTION
        _draw(panels[0], shown, question if questions else f"{image.width} × {image.height} px")
        for panel, pruner in zip(panels[1:], pruners.values(), strict=True):
            kept = kept_tokens(family, pruner, image, question)
            made = f" + {kept.made} merged" if kept.made else ""
            _draw(panel, highlight(shown, boxes, kept.indices), f"{len(kept.indices)}{made} of {len(boxes)}")
            _outline(panel, boxes, kept.indices, family.grid)
    for panel, name in zip(axes[0], ["image", *pruners], strict=True):
        panel.set_title(name, fontsize=10)
    if not questions and (asked := [name for name, pruner in pruners.items() if pruner.sees_question]):
        figure.supxlabel(f'{", ".join(asked)} chooses by the question, here "{QUESTION}"', fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return write_atomic(out, buffer.getvalue())


def _enlarged(family: Family, image: Image) -> tuple[Image, np.ndarray]:
    """The image at the size it is drawn in, and the boxes of its patches."""
    import numpy as np

    processor, geometry = family.processor.image_processor, family.geometry[family.preprocess]
    side = family.model.config.vision_config.image_size
    # Only a centre crop resizes to another side than the view's.
    resize = processor.size["shortest_edge"] if geometry != "stretched" and "shortest_edge" in processor.size else side
    boxes = patch_boxes(image.size, family.grid, geometry, resize, side)
    most = _LONG_SIDE_PX / max(image.size)
    if most < 1:
        width, height = (max(1, round(length * most)) for length in image.size)
        return image.resize((width, height)), boxes * np.tile([width / image.width, height / image.height], 2)
    factor = max(1, min(int(most), round(_SHORT_SIDE_PX / min(image.size))))
    return image.resize((image.width * factor, image.height * factor), 0), boxes * factor


def _draw(panel: Any, image: Image, caption: str) -> None:
    panel.imshow(image, interpolation="antialiased")
    panel.set_xticks([])
    panel.set_yticks([])
    panel.spines[:].set_visible(False)
    panel.set_xlabel(caption, fontsize=8, labelpad=3)


def _outline(panel: Any, boxes: np.ndarray, kept: np.ndarray, grid: tuple[int, int]) -> None:
    """A thin line between kept and pruned patches: a dark patch that stays would look like a dimmed one."""
    import numpy as np
    from matplotlib.collections import LineCollection

    stays = np.zeros((grid[0] + 2, grid[1] + 2), bool)
    rows, columns = np.divmod(kept, grid[1])
    stays[rows + 1, columns + 1] = True
    lines = []
    for row, column, (left, top, right, bottom) in zip(rows + 1, columns + 1, boxes[kept] - 0.5, strict=True):
        sides = {
            (row - 1, column): [(left, top), (right, top)],
            (row + 1, column): [(left, bottom), (right, bottom)],
            (row, column - 1): [(left, top), (left, bottom)],
            (row, column + 1): [(right, top), (right, bottom)],
        }
        lines += [line for neighbour, line in sides.items() if not stays[neighbour]]
    panel.add_collection(LineCollection(lines, colors="white", linewidths=0.7), autolim=False)
