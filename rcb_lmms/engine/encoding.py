"""Images through the vision tower and the pruner, each once however many questions are asked about it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from cachetools import LRUCache

from rcb_lmms.engine.clock import Clock
from rcb_lmms.engine.generation import out_of_memory
from rcb_lmms.engine.ledger import pack_kept
from rcb_lmms.errors import UserError
from rcb_lmms.families.base import Family
from rcb_lmms.families.clip import asked, reading_flops
from rcb_lmms.families.packed import PackedImage
from rcb_lmms.pruners.base import Pruner, Selection, VisualTokens
from rcb_lmms.pruners.views import choose_views

if TYPE_CHECKING:
    from rcb_lmms.families.images import Visual
    from rcb_lmms.families.sizes import Size

STORE_BYTES = 4 << 30


class ImageEncoder:
    """Encodes and prunes images and videos, remembering both by content.

    Args:
        family: the loaded model.
        needs: optional fields of `VisualTokens` to fill in.
        batch_size: images and video frames per call of the family; halved when memory runs out.
        store_bytes: bound on what is remembered.
        per: `view` or `image`: what the pruner's budget is spent on.

    Attributes:
        clock: seconds by stage of all that is done with it.
    """

    def __init__(
        self,
        family: Family,
        needs: frozenset[str],
        batch_size: int = 8,
        store_bytes: int = STORE_BYTES,
        per: str = "view",
    ):
        self.family, self.needs, self.batch_size, self.per = family, needs, batch_size, per
        self.encoded_images = 0
        self.clock = Clock(family.device)
        self._views: LRUCache[Hashable, list[VisualTokens]] = LRUCache(store_bytes, lambda views: _bytes_of(views))
        self._packed: LRUCache[Hashable, PackedImage] = LRUCache(store_bytes, lambda packed: packed.embeds.nbytes)
        self._pruners: dict[int, Pruner] = {}  # kept alive, so that an id names one pruner for good

    def add_needs(self, needs: frozenset[str]) -> None:
        """Fill in these fields from now on; what was encoded without them is forgotten."""
        if not needs <= self.needs:
            self.needs |= needs
            self._views.clear()

    def views(self, visuals: Sequence[Visual], pruner: Pruner | None = None) -> list[list[VisualTokens]]:
        """Views of opened images and videos, as small as `pruner` wants them; equal ones are encoded once.

        Raises:
            UserError: features that are not finite.
        """
        smaller = pruner if pruner is not None and pruner.stage == "pixels" else None
        found = {visual.key: self._views.get((smaller, visual.key)) for visual in visuals}
        pending = {visual.key: visual for visual in visuals if found[visual.key] is None}
        for batch in self.batches(pending.values()):
            before = self.family.pixel_seconds
            with self.clock.timed("tower"):
                encoded = self._encode(batch, self._size(smaller))
            self.clock.move(self.family.pixel_seconds - before, "tower", "open")
            for visual, views in zip(batch, encoded, strict=True):
                _check_finite(views)
                found[visual.key] = views
                _put(self._views, (smaller, visual.key), views)
        return [found[visual.key] for visual in visuals]

    def _size(self, smaller: Pruner | None) -> Size | None:
        if smaller is None:
            return None
        return smaller.grid if self.per == "image" else lambda native, views: smaller.grid(native)

    def batches(self, visuals: Iterable[Visual]) -> Iterator[list[Visual]]:
        """Runs of visuals with `batch_size` frames at most, an image having one; a longer video stands alone."""
        batch: list[Visual] = []
        for visual in visuals:
            if batch and sum(len(other.frames) for other in (*batch, visual)) > self.batch_size:
                yield batch
                batch = []
            batch.append(visual)
        if batch:
            yield batch

    def _encode(self, visuals: list[Visual], size: Size | None) -> list[list[VisualTokens]]:
        try:
            encoded = self.family.encode(visuals, self.needs, size)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if len(visuals) > 1:
                self.batch_size = max(1, sum(len(visual.frames) for visual in visuals) // 2)
                middle = len(visuals) // 2
                return self._encode(visuals[:middle], size) + self._encode(visuals[middle:], size)
            # One image of many tiles, or a video: the family takes them through its tower in smaller parts.
            if self.family.tower_batch == 1:
                raise
            self.family.tower_batch //= 2
            return self._encode(visuals, size)
        self.encoded_images += len(visuals)
        return encoded

    def choices(
        self, visuals: Sequence[Visual], pruner: Pruner, question: str | None = None
    ) -> tuple[list[list[VisualTokens]], list[list[Selection]]]:
        """Views of images and videos, and what the pruner keeps of each."""
        views = self.views(visuals, pruner)
        return views, [self._choose(own, pruner, question)[1] for own in views]

    def _choose(
        self, views: list[VisualTokens], pruner: Pruner, question: str | None
    ) -> tuple[list[VisualTokens], list[Selection]]:
        """Views with what the pruner reads of the question, and what it keeps of each."""
        with self.clock.timed("choose"):
            told = asked(self.family, views, pruner, question)
            return told, choose_views(pruner, told, self.per, question)

    def packed(self, visuals: Sequence[Visual], pruner: Pruner, question: str | None = None) -> list[PackedImage]:
        """Pruned and packed images and videos; the pruner chooses once per visual, or per visual and question."""
        name = id(self._pruners.setdefault(id(pruner), pruner))
        # What depends on the question is never found again under another one.
        read = question if pruner.sees_question and pruner.stage == "view" else None
        found = {visual.key: self._packed.get((name, read, visual.key)) for visual in visuals}
        missing = list({visual.key: visual for visual in visuals if found[visual.key] is None}.values())
        for visual, views in zip(missing, self.views(missing, pruner), strict=True):
            told, selections = self._choose(views, pruner, question)
            flops = sum(own.flops for own in selections) + reading_flops(self.family, told, pruner)
            with self.clock.timed("pack"):
                packed = replace(self.family.pack_selected(views, selections, visual), method_flops=flops)
                if any(len(own.kept) < len(own.scores) for own in selections):
                    kept = (pack_kept(own.kept.tolist(), len(own.scores)) for own in selections)
                    packed = replace(packed, kept=tuple(kept))
            found[visual.key] = packed
            _put(self._packed, (name, read, visual.key), packed)
        return [found[visual.key] for visual in visuals]


def _put(cache: LRUCache, key: Hashable, value: Any) -> None:
    """Remember a value, unless it alone exceeds the bound."""
    if cache.getsizeof(value) <= cache.maxsize:
        cache[key] = value


def _bytes_of(views: list[VisualTokens]) -> int:
    values = [getattr(view, field.name) for view in views for field in fields(view)]
    return sum(value.nbytes for value in values if hasattr(value, "nbytes"))


def _check_finite(views: list[VisualTokens]) -> None:
    if not all(bool(view.features.isfinite().all()) for view in views):
        raise UserError(
            wanted="visual tokens",
            found="features that are not finite numbers",
            allowed="finite features: others make an answer that means nothing",
            next_step="check the image, the weights, and dtype: float16 overflows where bfloat16 does not",
        )
