"""Documents of a split by number, whose images are decoded once however many of them hold one."""

from __future__ import annotations

import hashlib
import pickle
import threading
from collections.abc import Callable
from functools import cached_property
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from cachetools import LRUCache, cached

if TYPE_CHECKING:
    from PIL.Image import Image

Stored = dict[str, Any]  # `bytes`, or the `path` of a file
Decoder = Callable[[Stored], "Image"]

# Pixels that are remembered: some 280 images of 640 x 480.
DECODED_BYTES = 256 << 20


class Rows:
    """Documents as their data set gives them, each read when it is asked for.

    POPE stores each image eighteen times, and a fitted budget reads every document once more. An image that a column
    holds, alone or in a list, is decoded once for all documents that store the same bytes, and each gets a copy of its
    own, since a task may change it. Threads may share this.

    Args:
        dataset: of `datasets`, or any sequence, whose items are given as they are.
        decoded: `decoded_once()` of several, which then share its bound.
    """

    def __init__(self, dataset: Any, decoded: Decoder | None = None):
        self.dataset, self._decoded = dataset, decoded or decoded_once()

    def __getitem__(self, number: int) -> Any:
        if not self._images:
            return self.dataset[number]
        (row,) = self._arrow[number].to_pylist()
        for name in self._images:
            value = row[name]
            row[name] = list(map(self._image, value)) if isinstance(value, list) else self._image(value)
        return self._others.decode_example(row)

    @property
    def fingerprint(self) -> str | None:
        """Names the data, where it has a name that changes with its content."""
        return getattr(self.dataset, "_fingerprint", None)

    def stored_images(self, number: int) -> str | None:
        """Names a document's images as they are stored, undecoded; `None` if it has none."""
        if not self._images:
            return None
        return hashlib.sha256(pickle.dumps(self._only_images[number].to_pylist())).hexdigest()

    @cached_property
    def _images(self) -> list[str]:
        """Columns that hold an image or a list of images; none of a data set that has another format than Python's."""
        from datasets import Image, List

        features = getattr(self.dataset, "features", None)
        if not features or self.dataset.format["type"] is not None:
            return []
        inner = {name: own.feature if isinstance(own, List) else own for name, own in features.items()}
        return [name for name, own in inner.items() if isinstance(own, Image) and own.decode]

    @cached_property
    def _arrow(self) -> Any:
        return self.dataset.with_format("arrow")

    @cached_property
    def _only_images(self) -> Any:
        return self._arrow.select_columns(self._images)

    @cached_property
    def _others(self) -> Any:
        """How to decode the columns that hold no image."""
        from datasets import Features, Value

        features = self.dataset.features
        return Features({name: Value("null") if name in self._images else own for name, own in features.items()})

    def _image(self, stored: Stored | None) -> Image | None:
        if stored is None:
            return None
        # A file may change.
        return _decode(stored) if stored["bytes"] is None else self._decoded(stored).copy()


def decoded_once() -> Decoder:
    """How to make an image of stored bytes; it remembers the latest, and threads that want one at once wait for it."""
    return cached(LRUCache(DECODED_BYTES, _bytes_of), itemgetter("bytes"), condition=threading.Condition())(_decode)


def _decode(stored: Stored) -> Image:
    from datasets import Image

    return Image().decode_example(stored)


def _bytes_of(image: Image) -> int:
    return image.width * image.height * len(image.getbands())
