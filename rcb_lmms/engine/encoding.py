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
    from PIL.Image import Image

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

    def views(self, images: Sequence[Image], keys: Sequence[str]) -> list[list[VisualTokens]]:
        """Views of opened images; equal `keys` mean equal images."""
        found = {key: self._views.get(key) for key in keys}
        missing = {key: image for key, image in zip(keys, images, strict=True) if found[key] is None}
        pending = list(missing.items())
        while pending:
            batch, pending = pending[: self.batch_size], pending[self.batch_size :]
            for (key, _), views in zip(batch, self._encode([image for _, image in batch]), strict=True):
                found[key] = views
                self._views.put(key, views, sum(map(_view_bytes, views)))
        return [found[key] for key in keys]

    def _encode(self, images: list[Image]) -> list[list[VisualTokens]]:
        try:
            encoded = self.family.encode(images, self.needs)
        except (RuntimeError, MemoryError) as error:
            if len(images) == 1 or not out_of_memory(error):
                raise
            self.batch_size = len(images) // 2
            return self._encode(images[: self.batch_size]) + self._encode(images[self.batch_size :])
        self.encoded_images += len(images)
        return encoded

    def packed(self, images: Sequence[Image], keys: Sequence[str], pruner: Pruner) -> list[PackedImage]:
        """Pruned and packed images; the pruner chooses once per image."""
        name = id(self._pruners.setdefault(id(pruner), pruner))
        missing = {key: image for key, image in zip(keys, images, strict=True) if (name, key) not in self._packed}
        fresh = {}
        for key, views in zip(missing, self.views(list(missing.values()), list(missing)), strict=True):
            packed = fresh[key] = self.family.pack_selected(views, select(pruner, views))
            self._packed.put((name, key), packed, packed.embeds.nbytes)
        return [fresh[key] if key in fresh else self._packed.get((name, key)) for key in keys]


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
