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
from rcb_lmms.families.places import kept_mask
from rcb_lmms.files import write_atomic
from rcb_lmms.pruners.base import Pruner
from rcb_lmms.report.drawing import enlarged, panel_image

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

QUESTION = "What does this image show?"


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
        visual = Visual((image,), "base")
        shown, boxes = enlarged(image, family.places(visual)[0].boxes(family.grid))
        question = questions[row] if questions else QUESTION
        panel_image(panels[0], shown, question if questions else f"{image.width} × {image.height} px")
        for panel, pruner in zip(panels[1:], pruners.values(), strict=True):
            kept = kept_tokens(family, pruner, image, question)
            made = f" + {kept.made} merged" if kept.made else ""
            panel_image(panel, highlight(shown, boxes, kept.indices), f"{len(kept.indices)}{made} of {len(boxes)}")
            _outline(panel, boxes, kept.indices, family.grid)
    for panel, name in zip(axes[0], ["image", *pruners], strict=True):
        panel.set_title(name, fontsize=10)
    if not questions and (asked := [name for name, pruner in pruners.items() if pruner.sees_question]):
        figure.supxlabel(f'{", ".join(asked)} chooses by the question, here "{QUESTION}"', fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return write_atomic(out, buffer.getvalue())


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
