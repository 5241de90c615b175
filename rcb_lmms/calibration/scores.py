"""What a vision-only pass keeps of each image: in memory for the fit, and on disk as it comes, to outlive a kill."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from rcb_lmms.files import append_jsonl, read_jsonl, unwritable

# An image or video by content key, with its number of frames.
Medium = tuple[str, int]


@dataclass(frozen=True)
class ImageScores:
    """One image or video.

    Attributes:
        key: of its content.
        native: visual tokens of all its views.
        views: how many.
        counts: tokens that each measured baseline retains of it.
        evidence: an `(e,)` float32 array for each part that the method decides on by itself: what `Pruner.fit` reads.
        error: why there is nothing of all that.
    """

    key: str
    native: int = 0
    views: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    evidence: list[np.ndarray] = field(default_factory=list)
    error: str = ""


@dataclass(frozen=True)
class Scores:
    """Images and how much each counts: a task's, or a union of parts of several.

    Attributes:
        images: different ones, within one task.
        weights: `(i,)` float64: how often each stands in a question.
        per: `view` or `image`: what a budget is spent on, and so what means are taken over.
        documents: how many there are, the unreadable ones included.
        errors: of documents that could not be read, by number.
        reused: whether every image had been scored before.
    """

    images: list[ImageScores]
    weights: np.ndarray
    per: str = "view"
    documents: int = 0
    errors: dict[int, str] = field(default_factory=dict)
    reused: bool = False

    @property
    def asked(self) -> Counter[str]:
        """How often each image stands in a question, by key."""
        total: Counter[str] = Counter()
        for image, weight in zip(self.images, self.weights, strict=True):
            total[image.key] += int(weight)
        return total

    @property
    def data_hash(self) -> str:
        """Names the data by content."""
        return data_hash(self.asked)

    @property
    def parts(self) -> np.ndarray:
        """Parts of each image that the method decides on by itself, `(i,)`."""
        return np.array([len(image.evidence) for image in self.images])

    @property
    def spent(self) -> np.ndarray:
        """How often each image spends the budget, `(i,)`."""
        return np.array([image.views if self.per == "view" else 1 for image in self.images])

    def mean(self, counts: Iterable[float]) -> float:
        """Mean per view (or image) over the questions, of a count for each image."""
        return float(self.weights @ np.fromiter(counts, np.float64)) / float(self.weights @ self.spent)

    @property
    def native(self) -> float:
        """Mean visual tokens before pruning."""
        return self.mean(image.native for image in self.images)

    def baseline(self, name: str) -> float:
        """Mean tokens that a measured baseline retains."""
        return self.mean(image.counts[name] for image in self.images)

    def subset(self, keys: set[str]) -> Scores:
        """Only the images with these keys."""
        chosen = [index for index, image in enumerate(self.images) if image.key in keys]
        return replace(self, images=[self.images[index] for index in chosen], weights=self.weights[chosen])

    def scaled(self) -> Scores:
        """The same with weights by which a budget is spent once altogether: benchmarks of any size then count alike."""
        return replace(self, weights=self.weights / float(self.weights @ self.spent))


def joined(parts: Iterable[Scores]) -> Scores:
    """All images, one part behind the other."""
    parts = list(parts)
    return Scores(
        [image for part in parts for image in part.images],
        np.concatenate([part.weights for part in parts]),
        parts[0].per,
        sum(part.documents for part in parts),
        dict(enumerate(error for part in parts for error in part.errors.values())),
    )


def data_hash(asked: Mapping[str, float]) -> str:
    """Names a data set by its images' content keys and how often each is asked about, whatever their order."""
    return hashlib.sha256(json.dumps(sorted(asked.items())).encode()).hexdigest()


