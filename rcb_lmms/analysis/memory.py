"""Peak memory of a computation: the allocator's on a GPU, the bytes of all tensors alive elsewhere."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside a `with` block, while they are alive.

    What an operation allocates and frees within itself is not seen, nor are tensors that were there before.

    Attributes:
        peak: most bytes alive at once.
        largest: elements of the largest tensor made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.largest = self._alive = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note what it made."""
        inputs = {_storage(own)._cdata for own in tree_iter((args, kwargs)) if isinstance(own, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for own in tree_iter(result):
            if isinstance(own, torch.Tensor) and _storage(own)._cdata not in inputs:
                self.largest = max(self.largest, own.numel())
                self._note(_storage(own))
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._alive += size
        self.peak = max(self.peak, self._alive)
        self._known[key] = weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._alive -= size
        del self._known[key]


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


@contextlib.contextmanager
def peak_bytes(device: torch.device) -> Iterator[list[int]]:
    """Inside a `with` block, bytes at the peak above what was there before; the list is filled at its end."""
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.append(torch.cuda.max_memory_allocated(device) - before)
        return
    with LiveBytes() as live:
        yield found
    found.append(live.peak)
