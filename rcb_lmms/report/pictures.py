"""Kept visual tokens on the original image, methods side by side: the preprocessing is undone, pixel by pixel."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as pil
from PIL import ImageOps
from PIL.Image import Image

from rcb_lmms.engine.questions import Answer, Question
from rcb_lmms.engine.session import Session
from rcb_lmms.families.base import Family
from rcb_lmms.families.images import Visual
from rcb_lmms.families.places import kept_mask, painted
from rcb_lmms.pruners import make_pruner
from rcb_lmms.pruners.base import Pruner
from rcb_lmms.report.drawing import FORMATS, drawable, enlarged, panel_image, save_figure
from rcb_lmms.report.sheets import Kept, Sheet, kept_of, sheets_of

QUESTION = "What does this image show?"
INCHES, CAPTION_LETTERS = 1.75, 30


@dataclass(frozen=True)
class Shown:
    """One question and its media.

    Attributes:
        text: the question.
        media: of each image or video its visuals (see `open_media`).
    """

    text: str
    media: Sequence[Sequence[Visual]]

    @property
    def question(self) -> Question:
        """The question, its media before the text."""
        return Question(self.text, [visual for visuals in self.media for visual in visuals])


@dataclass(frozen=True)
class Column:
    """What one method keeps of one question, and its answer if it was asked for one."""

    kept: Sequence[Kept]
    answer: Answer | None = None


def highlight(image: Image, boxes: np.ndarray, kept: np.ndarray) -> Image:
    """The image with kept patches as they are, pruned ones grey and dark, and what no patch covers nearly white."""
    pixels = np.asarray(image.convert("RGB"), dtype=float)
    seen = kept_mask(image.size, boxes, np.arange(len(boxes)))
    stays = kept_mask(image.size, boxes, kept)
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    drawn = np.where(seen[..., None], (0.3 * grey + 18)[..., None], (0.15 * grey + 215)[..., None])
    drawn = np.where(stays[..., None], pixels, drawn)
    return pil.fromarray(drawn.round().astype(np.uint8))


def kept_tokens_picture(
    family: Family,
    pruners: Mapping[str, Pruner],
    images: Sequence[Image],
    out: Path,
) -> Path:
    """Write a PNG of images' base views; see `draw_kept`.

    Args:
        family: the loaded model.
        pruners: methods by the name over their column.
        images: opened images.
        out: the file to write.
    """
    shown = [Shown(QUESTION, [[Visual((image,), "base")]]) for image in images]
    session = Session(family, make_pruner("none"))
    (png,) = draw_kept(session, pruners, shown, out, formats=("png",), asked=False)
    return png


def fitted(family: Family, pruner: Pruner, images: Sequence[Image], keep: int) -> Pruner:
    """A method that meets means, brought to `keep` tokens over the very images shown; any other as it is.

    Scenes and photographs have no threshold in common.
    """
    if not pruner.fits_mean:
        return pruner
    views = family.encode([Visual((image,), "base") for image in images], pruner.needs)
    return pruner.fit([pruner.evidence(view) for (view,) in views], [1.0] * len(views), keep)


def draw_kept(
    session: Session,
    pruners: Mapping[str, Pruner],
    shown: Sequence[Shown],
    out: Path,
    *,
    formats: Sequence[str] = FORMATS,
    asked: bool = True,
    scores: bool = False,
    max_new_tokens: int = 0,
) -> list[Path]:
    """Draw kept and pruned tokens: one row per sheet (see `sheets_of`), the original first, then method by method.

    Args:
        session: of the unpruned model, whose encoded images all methods share.
        pruners: methods by the name over their column.
        shown: questions with their media.
        out: path whose ending is replaced by each of the formats.
        formats: of the files.
        asked: whether questions stand under the originals; where they do not, a note names who saw them.
        scores: add a row of score maps under each sheet.
        max_new_tokens: ask every method, and the unpruned model, for answers of so many tokens; 0 asks none.

    Returns:
        the files.

    Raises:
        UserError: a method that keeps none of the image's own tokens, or a budget that cannot be met.
    """
    sessions = {"": session} | {name: session.with_pruner(pruner) for name, pruner in pruners.items()}
    lines = []
    for own in shown:
        columns = {name: _column(each, own, name != "", max_new_tokens) for name, each in sessions.items()}
        sheets = sheets_of(session.family, own.media, session.trace(own.question).views)
        lines += [
            _Line(sheet, columns, own.text if asked and sheet is sheets[-1] else "", sheet is sheets[-1])
            for sheet in sheets
        ]
    figure = _figure(lines, list(pruners), scores)
    if not asked and (seeing := [name for name, pruner in pruners.items() if pruner.sees_question]):
        verb = "chooses" if len(seeing) == 1 else "choose"
        told = f'{", ".join(seeing)} {verb} by the question, here "{shown[0].text}"'
        figure.supxlabel(textwrap.fill(told, CAPTION_LETTERS * (1 + len(pruners))), fontsize=8)
    return save_figure(figure, out.with_suffix(""), formats)


@dataclass(frozen=True)
class _Line:
    """One row of the figure; `columns` by method, the unpruned model's under an empty name."""

    sheet: Sheet
    columns: Mapping[str, Column]
    text: str
    last: bool  # of the question's sheets: answers stand under it

    def captions(self) -> list[str]:
        """Under the original and under every method's panel."""
        captions = []
        for name, column in self.columns.items():
            told = [count_text(self.sheet, column.kept) if name else self.text or self.sheet.title]
            if self.last and column.answer is not None:
                told.append(_said(column.answer) if name else f"unpruned: {_said(column.answer)}")
            captions.append(_wrapped("\n".join(told)))
        return captions


