"""One vision-only pass over documents: each image once, whatever the number of questions, processes or budgets.

Batches depend on the documents alone: distinct images in the order of their first appearance, cut after a fixed number.
So one process or many, in one go or resumed, compute the same scores.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from tqdm import tqdm

from rcb_lmms.calibration.scores import ImageScores, Medium, PassFiles, Scores
from rcb_lmms.engine.processes import gather, rank_and_size
from rcb_lmms.errors import BudgetError, UserError
from rcb_lmms.families.images import Visual, whole_images_only
from rcb_lmms.pruners.views import joined
from rcb_lmms.resources import cache_dir

if TYPE_CHECKING:
    from rcb_lmms.engine.encoding import ImageEncoder
    from rcb_lmms.families.base import Family
    from rcb_lmms.pruners.base import Pruner, VisualTokens

READERS = 2  # threads that open documents while the tower works
BATCH_FRAMES = 8
# Raised when a pass computes something else than before: what was kept under another rule is not used.
RULE = 3

Item, Result = TypeVar("Item"), TypeVar("Result")
Opened = tuple[int, "list[Visual] | None", str]


@dataclass(frozen=True)
class Documents:
    """The documents of a benchmark, each of which shows images and videos.

    Attributes:
        name: of the benchmark.
        numbers: of the documents.
        media: opens what one of them shows, by its number.
        data: names the data set, where it has a name that changes with its content.
    """

    name: str
    numbers: Sequence[int]
    media: Callable[[Family, int], list[Visual]]
    data: str | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def open(self, family: Family, number: int) -> Opened:
        """A document's number with its images and videos, or with what is wrong with them at the second attempt too."""
        error = ""
        for _ in range(2):
            try:
                visuals = self.media(family, number)
                for visual in visuals:
                    _ = visual.key  # hashed here, beside the tower's work
            except Exception as caught:  # whatever a damaged document raises, it alone is left out
                error = " ".join(f"{type(caught).__name__}: {caught}".split())
            else:
                return number, visuals, ""
        return number, None, error


def survey(family: Family, documents: Documents) -> tuple[Counter[str], dict[int, str]]:
    """How often a question shows each image, by content key, and what is wrong with documents that cannot be read.

    Every process opens its share, and all get the whole.
    """
    rank, size = rank_and_size()
    asked: Counter[str] = Counter()
    errors: dict[int, str] = {}
    with whole_images_only():
        own = ahead(lambda number: documents.open(family, number), documents.numbers[rank::size], READERS)
        for number, visuals, error in _shown(own, documents.numbers[rank::size], f"reading {documents.name}"):
            asked.update(visual.key for visual in visuals or ())
            if visuals is None:
                errors[number] = error
    every = gather((asked, errors))
    return sum((own for own, _ in every), Counter()), {n: text for _, own in every for n, text in own.items()}


