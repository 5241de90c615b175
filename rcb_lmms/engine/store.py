"""What was encoded is not encoded again: a least-recently-used store bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class ByteStore(Generic[Value]):
    """A dictionary that forgets its least recently used values once they exceed `limit_bytes`."""

    def __init__(self, limit_bytes: int):
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()

    def get(self, key: Hashable) -> Value | None:
        """The value under `key`, now the most recently used; `None` if absent."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def put(self, key: Hashable, value: Value, size_bytes: int) -> None:
        """Keep `value`; values larger than the whole store are not kept."""
        if size_bytes > self.limit_bytes:
            return
        if key in self._values:
            self.used_bytes -= self._values.pop(key)[1]
        self._values[key] = (value, size_bytes)
        self.used_bytes += size_bytes
        while self.used_bytes > self.limit_bytes:
            _, (_, freed_bytes) = self._values.popitem(last=False)
            self.used_bytes -= freed_bytes

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)
