"""What a vision-only pass over one task leaves on disk: written as it comes, resumed where it was killed.

Files of a pass, one set for each process: `documents-R.jsonl` names the images of each document, `images-R.jsonl` the
finished batches, `scores-R.f32` holds their scores. Results are read in the order of the plan, which the number of
processes does not change.
"""

from __future__ import annotations

import fcntl
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from rcb_lmms.calibration.cuts import Chunk
from rcb_lmms.errors import UserError
from rcb_lmms.files import append_jsonl, read_jsonl, unwritable

CHUNK_TOKENS = 1 << 20

# An image or video by content key, with its number of frames.
Medium = tuple[str, int]


@dataclass(frozen=True)
class ImageScores:
    """One image's or video's place in a file of scores.

    Attributes:
        key: of its content.
        parts: tokens of each part that the method decides on.
        native: visual tokens of all its views.
        views: how many.
        counts: tokens that each measured baseline retains of it.
        file, start: where its scores begin, counted in scores.
    """

    key: str
    parts: tuple[int, ...]
    native: int
    views: int
    counts: dict[str, int]
    file: str = ""
    start: int = 0


class ScoreFiles:
    """The files of one pass.

    Args:
        folder: of this pass alone.
        rank: of this process, which writes files of its own and reads those of all.

    Raises:
        UserError: another program runs the same pass, or the folder cannot be written.
    """

    def __init__(self, folder: Path, rank: int):
        self.folder, self.rank = folder, rank
        self._scores = folder / f"scores-{rank}.f32"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._handle = self._scores.open("ab")
        except OSError as error:
            raise unwritable(self._scores, error) from error
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                wanted=f"write {self._scores}",
                found="another program that is running the same pass",
                allowed="one program per pass, of any number of processes (torchrun)",
                next_step="wait for it, then repeat the command: the finished pass is found again",
            ) from error
        self._documents = (folder / f"documents-{rank}.jsonl").open("a+b")
        self._documents.write(b"\n" if self._documents.tell() else b"")  # ends a line that a kill cut off
        ends = [row["end"] for row in read_jsonl(folder / f"images-{rank}.jsonl")]
        self._handle.truncate(max(ends, default=0) * 4)  # a kill can leave scores that no batch names

    def flush(self) -> None:
        """Let other processes see what was noted."""
        self._documents.flush()

    def close(self) -> None:
        """Write what is left, and let others write."""
        self._documents.close()
        self._handle.close()

    def documents(self) -> tuple[dict[int, list[Medium]], dict[int, str]]:
        """By number, the images and videos of each document that could be read, and what was wrong with the others."""
        self.flush()
        media: dict[int, list[Medium]] = {}
        errors: dict[int, str] = {}
        for row in self._rows("documents"):
            if "media" in row:
                media[row["document"]] = [(key, frames) for key, frames in row["media"]]
            else:
                errors[row["document"]] = row["error"]
        return media, {number: error for number, error in errors.items() if number not in media}

    def note_document(self, number: int, media: Sequence[Medium] | None, error: str = "") -> None:
        """Keep what a document shows, or why it could not be read (`media` is `None`); on disk with the next batch."""
        row = {"document": number} | ({"error": error} if media is None else {"media": media})
        self._documents.write(json.dumps(row).encode() + b"\n")

    def finished(self) -> dict[str, list[ImageScores]]:
        """The images of each finished batch, by the batch's name."""
        sizes = {file.name: file.stat().st_size // 4 for file in self.folder.glob("scores-*.f32")}
        return {
            row["batch"]: [ImageScores(**{**image, "parts": tuple(image["parts"])}) for image in row["images"]]
            for row in self._rows("images")
            if row["end"] <= sizes[row["images"][0]["file"]]
        }

    def append(self, batch: str, images: Sequence[ImageScores], scores: Sequence[np.ndarray]) -> None:
        """Keep a finished batch: the scores first, so that a batch that is named is whole.

        Raises:
            UserError: the disk is full.
        """
        rows, start = [], self._handle.seek(0, 2) // 4
        try:
            for image, own in zip(images, scores, strict=True):
                rows.append({**asdict(image), "file": self._scores.name, "start": start})
                self._handle.write(own.astype("<f4").tobytes())
                start += len(own)
            self._handle.flush()
            self.flush()
        except OSError as error:
            raise unwritable(self._scores, error) from error
        append_jsonl(self.folder / f"images-{self.rank}.jsonl", {"batch": batch, "end": start, "images": rows})

    def _rows(self, kind: str) -> Iterator[dict]:
        for file in sorted(self.folder.glob(f"{kind}-*.jsonl")):
            yield from read_jsonl(file)


@dataclass(frozen=True)
class ScoredImages:
    """Images whose scores lie on disk, and how much each counts; parts of benchmarks and unions of them.

    Attributes:
        images: with the folder of each one's scores.
        weights: one per image.
        per: `view` or `image`: what a budget is spent on.
    """

    images: list[tuple[Path, ImageScores]]
    weights: np.ndarray
    per: str

    @classmethod
    def of(cls, folder: Path, images: Sequence[ImageScores], asked: Counter[str], per: str) -> ScoredImages:
        """Images of one pass, weighted by how often a question shows them."""
        weights = np.array([asked[image.key] for image in images], dtype=np.float64)
        return cls([(folder, image) for image in images], weights, per)

    def subset(self, keys: set[str]) -> ScoredImages:
        """Only the images with these keys."""
        chosen = [index for index, (_, image) in enumerate(self.images) if image.key in keys]
        return ScoredImages([self.images[index] for index in chosen], self.weights[chosen], self.per)

    def joined(self, other: ScoredImages) -> ScoredImages:
        """Both, one behind the other."""
        weights = np.concatenate([self.weights, other.weights])
        return ScoredImages(self.images + other.images, weights, self.per)

    def scaled(self) -> ScoredImages:
        """With weights by which a budget is spent once altogether: benchmarks of any size then count the same."""
        return ScoredImages(self.images, self.weights / self.spent, self.per)

    @property
    def spent(self) -> float:
        """How often a budget is spent, weights included."""
        return float(self.weights @ [self._times(image) for _, image in self.images])

    def _times(self, image: ImageScores) -> int:
        return image.views if self.per == "view" else 1

    def mean(self, counts: Sequence[float]) -> float:
        """Mean per view (or image) over the questions, of one count for each image."""
        return float(self.weights @ np.asarray(counts, dtype=np.float64)) / self.spent

    @property
    def native(self) -> float:
        """Mean visual tokens before pruning."""
        return self.mean([image.native for _, image in self.images])

    def baseline(self, name: str) -> float:
        """Mean tokens that a measured baseline retains."""
        return self.mean([image.counts[name] for _, image in self.images])

    def chunks(self) -> Iterator[Chunk]:
        """All scores, read from disk about `CHUNK_TOKENS` at a time."""
        begin, tokens = 0, 0
        for index, (_, image) in enumerate(self.images, 1):
            tokens += sum(image.parts)
            if tokens >= CHUNK_TOKENS or index == len(self.images):
                yield self._read(slice(begin, index))
                begin, tokens = index, 0

    def _read(self, span: slice) -> Chunk:
        scores, handles = [], {}
        try:
            for folder, image in self.images[span]:
                path = folder / image.file
                handle = handles[path] if path in handles else handles.setdefault(path, path.open("rb"))
                handle.seek(4 * image.start)
                scores.append(np.fromfile(handle, "<f4", sum(image.parts)))
        finally:
            for handle in handles.values():
                handle.close()
        numbers = [len(image.parts) for _, image in self.images[span]]
        parts = np.array([part for _, image in self.images[span] for part in image.parts], dtype=np.int64)
        return Chunk(np.concatenate(scores), parts, np.repeat(self.weights[span], numbers))
