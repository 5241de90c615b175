"""EVS, efficient video sampling: what changed since the frame before stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rcb_lmms.errors import BudgetError
from rcb_lmms.pruners.base import Pruner, VisualTokens
from rcb_lmms.pruners.checks import check_budget

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class EVS(Pruner):
    """The first frame stays whole; of the others, the tokens least like the same place of the frame before.

    One ranking over the whole video, by one minus the cosine, ties to the earlier token.

    Released code:
        It follows the method as vLLM runs it. A share is cut, not rounded, and never goes below the first frame.

    Ours:
        A number of tokens below the first frame is refused. An image of one view stays whole.
    """

    name: ClassVar[str] = "evs"
    label: ClassVar[str] = "EVS"
    summary: ClassVar[str] = "what changed since the frame before"
    paper: ClassVar[str] = "NVIDIA (arXiv 2510.14624)"
    joins_views: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_budget(self, *self.budgets)

    def score(self, view: VisualTokens, question: str | None = None) -> Tensor:
        """One minus the cosine to the frame before, `(n,)` float32; 3 in the first frame, above all others."""
        import torch

        frames = view.features.float().unflatten(0, (view.frames, -1))
        scores = torch.full(frames.shape[:2], 3.0, device=frames.device)
        scores[1:] = 1 - torch.cosine_similarity(frames[1:], frames[:-1], dim=-1)
        return scores.flatten()

    def choosing_flops(self, view: VisualTokens, kept: int) -> int:
        """A cosine for every token behind the first frame."""
        return 2 * (view.features.numel() - view.features.numel() // view.frames)

    def count(self, view: VisualTokens, scores: Tensor | None = None) -> int:
        """Tokens of all frames together.

        Raises:
            BudgetError: a number of tokens below the first frame's.
        """
        first = len(view) // view.frames
        if self.budget.kind == "ratio":
            return max(first, int(len(view) * self.budget.value))
        count = self.budget.count(len(view))
        if count < first:
            raise BudgetError(
                wanted=f"{count} tokens of {view.frames} frames from evs",
                found=f"a first frame of {first} tokens, which stays whole",
                allowed=f"{first} to {len(view)} tokens",
                next_step="raise the budget, show more frames, or use vidcom2",
            )
        return count
