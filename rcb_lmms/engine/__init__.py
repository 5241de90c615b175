"""Running the language model: its parts load on first use, so that importing the package costs nothing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {"prune_at_layer": "rcb_lmms.engine.layer_pruning"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