def _column(session: Session, shown: Shown, chosen: bool, max_new_tokens: int) -> Column:
    answer = session.answer([shown.question], max_new_tokens=max_new_tokens)[0] if max_new_tokens else None
    return Column(kept_of(session, shown.question)[1] if chosen else [], answer)


def _figure(lines: Sequence[_Line], names: Sequence[str], scores: bool) -> Any:
    from matplotlib.figure import Figure

    each = 2 if scores else 1
    canvases = [line.sheet.canvas for line in lines for _ in range(each)]
    heights = [max(0.4, min(1.6, canvas.height / canvas.width)) for canvas in canvases]
    text = sum(0.1 + 0.13 * max(caption.count("\n") + 1 for caption in line.captions()) for line in lines)
    size = INCHES * (1 + len(names)), INCHES * sum(heights) + each * text + 0.5
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.02, w_pad=0.02, hspace=0.02, wspace=0.02)
    axes = figure.subplots(len(heights), 1 + len(names), squeeze=False, height_ratios=heights)
    for number, line in enumerate(lines):
        _draw_line(axes[each * number], line)
        if scores:
            _draw_scores(axes[each * number + 1], line)
    for panel, name in zip(axes[0], ["image", *names], strict=True):
        panel.set_title(name, fontsize=10)
    return figure


def _said(answer: Answer) -> str:
    return f"no answer ({answer.error})" if answer.error else f"“{answer.text}”"


def _wrapped(caption: str) -> str:
    lines = [textwrap.shorten(drawable(line), 6 * CAPTION_LETTERS, placeholder=" …") for line in caption.split("\n")]
    return "\n".join("\n".join(textwrap.wrap(line, CAPTION_LETTERS)) for line in lines)


def count_text(sheet: Sheet, kept: Sequence[Kept]) -> str:
    """How many of a sheet's tokens stay: those a method made, and those that show padding alone, are said apart."""
    own = [kept[number] for number in sheet.views]
    count, made = sum(len(view.indices) for view in own), sum(view.made for view in own)
    padding = sum(
        int(_off(sheet.canvas, boxes[view.indices]).sum()) for view, boxes in zip(own, sheet.boxes, strict=True)
    )
    text = f"{count}{f' + {made} merged' if made else ''} of {sum(map(len, sheet.boxes))}"
    return text + (f", {padding} on padding" if padding else "")


def _off(canvas: Image, boxes: np.ndarray) -> np.ndarray:
    left, top, right, bottom = boxes.T
    return (right <= 0) | (bottom <= 0) | (left >= canvas.width) | (top >= canvas.height) | (right <= left)


def _chosen(sheet: Sheet, kept: Sequence[Kept]) -> np.ndarray:
    """Indices of the kept tokens among all tokens of a sheet."""
    starts = np.cumsum([0, *map(len, sheet.boxes)])
    return np.concatenate([start + kept[number].indices for start, number in zip(starts, sheet.views, strict=False)])


def _draw_line(panels: Sequence[Any], line: _Line) -> None:
    sheet = line.sheet
    canvas, boxes = enlarged(sheet.canvas, np.concatenate(sheet.boxes))
    parts = np.split(boxes, _ends(sheet))
    for panel, (name, column), caption in zip(panels, line.columns.items(), line.captions(), strict=True):
        if not name:
            panel_image(panel, canvas, caption)
            continue
        panel_image(panel, highlight(canvas, boxes, _chosen(sheet, column.kept)), caption)
        for number, own, grid in zip(sheet.views, parts, sheet.grids, strict=True):
            _outline(panel, own, column.kept[number].indices, grid)
        # Tokens on padding lie outside.
        panel.set_xlim(-0.5, canvas.width - 0.5)
        panel.set_ylim(canvas.height - 0.5, -0.5)


def _ends(sheet: Sheet) -> list[int]:
    return np.cumsum([len(boxes) for boxes in sheet.boxes])[:-1].tolist()


def _draw_scores(panels: Sequence[Any], line: _Line) -> None:
    """Each method's scores over the image, in its own scale: bright tokens stay first."""
    sheet = line.sheet
    canvas, boxes = enlarged(sheet.canvas, np.concatenate(sheet.boxes))
    grey = 0.5 + 0.5 * np.asarray(ImageOps.grayscale(canvas)) / 255
    for panel, (name, column) in zip(panels, line.columns.items(), strict=True):
        if not name:
            panel.set_visible(False)
            continue
        values = np.concatenate([column.kept[number].scores for number in sheet.views])
        panel_image(panel, grey, cmap="gray", vmin=0, vmax=1)
        panel_image(panel, painted(canvas.size, boxes, values), cmap="viridis", alpha=0.75)
        panel.set_xlabel(f"scores {values.min():.3g} to {values.max():.3g}", fontsize=8, labelpad=3)


def _outline(panel: Any, boxes: np.ndarray, kept: np.ndarray, grid: tuple[int, int]) -> None:
    """A line between kept and pruned patches, white within black, which is seen on any background."""
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
    for colour, width in (("black", 1.8), ("white", 0.7)):
        panel.add_collection(LineCollection(lines, colors=colour, linewidths=width), autolim=False)
