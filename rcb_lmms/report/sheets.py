"""What pictures are drawn on, an image, its tiles or the frames of a video, and what a method keeps there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image as pil
from PIL.Image import Image

from rcb_lmms.engine.questions import Question
from rcb_lmms.engine.session import Session
from rcb_lmms.errors import UserError
from rcb_lmms.families.base import Family
from rcb_lmms.families.images import Visual
from rcb_lmms.pruners.base import VisualTokens

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".gif")
# Frames on a contact sheet, and the gap between them.
CELL_PX, GAP_PX = 200, 8


@dataclass(frozen=True)
class Sheet:
    """One picture and the views that are drawn on it.

    Attributes:
        title: what it shows.
        canvas: the original image, or a video's frames side by side in rows.
        views: numbers of its views among all views of the question.
        boxes: of each of these views, `(n, 4)` where its tokens lie on the canvas, in pixels.
        grids: of each, rows and columns.
    """

    title: str
    canvas: Image
    views: tuple[int, ...]
    boxes: tuple[np.ndarray, ...]
    grids: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Kept:
    """What a method keeps of one view: indices `(k,)`, all tokens' scores `(n,)`, and tokens it makes beside them."""

    indices: np.ndarray
    scores: np.ndarray
    made: int = 0


def open_media(family: Family, path: Path, role: str = "image") -> list[Visual]:
    """The visuals of an image file, or of a video file or a folder of frames.

    Raises:
        UserError: it cannot be read.
    """
    if path.is_dir() or path.suffix.lower() in VIDEO_SUFFIXES:
        return family.open_video(path)
    return [family.open(path, role)]


def sheets_of(
    family: Family, media: Sequence[Sequence[Visual]], views: Sequence[Sequence[VisualTokens]]
) -> list[Sheet]:
    """The sheets of a question's media, in order: a base view, all tiles of an image, all frames of a video.

    Args:
        family: whose preprocessing is undone.
        media: of each image or video its visuals.
        views: of each visual, as `Trace.views`.
    """
    sheets, first, own = [], 0, iter(views)
    for visuals in media:
        places = [(visual, place) for visual in visuals for place in family.places(visual)]
        grids = [view.grid for _ in visuals for view in next(own)]
        numbers = range(first, first + len(grids))
        first += len(grids)
        boxes = [place.boxes(grid) for (_, place), grid in zip(places, grids, strict=True)]
        frames = [visual.frames[place.frame] for visual, place in places]
        if len(visuals) > 1 or visuals[0].role == "video":
            canvas, moved = _contact_sheet(frames, boxes)
            sheets.append(Sheet(f"{len(frames)} frames", canvas, tuple(numbers), tuple(moved), tuple(grids)))
            continue
        title = "base view" if len(grids) > 1 else f"{frames[0].width} × {frames[0].height} px"
        sheets.append(Sheet(title, frames[0], (numbers[0],), (boxes[0],), (grids[0],)))
        if len(grids) > 1:
            tiles = f"{len(grids) - 1} tiles" if len(grids) > 2 else "1 tile"
            sheets.append(Sheet(tiles, frames[0], tuple(numbers[1:]), tuple(boxes[1:]), tuple(grids[1:])))
    return sheets


def _contact_sheet(frames: Sequence[Image], boxes: Sequence[np.ndarray]) -> tuple[Image, list[np.ndarray]]:
    """Frames in rows on white, each in a cell of one size, and the boxes moved with them."""
    columns = int(np.ceil(np.sqrt(len(frames))))
    scales = [CELL_PX / max(frame.size) for frame in frames]
    cell_height = max(round(frame.height * scale) for frame, scale in zip(frames, scales, strict=True))
    cell_width = max(round(frame.width * scale) for frame, scale in zip(frames, scales, strict=True))
    rows = -(-len(frames) // columns)
    size = columns * (cell_width + GAP_PX) - GAP_PX, rows * (cell_height + GAP_PX) - GAP_PX
    canvas, moved = pil.new("RGB", size, "white"), []
    for number, (frame, own) in enumerate(zip(frames, boxes, strict=True)):
        row, column = divmod(number, columns)
        left, top = column * (cell_width + GAP_PX), row * (cell_height + GAP_PX)
        width, height = (max(1, round(side * scales[number])) for side in frame.size)
        canvas.paste(frame.resize((width, height)), (left, top))
        factors = np.tile([width / frame.width, height / frame.height], 2)
        # Boxes that show padding end at the cell's edge, so that they do not lie on a neighbour.
        place = np.tile([left, top], 2)
        inside = np.clip(own * factors, 0, np.tile([width, height], 2))
        moved.append(inside + place)
    return canvas, moved


def kept_of(session: Session, question: Question) -> tuple[list[list[VisualTokens]], list[Kept]]:
    """A question's views, of each of its visuals, and what the session's method keeps of each view, in packing order.

    A layer method is run on the question; what it keeps behind its last layer counts, by the scores of its first.

    Raises:
        UserError: a method that keeps none of the image's own tokens, or a packing that cuts tokens off.
    """
    if session.pruner.stage == "pixels":
        raise UserError(
            wanted=f"draw the tokens that {session.pruner.name} keeps",
            found="a method that makes the whole image smaller, so that each of its tokens is a new one",
            allowed="methods that choose among an image's tokens: rcb, prumerge, prumerge_plus, fastv, random, stride",
            next_step=f"leave {session.pruner.name} out",
        )
    trace = session.trace(question)
    if not trace.layer_kept:
        chosen = [selection for own in trace.selections for selection in own]
        return trace.views, [
            Kept(own.kept.cpu().numpy(), own.scores.float().cpu().numpy(), len(own) - len(own.kept)) for own in chosen
        ]
    lengths = [len(view) for own in trace.views for view in own]
    scores = next(iter(trace.layer_scores.values())).float()
    if sum(lengths) != len(scores):
        raise UserError(
            wanted="the tokens that a layer method keeps, on the image",
            found=f"a prompt with {len(scores)} of the views' {sum(lengths)} tokens: the packing cuts padding off",
            allowed="pack=flat, or --no-split",
            next_step="leave pack=spatial_unpad out",
        )
    *_, last = trace.layer_kept.values()
    stays = torch.zeros(len(scores), dtype=torch.bool)
    stays[last] = True
    parts = zip(stays.split(lengths), scores.split(lengths), strict=True)
    return trace.views, [Kept(own.nonzero().flatten().numpy(), values.numpy()) for own, values in parts]
