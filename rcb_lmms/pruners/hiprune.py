"""HiPrune: anchors and their neighbours by a middle block's attention, the rest by a deep one's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rcb_lmms.errors import BudgetError
from rcb_lmms.pruners.attention import largest
from rcb_lmms.pruners.base import Pruner, Selection, VisualTokens
from rcb_lmms.pruners.checks import check_budget, check_minimum


@dataclass(frozen=True)
class HiPrune(Pruner):
    """Anchors receive most attention in the object layer; they stay with the four tokens around them.

    The others that stay are those that receive most attention in the block whose output the projector reads.

    Released code:
        It follows Danielement321/HiPrune at 6e83a12: neighbours are flat indices, which wrap from one row into the
        next, and are clamped to the view; `round(count * alpha / 5)` anchors, half to even.

    Ours:
        There the grid is 24 x 24; here it is the view's.

    Attributes:
        alpha: share of the budget that anchors with four neighbours each would take.
    """

    alpha: float = 0.1

    name: ClassVar[str] = "hiprune"
    label: ClassVar[str] = "HiPrune"
    summary: ClassVar[str] = "by attention received in two blocks"
    paper: ClassVar[str] = "Liu et al., ACL 2026 (arXiv 2508.00553)"
    needs: ClassVar[frozenset[str]] = frozenset({"object_attention", "received_attention"})
    # Neighbours are found on the grid of one view.
    pools_views: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_budget(self, *self.budgets)
        check_minimum("hiprune's share of anchors", self.alpha, 0)

    def select(self, view: VisualTokens, question: str | None = None) -> Selection:
        """Scores are the deep block's attention, above 1 for anchors and their neighbours.

        Raises:
            BudgetError: more anchors and neighbours than the budget has tokens.
        """
        import torch

        count, width = self.count(view), view.grid[1]
        anchors = largest(view.object_attention.float(), round(count * self.alpha / 5))
        around = torch.tensor([0, -1, 1, -width, width], device=anchors.device)
        near = (anchors[:, None] + around).clamp(0, len(view) - 1).unique()
        if len(near) > count:
            raise BudgetError(
                wanted=f"{count} tokens of hiprune with alpha={self.alpha:g}",
                found=f"{len(near)} anchors and neighbours",
                allowed="a budget that holds them, or a smaller alpha",
                next_step=f"keep={len(near)}, or alpha=0.1",
            )
        scores = view.received_attention.float().clone()
        scores[near] += 2
        return Selection(largest(scores, count).sort().values, scores)
