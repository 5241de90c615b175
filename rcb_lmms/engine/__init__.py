"""Running the language model: its parts load on first use, so that importing the package costs nothing."""

from __future__ import annotations

from rcb_lmms.lazy import on_first_use

__getattr__, __dir__ = on_first_use(
    globals(), dict.fromkeys(("prune_at_layer", "prune_in_layers"), "rcb_lmms.engine.layer_pruning")
)
