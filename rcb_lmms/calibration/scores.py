"""What a vision-only pass keeps of each image: in memory for the fit, and on disk as it comes, to outlive a kill."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from rcb_lmms.files import write_atomic

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


class Store:
    """The folder of one pass: a file for each finished batch, so that a kill costs no more than the batch at hand.

    Files appear whole or not at all, and their names say what they hold: programs with the same pass may share it.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def documents(self) -> dict[int, list[Medium]]:
        """What each document shows, by number, if a pass has come to its end."""
        try:
            written = json.loads((self.folder / "documents.json").read_text())
            return {int(number): [(str(key), int(frames)) for key, frames in media] for number, media in written}
        except (OSError, ValueError, TypeError):
            return {}

    def keep_documents(self, listed: Mapping[int, Sequence[Medium]]) -> None:
        """Write down what documents show, so that they need not be opened for another budget."""
        write_atomic(self.folder / "documents.json", json.dumps(sorted(listed.items())))

    def batch(self, name: str) -> list[ImageScores] | None:
        """A finished batch; `None` if there is none, or a damaged one."""
        try:
            with np.load(self.folder / f"{name}.npz") as file:
                written, scores = json.loads(str(file["images"])), file["scores"]
            sizes = [size for image in written for size in image["evidence"]]
            parts = iter(np.split(scores, np.cumsum(sizes, dtype=np.int64)[:-1]))
            return [ImageScores(**{**image, "evidence": [next(parts) for _ in image["evidence"]]}) for image in written]
        except (OSError, ValueError, KeyError, TypeError, BadZipFile):
            return None

    def keep_batch(self, name: str, images: Sequence[ImageScores]) -> None:
        """Write a finished batch.

        Raises:
            UserError: the disk is full, or the cache cannot be written.
        """
        rows = [{**vars(image), "evidence": [len(part) for part in image.evidence]} for image in images]
        scores = [np.empty(0, np.float32), *(part for image in images for part in image.evidence)]
        content = io.BytesIO()
        np.savez(content, images=json.dumps(rows), scores=np.concatenate(scores))
        write_atomic(self.folder / f"{name}.npz", content.getvalue())
