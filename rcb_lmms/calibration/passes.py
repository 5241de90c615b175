"""One vision-only pass over documents: each image once, whatever the number of questions, processes or budgets.

Batches depend on the documents alone: distinct images in the order of their first appearance, cut after a fixed number.
So one process or many, in one go or resumed, compute the same scores.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np

from rcb_lmms.calibration.documents import Documents, Opened, shown
from rcb_lmms.calibration.scores import ImageScores, Medium, Scores, Store
from rcb_lmms.engine.processes import gather, rank_and_size
from rcb_lmms.engine.questions import READERS, ahead
from rcb_lmms.errors import BudgetError, UserError
from rcb_lmms.families.images import Visual, whole_images_only
from rcb_lmms.pruners.views import joined
from rcb_lmms.resources import cache_dir, sources_hash

if TYPE_CHECKING:
    from rcb_lmms.engine.encoding import ImageEncoder
    from rcb_lmms.pruners.base import Pruner, VisualTokens

BATCH_FRAMES = 8
PROBES = 8  # documents that are opened again before what is known of all of them is believed


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
    key = {
        "code": sources_hash(),
        "task": documents.name,
        "data": gather(documents.data)[0],
        "frames": BATCH_FRAMES,
        **encoding(encoder),
        "pruner": traits(pruner),
        "baselines": {name: traits(own) for name, own in sorted(baselines.items())},
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    store = Store(cache_dir() / "calibration" / name)
    with whole_images_only():
        return _Pass(encoder, documents, store, pruner, baselines).run(reread)


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
        self, encoder: ImageEncoder, documents: Documents, store: Store, pruner: Pruner, baselines: Mapping[str, Pruner]
    ):
        self.encoder, self.documents, self.store = encoder, documents, store
        self.pruner, self.baselines = pruner, baselines
        self.rank, self.size = rank_and_size()
        self.listed: dict[int, list[Medium]] = {}
        self.errors: dict[int, str] = {}

    def run(self, reread: bool) -> Scores:
        noted = gather(self.store.documents())[0]
        if not reread and self._stillshown(noted):
            self.listed |= noted
        if self.size > 1:
            self._list_share()
        found, scored = self._encode()
        if self.rank == 0 and noted != noted | self.listed:
            self.store.keep_documents(noted | self.listed)
        return self._result(found, reused=not any(gather(scored)))

    def _stillshown(self, noted: Mapping[int, list[Medium]]) -> bool:
        """Whether a few documents show what an earlier pass saw in them: a task's code may be another now."""
        few = self.documents.numbers[:: max(1, len(self.documents) // PROBES)]
        opened = [self._open(number) for number in few if number in noted]
        return all(visuals is not None and _media_of(visuals) == noted[number] for number, visuals, _ in opened)

    def _list_share(self) -> None:
        """Open this process's share of the documents, and learn from the others what theirs show."""
        share = self.documents.numbers[self.rank :: self.size]
        unknown = [number for number in share if number not in self.listed]
        for opened in shown(ahead(self._open, unknown, READERS), unknown, f"reading {self.documents.name}"):
            self._note(*opened)
        for listed, errors in gather((self.listed, self.errors)):
            self.listed |= listed
            self.errors |= errors

    def _encode(self) -> tuple[list[ImageScores], int]:
        """The scores of all batches in their order, and how many this process had to compute."""
        mine: dict[int, list[ImageScores]] = {}
        pending = []

        def unscored() -> Iterator[list[tuple[str, int, Visual | None]]]:
            for index, batch in enumerate(self._batches()):
                if index % self.size != self.rank:
                    continue
                known = self.store.batch(_digest(key for key, _, _ in batch))
                if known is None or any(image.error for image in known):  # what failed is tried again
                    pending.append(index)
                    yield batch
                else:
                    mine[index] = known

        scored = 0
        for batch in ahead(self._complete, unscored(), READERS if self.size > 1 else 0):
            images = mine[pending[scored]] = self._score(batch)
            self.store.keep_batch(_digest(visual.key for visual in batch), images)
            scored += 1
        every = {index: images for own in gather(mine) for index, images in own.items()}
        return [image for index in sorted(every) for image in every[index]], scored

    def _result(self, images: list[ImageScores], reused: bool) -> Scores:
        """The scores of what readable documents show, weighted by how often they do."""
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
        for number, visuals, error in shown(ahead(look, numbers, READERS), numbers, self.documents.name):
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
        self.listed[number] = _media_of(visuals)

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


def _media_of(visuals: Sequence[Visual]) -> list[Medium]:
    return [(visual.key, len(visual.frames)) for visual in visuals]


def _digest(keys: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(keys).encode()).hexdigest()[:24]
