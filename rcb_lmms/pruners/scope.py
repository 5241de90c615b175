"""SCOPE: tokens that cover the others, weighted by attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rcb_lmms.pruners.attention import ByAttention, cosines
from rcb_lmms.pruners.base import Selection, VisualTokens
from rcb_lmms.pruners.checks import check_minimum


@dataclass(frozen=True)
class Scope(ByAttention):
    """Adds, one by one, the token whose gain in coverage times its attention is the largest.

    A token is covered as far as its largest cosine to one that stays, before the projector; a candidate's gain is what
    it adds over all tokens.

    Released code:
        It follows kinredon/SCOPE at 6bf7306. There, attention is summed over heads instead of averaged, which changes
        no choice.

    Ours:
        Sums run in float32: over all tokens they tie in float16.

    Attributes:
        alpha: power of the attention; 1 as released.
    """

    alpha: float = 1.0

    name: ClassVar[str] = "scope"
    label: ClassVar[str] = "SCOPE"
    summary: ClassVar[str] = "coverage, weighted by CLS attention"
    paper: ClassVar[str] = "Deng et al., NeurIPS 2025 (arXiv 2510.24214)"
    needs: ClassVar[frozenset[str]] = frozenset({"head_attention", "encoder_features"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_minimum("scope's power of the attention", self.alpha, 0)

    def select(self, view: VisualTokens, question: str | None = None) -> Selection:
        """A token's score is its weighted gain when it was chosen or, if it was not, at the end."""
        import torch

        alike, weights = cosines(view.encoder_features), self.weights(view) ** self.alpha
        covered = torch.zeros(len(view), device=alike.device)
        stays = torch.zeros(len(view), dtype=torch.bool, device=alike.device)
        scores = torch.zeros(len(view), device=alike.device)
        for _ in range(self.count(view)):
            gains = (alike - covered[:, None]).clamp(min=0).sum(0) * weights
            best = gains.masked_fill(stays, -torch.inf).argmax()
            scores = torch.where(stays, scores, gains)
            stays[best] = True
            covered = torch.maximum(covered, alike[best])
        return Selection(stays.nonzero().squeeze(1), scores)

    def choosing_flops(self, view: VisualTokens, kept: int) -> int:
        """All tokens' cosines to each other and, the gains for every token that stays: a difference, a bound, a sum."""
        return len(view) ** 2 * (2 * view.encoder_features.shape[1] + 3 * kept)
