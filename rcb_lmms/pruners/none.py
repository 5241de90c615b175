"""The unpruned model, through the same path as every method: the row that others are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rcb_lmms.pruners.base import Pruner, Selection, VisualTokens
from rcb_lmms.pruners.checks import check_budget


@dataclass(frozen=True)
class NoPruning(Pruner):
    """Keeps every token; a budget is refused, since it would be ignored."""

    name: ClassVar[str] = "none"
    label: ClassVar[str] = "unpruned"
    summary: ClassVar[str] = "unpruned"
    budgets: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_budget(self, None)

    def select(self, view: VisualTokens, question: str | None = None) -> Selection:
        """Every index, every score 0."""
        return keep_all(view)


def keep_all(view: VisualTokens) -> Selection:
    """The selection that changes nothing."""
    import torch

    device = view.features.device
    return Selection(torch.arange(len(view), device=device), torch.zeros(len(view), device=device))