class PassFiles:
    """The files of one pass; each process writes its own, so that a kill costs no more than the batch at hand.

    `documents-R.jsonl` names the images of each document, `images-R.jsonl` the finished batches, and `scores-R.f32`
    holds their evidence. Process 0 also reads what processes that no longer exist have left.

    Args:
        folder: of this pass alone; another program with the same pass is waited for.
        rank: of this process.
        size: how many there are.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, folder: Path, rank: int, size: int):
        self.folder, self.rank, self.size = folder, rank, size

    def __enter__(self) -> PassFiles:
        path = self.folder / f"scores-{self.rank}.f32"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / f"lock-{self.rank}").open("w")
            self._wait()
            self._scores = path.open("ab")
            self._documents = (self.folder / f"documents-{self.rank}.jsonl").open("a+b")
        except OSError as error:
            raise unwritable(path, error) from error
        self._documents.write(b"\n" if self._documents.tell() else b"")  # ends a line that a kill cut off
        ends = [row["end"] for row in read_jsonl(self.folder / f"images-{self.rank}.jsonl") if _is_batch(row)]
        self._scores.truncate(max(ends, default=0) * 4)  # a kill can leave scores that no batch names
        return self

    def __exit__(self, *_: object) -> None:
        for handle in (self._documents, self._scores, self._lock):
            with contextlib.suppress(OSError):
                handle.close()

    def _wait(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another program that runs the same calibration ({self.folder})", file=sys.stderr)
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def documents(self) -> dict[int, list[Medium]]:
        """By number, the images and videos of each document that could be read."""
        self._documents.flush()
        found = {}
        for row in self._rows("documents"):
            with contextlib.suppress(KeyError, TypeError, ValueError):
                found[row["document"]] = [(str(key), int(frames)) for key, frames in row["media"]]
        return found

    def note_document(self, number: int, media: Sequence[Medium]) -> None:
        """Keep what a document shows; on disk with the next batch."""
        self._documents.write(json.dumps({"document": number, "media": media}).encode() + b"\n")

    def batches(self) -> dict[str, list[ImageScores]]:
        """The images of each finished batch, by the batch's name."""
        found = {}
        for rank in self._ranks():
            path = self.folder / f"scores-{rank}.f32"
            scores = np.fromfile(path, "<f4") if path.exists() else np.empty(0, "<f4")
            for row in read_jsonl(self.folder / f"images-{rank}.jsonl"):
                if _is_batch(row) and row["end"] <= len(scores):
                    found[row["batch"]] = _images(row, scores)
        return found

    def append(self, batch: str, images: Sequence[ImageScores]) -> None:
        """Keep a finished batch: the scores first, so that a batch that is named is whole.

        Raises:
            UserError: the disk is full.
        """
        try:
            for image in images:
                for part in image.evidence:
                    self._scores.write(part.astype("<f4").tobytes())
            self._scores.flush()
            self._documents.flush()
        except OSError as error:
            raise unwritable(Path(self._scores.name), error) from error
        rows = [{**vars(image), "evidence": [len(part) for part in image.evidence]} for image in images]
        row = {"batch": batch, "end": self._scores.seek(0, 2) // 4, "images": rows}
        append_jsonl(self.folder / f"images-{self.rank}.jsonl", row)

    def _ranks(self) -> list[int]:
        left = {int(file.stem.split("-")[1]) for file in self.folder.glob("documents-*.jsonl")}
        return [self.rank, *(sorted(rank for rank in left if rank >= self.size) if self.rank == 0 else [])]

    def _rows(self, kind: str) -> Iterable[dict]:
        for rank in self._ranks():
            yield from read_jsonl(self.folder / f"{kind}-{rank}.jsonl")


def _is_batch(row: object) -> bool:
    return isinstance(row, dict) and set(row) == {"batch", "end", "images"}


def _images(row: dict, scores: np.ndarray) -> list[ImageScores]:
    """A batch's images, their evidence cut out of the file's scores."""
    sizes = [size for image in row["images"] for size in image["evidence"]]
    ends = row["end"] - sum(sizes) + np.cumsum(sizes, dtype=np.int64)
    parts = iter([scores[end - size : end] for size, end in zip(sizes, ends, strict=True)])
    return [ImageScores(**{**image, "evidence": [next(parts) for _ in image["evidence"]]}) for image in row["images"]]
