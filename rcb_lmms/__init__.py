"""Visual token pruning for the LLaVA family, as a plugin of lmms-eval.

The names below are loaded on first use, so that `import rcb_lmms` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rcb_lmms.lazy import on_first_use

if TYPE_CHECKING:
    from rcb_lmms.budget import Budget
    from rcb_lmms.codebook import Codebook
    from rcb_lmms.engine.questions import Question
    from rcb_lmms.engine.session import Session
    from rcb_lmms.pruners import PRUNERS, make_pruner
    from rcb_lmms.pruners.base import Selection, VisualTokens

__all__ = ["PRUNERS", "Budget", "Codebook", "Question", "Selection", "Session", "VisualTokens", "make_pruner"]

__getattr__, __dir__ = on_first_use(
    globals(),
    {
        "PRUNERS": "rcb_lmms.pruners",
        "make_pruner": "rcb_lmms.pruners",
        "Selection": "rcb_lmms.pruners.base",
        "VisualTokens": "rcb_lmms.pruners.base",
        "Budget": "rcb_lmms.budget",
        "Codebook": "rcb_lmms.codebook",
        "Question": "rcb_lmms.engine.questions",
        "Session": "rcb_lmms.engine.session",
    },
)
