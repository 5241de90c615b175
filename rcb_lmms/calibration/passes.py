"""One vision-only pass over the documents of a task: each image once, whatever the number of questions or processes.

Batches depend on the documents alone: distinct images in the order of their first appearance, cut after a fixed number.
So one process or many, in one go or resumed, compute the same scores.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from rcb_lmms.calibration.fitting import evidence_of
from rcb_lmms.calibration.score_files import ImageScores, Medium, ScoredImages, ScoreFiles
from rcb_lmms.engine.encoding import ImageEncoder
from rcb_lmms.engine.questions import load_turns
from rcb_lmms.errors import UserError
from rcb_lmms.families.images import Visual, whole_images_only
from rcb_lmms.models.processes import gather, rank_and_size
from rcb_lmms.resources import cache_dir

if TYPE_CHECKING:
    from rcb_lmms.families.base import Family
    from rcb_lmms.pruners.base import Pruner

READERS = 2  # threads that open documents while the tower works
BATCH_FRAMES = 8

Item, Result = TypeVar("Item"), TypeVar("Result")


@dataclass(frozen=True)
class Documents:
    """The documents of one lmms-eval task, in the split that it is scored on."""

    task: str
    dataset: Any
    messages: Callable[[Any], list[dict[str, Any]]]

    @classmethod
    def of(cls, name: str, task: Any) -> Documents:
        """From a task object made for chat models."""
        return cls(name, task.eval_docs, task.doc_to_messages)

    def open(self, family: Family, number: int) -> list[Visual]:
        """The images and videos of a document, inside `whole_images_only`."""
        return load_turns(family, self.task, self.messages(self.dataset[number]))[1]


@dataclass(frozen=True)
class TaskScores:
    """The result of a pass.

    Attributes:
        images: every one that some document shows.
        weights: how often each is shown, by content key.
        documents: how many there are.
        errors: of documents that could not be read, by number.
    """

    images: ScoredImages
    weights: Counter[str]
    documents: int
    errors: dict[int, str]


def score_documents(
    encoder: ImageEncoder,
    documents: Documents,
    method: Pruner,
    baselines: Mapping[str, Pruner],
    identity: Mapping[str, Any],
) -> TaskScores:
    """Run a task's images and videos through the vision tower, or find what an earlier pass left of that.

    Args:
        encoder: filled for the union of the pruners' needs.
        documents: the task's; every process is given all of them and takes its share.
        method: whose scores are kept.
        baselines: whose retained tokens are counted.
        identity: all that scores and counts depend on besides the documents.

    Raises:
        UserError: nothing can be read, or another program runs the same pass.
    """
    rank, size = rank_and_size()
    data = gather(getattr(documents.dataset, "_fingerprint", None))[0]
    name = json.dumps({**identity, "task": documents.task, "data": data, "frames": BATCH_FRAMES}, sort_keys=True)
    folder = cache_dir() / "calibration" / "passes" / hashlib.sha256(name.encode()).hexdigest()[:24]
    files = ScoreFiles(folder, rank)
    try:
        run = _Pass(encoder, documents, files, method, baselines)
        with whole_images_only():
            if size > 1:
                run.list_documents(range(rank, len(documents.dataset), size))
                files.flush()
                gather(None)
            plan = run.encode(rank, size)
        files.flush()
        gather(None)
        return run.result(plan)
    finally:
        files.close()


class _Pass:
    def __init__(self, encoder: ImageEncoder, documents: Documents, files: ScoreFiles, method: Any, baselines: Any):
        self.encoder, self.documents, self.files = encoder, documents, files
        self.method, self.baselines = method, baselines

    def list_documents(self, numbers: Iterable[int]) -> None:
        """Write down what documents show, for those of which it is not known."""
        known, _ = self.files.documents()
        for number, visuals, error in ahead(self._try_open, [own for own in numbers if own not in known], READERS):
            self._note(number, visuals, error)

    def encode(self, rank: int, size: int) -> list[str]:
        """Score this process's share of the batches that nobody has scored yet; returns the names of all."""
        finished, plan = set(self.files.finished()), []

        def pending() -> Iterator[list[tuple[str, int, Visual | None]]]:
            for index, batch in enumerate(self._batches(size)):
                plan.append(_batch_name(batch))
                if plan[-1] not in finished and index % size == rank:
                    yield batch

        for batch in ahead(self._complete, pending(), READERS if size > 1 else 0):
            self._score(batch)
        return plan

    def result(self, plan: list[str]) -> TaskScores:
        """What the files of all processes hold now."""
        finished, (listed, errors) = self.files.finished(), self.files.documents()
        images = [image for name in plan for image in finished[name]]
        weights = Counter(key for media in listed.values() for key, _ in media)
        if not images:
            raise UserError(
                wanted=f"the images of task {self.documents.task}",
                found=next(iter(errors.values()), "documents without images or videos"),
                allowed="tasks over images or videos that can be read",
                next_step="check the task's data: the current folder is searched first, then the hub",
            )
        scored = ScoredImages.of(self.files.folder, images, weights, self.encoder.per)
        return TaskScores(scored, weights, len(self.documents.dataset), errors)

    def _batches(self, size: int) -> Iterator[list[tuple[str, int, Visual | None]]]:
        """Distinct media `(key, document, what was opened)`; documents nobody listed yet are opened on the way."""
        seen: set[str] = set()
        batch, frames = [], 0
        for number, media, opened in self._media(size):
            for (key, own_frames), visual in zip(media, opened, strict=True):
                if key in seen:
                    continue
                seen.add(key)
                if batch and frames + own_frames > BATCH_FRAMES:
                    yield batch
                    batch, frames = [], 0
                batch.append((key, number, visual))
                frames += own_frames
        if batch:
            yield batch

    def _media(self, size: int) -> Iterator[tuple[int, list[Medium], list[Visual | None]]]:
        listed, failed = self.files.documents()
        if size == 1:
            failed = {}  # perhaps they can be read now; several processes have just tried

        def look(number: int) -> tuple[int, list[Visual] | None, str | None]:
            return (number, None, None) if number in listed or number in failed else self._try_open(number)

        for number, visuals, error in ahead(look, range(len(self.documents.dataset)), READERS):
            if visuals is None and error is None:
                media = listed.get(number, [])
                yield number, media, [None] * len(media)
            else:
                media = self._note(number, visuals, error)
                yield number, media, visuals or []

    def _try_open(self, number: int) -> tuple[int, list[Visual] | None, str | None]:
        try:
            visuals = self.documents.open(self.encoder.family, number)
        except (UserError, OSError, SyntaxError, ValueError) as error:  # what damaged and missing media raise
            return number, None, f"{type(error).__name__}: {error}"
        for visual in visuals:
            _ = visual.key  # hashed here, beside the tower's work
        return number, visuals, None

    def _note(self, number: int, visuals: list[Visual] | None, error: str | None) -> list[Medium]:
        media = None if visuals is None else [(visual.key, len(visual.frames)) for visual in visuals]
        self.files.note_document(number, media, error or "")
        return media or []

    def _complete(self, batch: list[tuple[str, int, Visual | None]]) -> list[Visual]:
        """The visuals of a batch, opened again where only their names are left."""
        again = dict.fromkeys(number for _, number, visual in batch if visual is None)
        opened = {own.key: own for number in again for own in self.documents.open(self.encoder.family, number)}
        return [opened[key] if visual is None else visual for key, _, visual in batch]

    def _score(self, visuals: list[Visual]) -> None:
        """Keep the scores of a batch and what the baselines retain of it."""
        import numpy as np

        images, scores = [], []
        for visual, views in zip(visuals, self.encoder.views(visuals), strict=True):
            parts = evidence_of(self.method, views, self.encoder.per)
            counts = {name: sum(map(pruner.count, views)) for name, pruner in self.baselines.items()}
            sizes = tuple(map(len, parts))
            images.append(ImageScores(visual.key, sizes, sum(map(len, views)), len(views), counts))
            scores.append(np.concatenate(parts))
        self.files.append(_digest(visual.key for visual in visuals), images, scores)


def _batch_name(batch: list[tuple[str, int, Visual | None]]) -> str:
    return _digest(key for key, _, _ in batch)


def _digest(keys: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(keys).encode()).hexdigest()[:24]


def ahead(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """`map` in order, with `threads` working at the next few items while the caller uses a result."""
    if not threads:
        yield from map(function, items)
        return
    items = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque(pool.submit(function, item) for item in itertools.islice(items, 2 * threads))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
                yield result
        finally:
            for future in waiting:
                future.cancel()