def score_pass(
    encoder: ImageEncoder,
    pruner: Pruner,
    baselines: Mapping[str, Pruner],
    documents: Documents,
    *,
    reread: bool = False,
) -> Scores:
    """Run the documents' images and videos through the vision tower, or find what an earlier pass left of that.

    Args:
        encoder: filled for the union of the pruners' needs.
        pruner: whose evidence is kept.
        baselines: whose retained tokens are counted, by name.
        documents: all of them; every process takes its share.
        reread: open every document though an earlier pass has, since its content may be another now.

    Raises:
        UserError: nothing can be read.
    """
    rank, size = rank_and_size()
    key = {
        "rule": RULE,
        "task": documents.name,
        "data": gather(documents.data)[0],
        "frames": BATCH_FRAMES,
        **encoding(encoder),
        "pruner": traits(pruner),
        "baselines": {name: traits(own) for name, own in sorted(baselines.items())},
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    with PassFiles(cache_dir() / "calibration" / name, rank, size) as files, whole_images_only():
        return _Pass(encoder, documents, files, pruner, baselines).run(reread)


def encoding(encoder: ImageEncoder) -> dict[str, Any]:
    """All that the tower's output depends on, besides the media."""
    family = encoder.family
    return {
        "pretrained": family.pretrained,
        "fingerprint": family.fingerprint,
        "preprocess": family.preprocess,
        "dtype": str(family.dtype),
        "device": family.device.type,
        "split": getattr(family, "split", None),
        "max_frames_num": family.reader.max_frames,
        "video_backend": family.reader.backend,
        "per": encoder.per,
    }


def traits(pruner: Pruner) -> dict[str, str]:
    """A method's name and hyper-parameters, its budget aside."""
    own = {one.name: getattr(pruner, one.name) for one in fields(pruner) if one.name != "budget"}
    return {"method": pruner.name, **{name: getattr(value, "sha256", str(value)) for name, value in own.items()}}


class _Pass:
    def __init__(
        self,
        encoder: ImageEncoder,
        documents: Documents,
        files: PassFiles,
        pruner: Pruner,
        baselines: Mapping[str, Pruner],
    ):
        self.encoder, self.documents, self.files = encoder, documents, files
        self.pruner, self.baselines = pruner, baselines
        self.listed: dict[int, list[Medium]] = {}  # of this pass
        self.errors: dict[int, str] = {}
        self.noted = files.documents()  # of an earlier one

    def run(self, reread: bool) -> Scores:
        if not reread:
            self.listed |= self.noted
        if self.files.size > 1:
            self._list_share()
        plan, scored = self._encode()
        return self._result(plan, not any(gather(scored)))

    def _list_share(self) -> None:
        """Open this process's share of the documents, and learn from the others what theirs show."""
        share = self.documents.numbers[self.files.rank :: self.files.size]
        unknown = [number for number in share if number not in self.listed]
        for opened in _shown(ahead(self._open, unknown, READERS), unknown, f"reading {self.documents.name}"):
            self._note(*opened)
        for listed, errors in gather((self.listed, self.errors)):
            self.listed |= listed
            self.errors |= errors

    def _encode(self) -> tuple[list[str], int]:
        """Score this process's share of the batches that nobody has scored; the names of all, and how many it were."""
        size = self.files.size
        known = [name for name, images in self.files.batches().items() if not any(image.error for image in images)]
        finished, plan, scored = {name for own in gather(known) for name in own}, [], 0

        def pending() -> Iterator[list[tuple[str, int, Visual | None]]]:
            for index, batch in enumerate(self._batches()):
                plan.append(_digest(key for key, _, _ in batch))
                if plan[-1] not in finished and index % size == self.files.rank:
                    yield batch

        for batch in ahead(self._complete, pending(), READERS if size > 1 else 0):
            self.files.append(_digest(visual.key for visual in batch), self._score(batch))
            scored += 1
        return plan, scored

    def _result(self, plan: list[str], reused: bool) -> Scores:
        """What all processes have scored, in the order of the plan."""
        finished = {name: images for own in gather(self.files.batches()) for name, images in own.items()}
        images = [image for name in plan for image in finished[name]]
        broken = {image.key: image.error for image in images if image.error}
        errors, asked = {}, Counter()
        for number in self.documents.numbers:
            media = self.listed.get(number, [])
            error = next((broken[key] for key, _ in media if key in broken), self.errors.get(number))
            if error is None:
                asked.update(key for key, _ in media)
            else:
                errors[number] = error
        images = [image for image in images if asked[image.key]]
        if not images:
            raise UserError(
                wanted=f"the images of {self.documents.name}",
                found=next(iter(errors.values()), "no image or video that can be read"),
                allowed="tasks over images or videos that can be read",
                next_step="check the task's data: the current folder is searched first, then the hub",
            )
        weights = np.array([asked[image.key] for image in images], dtype=np.float64)
        return Scores(images, weights, self.encoder.per, len(self.documents), errors, reused)

    def _batches(self) -> Iterator[list[tuple[str, int, Visual | None]]]:
        """Distinct media `(key, document, what was opened)`; documents nobody listed yet are opened on the way."""
        seen: set[str] = set()
        batch, frames = [], 0
        for number, media, opened in self._media():
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

    def _media(self) -> Iterator[tuple[int, list[Medium], list[Visual | None]]]:
        def look(number: int) -> Opened:
            return (number, None, "") if number in self.listed or number in self.errors else self._open(number)

        numbers = self.documents.numbers
        for number, visuals, error in _shown(ahead(look, numbers, READERS), numbers, self.documents.name):
            if visuals is not None or error:
                self._note(number, visuals, error)
            media = self.listed.get(number, [])
            yield number, media, visuals or [None] * len(media)

    def _open(self, number: int) -> Opened:
        return self.documents.open(self.encoder.family, number)

    def _note(self, number: int, visuals: list[Visual] | None, error: str) -> None:
        if visuals is None:
            self.errors[number] = error
            return
        self.listed[number] = [(visual.key, len(visual.frames)) for visual in visuals]
        if self.noted.get(number) != self.listed[number]:
            self.files.note_document(number, self.listed[number])

    def _complete(self, batch: list[tuple[str, int, Visual | None]]) -> list[Visual]:
        """The visuals of a batch, opened again where only their names are left.

        Raises:
            UserError: a document that could be read before cannot now, or shows something else.
        """
        again = dict.fromkeys(number for _, number, visual in batch if visual is None)
        opened = {visual.key: visual for number in again for visual in self._open(number)[1] or ()}
        missing = [number for key, number, visual in batch if visual is None and key not in opened]
        if missing:
            raise UserError(
                wanted=f"document {missing[0]} of {self.documents.name}",
                found=self._open(missing[0])[2] or "other images than a moment ago",
                allowed="data that stay as they are while a pass runs",
                next_step="repeat the command: finished batches are kept",
            )
        return [opened[key] if visual is None else visual for key, _, visual in batch]

    def _score(self, visuals: list[Visual]) -> list[ImageScores]:
        """What the pass keeps of a batch; an image that cannot be encoded fails alone."""
        try:
            encoded = self.encoder.views(visuals)
            return [self._image(visual, views) for visual, views in zip(visuals, encoded, strict=True)]
        except BudgetError:
            raise
        except Exception as error:
            if len(visuals) == 1:
                return [ImageScores(visuals[0].key, error=" ".join(f"{type(error).__name__}: {error}".split()))]
            return [image for visual in visuals for image in self._score([visual])]

    def _image(self, visual: Visual, views: Sequence[VisualTokens]) -> ImageScores:
        evidence = evidence_of(self.pruner, views, self.encoder.per)
        if not all(np.isfinite(part).all() for part in evidence):
            raise ValueError("scores that are not finite numbers")
        per = self.encoder.per
        counts = {name: sum(map(own.count, _parts(own, views, per))) for name, own in self.baselines.items()}
        return ImageScores(visual.key, sum(map(len, views)), len(views), counts, evidence)


def evidence_of(pruner: Pruner, views: Sequence[VisualTokens], per: str) -> list[np.ndarray]:
    """What `fit` reads of one image: an array for each part that the method decides on by itself."""
    found = [pruner.evidence(part) for part in _parts(pruner, views, per)]
    if found[0] is None:  # counts are exact: one for each time that a budget is spent
        return [np.empty(0, dtype=np.float32)] * (1 if per == "image" else len(views))
    return [array.float().cpu().numpy() for array in found]


def _parts(pruner: Pruner, views: Sequence[VisualTokens], per: str) -> Sequence[VisualTokens]:
    """What a method decides on by itself: every view, or all of them as one."""
    return [joined(views)] if per == "image" and len(views) > 1 and pruner.pools_views else views


def _digest(keys: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(keys).encode()).hexdigest()[:24]


def _shown(items: Iterable[Item], every: Sequence[Any], what: str) -> Iterable[Item]:
    """The same items, with a bar on a terminal, and one line elsewhere."""
    if rank_and_size()[0] or not len(every):
        return items
    if not sys.stderr.isatty():
        print(f"calibration: {what}, {len(every)} documents", file=sys.stderr, flush=True)
        return items
    return tqdm(items, f"calibration: {what}", total=len(every), unit="document")


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
