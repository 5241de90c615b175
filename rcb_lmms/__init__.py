"""Visual token pruning for the LLaVA family, as a plugin of lmms-eval.

The names below are loaded on first use, so that `import rcb_lmms` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rcb_lmms.budget import Budget
    from rcb_lmms.codebook import Codebook
    from rcb_lmms.pruners import PRUNERS, make_pruner
    from rcb_lmms.pruners.base import Selection, VisualTokens

__all__ = ["PRUNERS", "Budget", "Codebook", "Selection", "VisualTokens", "make_pruner"]

_HOMES = {
    "PRUNERS": "rcb_lmms.pruners",
    "make_pruner": "rcb_lmms.pruners",
    "Selection": "rcb_lmms.pruners.base",
    "VisualTokens": "rcb_lmms.pruners.base",
    "Budget": "rcb_lmms.budget",
    "Codebook": "rcb_lmms.codebook",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
