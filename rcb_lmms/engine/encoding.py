"""Images through the vision tower and the pruner, each once however many questions are asked about it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from rcb_lmms.engine.generation import out_of_memory
from rcb_lmms.engine.store import ByteStore
from rcb_lmms.families.base import Family, PackedImage
from rcb_lmms.pruners.base import Pruner, Selection, VisualTokens, check_needs

if TYPE_CHECKING:
    from rcb_lmms.families.images import Visual

logger = logging.getLogger(__name__)

STORE_BYTES = 4 << 30


class ImageEncoder:
    """Encodes and prunes images, remembering both by content.

    Args:
        family: the loaded model.
        needs: optional fields of `VisualTokens` to fill in.
        batch_size: images per vision-tower call; halved when memory runs out.
        store_bytes: bound on what is remembered.
    """

    def __init__(self, family: Family, needs: frozenset[str], batch_size: int = 8, store_bytes: int = STORE_BYTES):
        self.family, self.needs, self.batch_size = family, needs, batch_size
        self.encoded_images = 0
        self._views: ByteStore[list[VisualTokens]] = ByteStore(store_bytes)
        self._packed: ByteStore[PackedImage] = ByteStore(store_bytes)
        self._pruners: dict[int, Pruner] = {}  # kept alive, so that an id names one pruner for good

    def views(self, visuals: Sequence[Visual]) -> list[list[VisualTokens]]:
        """Views of opened images and videos; equal ones are encoded once."""
        found = {visual.key: self._views.get(visual.key) for visual in visuals}
        pending = list({visual.key: visual for visual in visuals if found[visual.key] is None}.values())
        while pending:
            batch, pending = pending[: self.batch_size], pending[self.batch_size :]
            for visual, views in zip(batch, self._encode(batch), strict=True):
                found[visual.key] = views
                self._views.put(visual.key, views, sum(map(_view_bytes, views)))
        return [found[visual.key] for visual in visuals]

    def _encode(self, visuals: list[Visual]) -> list[list[VisualTokens]]:
        try:
            encoded = self.family.encode(visuals, self.needs)
        except (RuntimeError, MemoryError) as error:
            if len(visuals) == 1 or not out_of_memory(error):
                raise
            self.batch_size = len(visuals) // 2
            return self._encode(visuals[: self.batch_size]) + self._encode(visuals[self.batch_size :])
        self.encoded_images += len(visuals)
        return encoded

    def packed(self, visuals: Sequence[Visual], pruner: Pruner) -> list[PackedImage]:
        """Pruned and packed images and videos; the pruner chooses once per visual."""
        name = id(self._pruners.setdefault(id(pruner), pruner))
        missing = [visual for visual in visuals if (name, visual.key) not in self._packed]
        fresh = {}
        for visual, views in zip(missing, self.views(missing), strict=True):
            if visual.key not in fresh:
                packed = fresh[visual.key] = self.family.pack_selected(views, select(pruner, views), visual)
                self._packed.put((name, visual.key), packed, packed.embeds.nbytes)
        return [
            fresh[visual.key] if visual.key in fresh else self._packed.get((name, visual.key)) for visual in visuals
        ]


def select(pruner: Pruner, views: Sequence[VisualTokens]) -> list[Selection]:
    """One `Selection` per view."""
    for view in views:
        check_needs(view, pruner)
    selections = [pruner.select(view) for view in views]
    if forced := sum(selection.forced for selection in selections):
        logger.warning(
            "%s under %s keeps too little of an image: min_keep adds %d tokens (min_keep=0 is the released behaviour)",
            pruner.name,
            pruner.budget,
            forced,
        )
    return selections


def _view_bytes(view: VisualTokens) -> int:
    values: list[Any] = [getattr(view, field.name) for field in fields(view)]
    return sum(value.nbytes for value in values if hasattr(value, "nbytes"))
