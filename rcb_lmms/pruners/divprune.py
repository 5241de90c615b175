"""DivPrune: the tokens that differ most from each other stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rcb_lmms.pruners.attention import cosines
from rcb_lmms.pruners.base import Pruner, Selection, VisualTokens
from rcb_lmms.pruners.checks import check_budget


@dataclass(frozen=True)
class DivPrune(Pruner):
    """Starts with the token farthest from its nearest neighbour, then adds the one farthest from all that stay.

    Distances are one minus the cosine, after the projector.

    Released code:
        It follows vbdi/divprune at 799e2d9. There, newlines are candidates, and a token that stays can be drawn again:
        where few tokens are distinct, some of them are fed twice.

    Ours:
        A token that stays is not drawn again. Newlines are no candidates.

    Attributes:
        preset: `official` feeds tokens in raster order; `paper` in the order of choice, under which the paper's numbers
            were made.
    """

    preset: str = "official"

    name: ClassVar[str] = "divprune"
    label: ClassVar[str] = "DivPrune"
    summary: ClassVar[str] = "tokens that differ from each other"
    paper: ClassVar[str] = "Alvar et al., CVPR 2025 (arXiv 2503.02175)"

    def __post_init__(self) -> None:
        check_budget(self, *self.budgets)

    @property
    def ascending(self) -> bool:
        """Whether tokens come in raster order."""
        return self.preset == "official"

    def select(self, view: VisualTokens, question: str | None = None) -> Selection:
        """A token's score is its distance to those that were there before it; the first one's is 2, the largest."""
        import torch

        distances = 1 - cosines(view.features)  # (n, n)
        # A token is its own nearest neighbour; the second nearest counts.
        alone = distances.kthvalue(min(2, len(view)), dim=0).values
        scores = torch.full_like(alone, 2)
        kept = torch.empty(self.count(view), dtype=torch.long, device=alone.device)
        stays = torch.zeros(len(view), dtype=torch.bool, device=alone.device)
        for step in range(len(kept)):
            best = (scores if step else alone).masked_fill(stays, -torch.inf).argmax()
            kept[step], stays[best] = best, True
            scores = torch.where(stays, scores, torch.minimum(scores, distances[best]))
        return Selection(kept.sort().values if self.ascending else kept, scores)

    def choosing_flops(self, view: VisualTokens, kept: int) -> int:
        """All tokens' cosines to each other."""
        return 2 * len(view) ** 2 * view.features.shape[1]
