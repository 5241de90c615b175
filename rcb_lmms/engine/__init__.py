"""Running the language model: session, generation, prefix reuse, schedules of layers."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """`prune_at_layer` and `prune_in_layers`, on first use: they need torch."""
    if name in ("prune_at_layer", "prune_in_layers"):
        from rcb_lmms.engine import layer_pruning

        return getattr(layer_pruning, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
