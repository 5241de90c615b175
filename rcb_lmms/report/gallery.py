"""The images of logged samples, small, and where their visual tokens lie: read from the data sets of the runs."""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from rcb_lmms.engine.questions import load_turns, said
from rcb_lmms.errors import UserError
from rcb_lmms.families import load_family
from rcb_lmms.families.base import Family
from rcb_lmms.families.images import Visual
from rcb_lmms.models.task_data import known_here
from rcb_lmms.report.reading import Run
from rcb_lmms.report.sheets import Sheet, sheets_of
from rcb_lmms.runs.tasks import make_task_manager, working_directory

LONG_SIDE_PX, FEW_COLOURS = 384, 4096
# Of a run's record, what decides where its tokens lie.
_GEOMETRY = ("family", "pretrained", "preprocess", "split", "video_backend", "max_frames_num")


class NoPictures(Exception):
    """Why the images of a task or a sample cannot be shown."""


@dataclass(frozen=True)
class _Grid:
    """A view of which nothing but its rows and columns is known."""

    grid: tuple[int, int]


@dataclass
class Gallery:
    """Images as data URIs, each once, and pictures: an image with the edges of its views' tokens.

    Args:
        folders: where data sets are looked for that are no longer in the folder that a run's record names.
        guesses: where they are looked for last.
        most_bytes: of all images together; what comes later is left out.

    Attributes:
        images: data URIs.
        pictures: see `picture_of`.
        questions: texts by task and number of the samples that were shown; `lmms_eval --output_path` logs none.
        left_out: distinct images that found no room.
    """

    folders: Sequence[Path]
    guesses: Sequence[Path]
    most_bytes: int
    images: list[str] = field(default_factory=list)
    pictures: list[dict[str, Any]] = field(default_factory=list)
    questions: dict[tuple[str, int], str] = field(default_factory=dict)
    left_out: int = 0
    _bytes: int = 0
    _known: dict[str, int | None] = field(default_factory=dict)
    _drawn: dict[str, int] = field(default_factory=dict)
    _made: dict[Hashable, Any] = field(default_factory=dict)

    def show(self, run: Run, task: str, row: dict[str, Any], native: int) -> list[int]:
        """Numbers of the pictures of a sample: one, or the base view and the tiles.

        Args:
            run: whose preprocessing counts.
            task: of the sample; a part of a group.
            row: the logged sample.
            native: visual tokens of all views before pruning.

        Raises:
            NoPictures: the data set is not at hand or another one, or the tokens' grid is not known.
        """
        geometry = tuple(run.record["resolved"].get(name) for name in _GEOMETRY)
        family = self._once(geometry, lambda: _family(*geometry))
        visuals = self._visuals(run, task, row, family)
        if not visuals:
            raise NoPictures(f"{task} shows no image")
        places = [len(family.places(visual)) for visual in visuals]
        if sum(places) != row["token_counts"][0].get("visual_views", sum(places)):
            raise NoPictures(f"the data set of {task} that is at hand shows other images than the run saw")
        side = math.isqrt(native // sum(places))
        if side * side * sum(places) != native:
            raise NoPictures("the packing cuts padding off, so that places of tokens are not known")
        views = [[_Grid((side, side))] * count for count in places]
        return [self._picture(sheet) for sheet in sheets_of(family, [visuals], views)]

    def _visuals(self, run: Run, task: str, row: dict[str, Any], family: Family) -> list[Visual]:
        """What a sample shows, from the first data set that has the sample's document under its number."""
        problem = None
        for folder in self._places(run, task):
            try:
                loaded = self._once((task, folder), functools.partial(_load, task, folder))
                with working_directory(folder):
                    doc = _document(loaded, task, folder, row)
                    turns, visuals = load_turns(family, task, loaded.doc_to_messages(doc))
                self.questions[task, row["doc_id"]] = said(turns)
                return visuals
            except NoPictures as error:
                problem = problem or error
            except Exception as error:  # whatever a damaged document raises, the report is written without it
                problem = problem or NoPictures(f"{type(error).__name__} in {folder}: {error}"[:300])
        raise problem

    def _places(self, run: Run, task: str) -> list[Path]:
        """Folders in which lmms-eval finds the data of a task; any folder, if the data is in the cache.

        Raises:
            NoPictures: there is none.
        """
        source = run.results.get("configs", {}).get(task, {}).get("dataset_path")
        named = run.record.get("directory")
        every = [*([Path(named)] if named else []), *self.folders, *self.guesses]
        folders = list(dict.fromkeys(folder.resolve() for folder in every if folder.is_dir()))
        if source and (known := [folder for folder in folders if (folder / source).is_dir()]):
            return known
        if source and folders and known_here(source):
            return folders[:1]
        raise NoPictures(
            f"the data set {source or 'of ' + task} is neither in {', '.join(map(str, folders))} nor in the cache"
        )

    def _once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returns or, each time, why there is nothing."""
        if key not in self._made:
            try:
                self._made[key] = make()
            except NoPictures as error:
                self._made[key] = error
        if isinstance(self._made[key], NoPictures):
            raise self._made[key]
        return self._made[key]

    def _picture(self, sheet: Sheet) -> int:
        picture = picture_of(sheet)
        image = self._embed(sheet.canvas)
        if image is None:
            raise NoPictures("no room for more images")
        picture["image"] = image
        name = json.dumps(picture)
        if name not in self._drawn:
            self._drawn[name] = len(self.pictures)
            self.pictures.append(picture)
        return self._drawn[name]

    def _embed(self, image: Image) -> int | None:
        name = hashlib.sha256(image.tobytes() + str(image.size).encode()).hexdigest()
        if name not in self._known:
            full = self.left_out and self._bytes > 0.98 * self.most_bytes
            uri = "" if full else data_uri(image)
            if full or self._bytes + len(uri) > self.most_bytes:
                self._known[name] = None
                self.left_out += 1
            else:
                self._known[name] = len(self.images)
                self._bytes += len(uri)
                self.images.append(uri)
        return self._known[name]


def picture_of(sheet: Sheet) -> dict[str, Any]:
    """A sheet's `title`, `width`, `height` and `views`, each with the edges of its columns, `x`, and rows, `y`.

    Token n of a view with c columns lies between `x[n % c]` and `x[n % c + 1]`, `y[n // c]` and `y[n // c + 1]`, in
    pixels of the sheet.
    """
    views = [_edges(boxes, grid) for boxes, grid in zip(sheet.boxes, sheet.grids, strict=True)]
    return {"title": sheet.title, "width": sheet.canvas.width, "height": sheet.canvas.height, "views": views}


def _edges(boxes: np.ndarray, grid: tuple[int, int]) -> dict[str, list[float]]:
    columns = grid[1]
    across, down = boxes[:columns], boxes[::columns]
    return {
        "x": [round(float(edge), 1) for edge in (*across[:, 0], across[-1, 2])],
        "y": [round(float(edge), 1) for edge in (*down[:, 1], down[-1, 3])],
    }


def data_uri(image: Image) -> str:
    """A small copy of an image, as JPEG or PNG, whichever is shorter."""
    image = image.convert("RGB")
    image.thumbnail((LONG_SIDE_PX, LONG_SIDE_PX))
    kinds = {"jpeg": {"quality": 80, "optimize": True}}
    if image.getcolors(FEW_COLOURS):  # a photograph as PNG takes long and is never the shorter one
        kinds["png"] = {"compress_level": 3}  # as short as at 9, in a quarter of the time
    found = []
    for kind, options in kinds.items():
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        found.append(f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}")
    return min(found, key=len)


def _family(family: str, pretrained: str, preprocess: str, split: str | None, backend: str, frames: str) -> Family:
    """A run's family without its weights.

    Raises:
        NoPictures: the checkpoint's configuration and processor are not at hand.
    """
    if None in (family, pretrained, preprocess, backend, frames):
        raise NoPictures("the record does not say how the model saw its images")
    options = {} if split is None else {"split": split == "True"}
    try:
        return load_family(
            pretrained,
            family=family,
            preprocess=preprocess,
            video_backend=backend,
            max_frames_num=int(frames),
            weights=False,
            **options,
        )
    except UserError as error:
        raise NoPictures(f"{error.wanted}: {error.found}") from error


def _load(task: str, folder: Path) -> Any:
    from lmms_eval import tasks

    with working_directory(folder):
        try:
            return tasks.get_task_dict([task], _manager(task), "chat")[task]
        except Exception as error:  # whatever a data set raises; the report is written without its images
            raise NoPictures(f"the data set of {task} in {folder}: {type(error).__name__} {error}"[:300]) from error


@functools.cache
def _manager(task: str) -> Any:
    return make_task_manager(tasks=[task])


def _document(loaded: Any, task: str, folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    """The document of a sample; a data set that holds another one under its number is refused."""
    try:
        doc = loaded.eval_docs[row["doc_id"]]
    except IndexError as error:
        raise NoPictures(f"the data set of {task} in {folder} has no document {row['doc_id']}") from error
    logged = row.get("doc") or {}
    plain = {name: value for name, value in logged.items() if isinstance(value, (str, int, float, bool))}
    if any(name in doc and doc[name] != value for name, value in plain.items()):
        raise NoPictures(f"the data set of {task} in {folder} holds other documents than the run was asked about")
    return doc
