"""Evenly spaced tokens: what a budget gives without looking at the image, and without luck."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rcb_lmms.pruners.base import Pruner, Selection, VisualTokens
from rcb_lmms.pruners.checks import check_budget


@dataclass(frozen=True)
class Stride(Pruner):
    """A fixed number of tokens per view at equal distances in raster order: the middles of `k` equal parts.

    Of `n` tokens those at `floor((i + 1/2) n / k)` stay, `i` from 0 to `k - 1`, in whole numbers throughout. Where `n /
    k` divides the width of the grid, they are whole columns (a quarter of 24 x 24 tokens: every fourth column);
    otherwise they drift across it. It is a control of ours.
    """

    name: ClassVar[str] = "stride"
    label: ClassVar[str] = "Stride"
    summary: ClassVar[str] = "evenly spaced"
    pools_views: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_budget(self, "tokens", "ratio")

    def select(self, view: VisualTokens, question: str | None = None) -> Selection:
        """Scores are 1 for the tokens that stay and 0 for the others."""
        import torch

        count = self.budget.count(len(view))
        kept = (2 * torch.arange(count, device=view.features.device) + 1) * len(view) // (2 * count)
        scores = torch.zeros(len(view), device=view.features.device)
        scores[kept] = 1
        return Selection(kept, scores)
