"""Visual token pruning for the LLaVA family, as a plugin of lmms-eval.

The names below are loaded on first use (PEP 562), so that `import rcb_lmms` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rcb_lmms.budget import Budget
    from rcb_lmms.codebook import Codebook
    from rcb_lmms.engine.questions import Question
    from rcb_lmms.engine.session import Session
    from rcb_lmms.pruners import PRUNERS, make_pruner
    from rcb_lmms.pruners.base import Selection, VisualTokens

__all__ = ["PRUNERS", "Budget", "Codebook", "Question", "Selection", "Session", "VisualTokens", "make_pruner"]

_HOMES = {
    "PRUNERS": "pruners",
    "make_pruner": "pruners",
    "Selection": "pruners.base",
    "VisualTokens": "pruners.base",
    "Budget": "budget",
    "Codebook": "codebook",
    "Question": "engine.questions",
    "Session": "engine.session",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
