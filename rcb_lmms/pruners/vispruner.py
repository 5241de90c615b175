"""VisPruner and FasterVLM: patches that the CLS token attends to, and patches that differ from each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rcb_lmms.errors import UserError
from rcb_lmms.pruners.attention import ByAttention, largest
from rcb_lmms.pruners.base import Selection, VisualTokens
from rcb_lmms.pruners.checks import check_minimum

if TYPE_CHECKING:
    from torch import Tensor

# Patches that go in one round of thinning.
ROUND = 8


@dataclass(frozen=True)
class VisPruner(ByAttention):
    """The share `important` of the budget goes to the largest attention, the rest to patches that differ.

    Patches that are not important stand in the order of attention and are split into every first and every second one;
    of the first, the eight most like one of the second go; what is left of the first, most alike foremost, and the
    second make the next round's order. Cosines are of patches before the projector.

    Released code:
        It is as released (Theia-4869/VisPruner at aefa01a), which fails where the patches of a round are odd in number,
        or where a round takes more than the first half.

    Ours:
        An odd number of patches is split with one more in the first half, and no round takes more than that half.

    Attributes:
        important: share of the budget, rounded down; 0.5 as released (its README takes 0.75 for MME at 64 tokens).
    """

    important: float = 0.5

    name: ClassVar[str] = "vispruner"
    label: ClassVar[str] = "VisPruner"
    summary: ClassVar[str] = "half by CLS attention, half diverse"
    paper: ClassVar[str] = "Zhang et al., ICCV 2025 (arXiv 2412.01818)"
    needs: ClassVar[frozenset[str]] = frozenset({"head_attention", "encoder_features"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_minimum("vispruner's share of important tokens", self.important, 0)
        if self.important > 1:
            raise UserError(
                wanted=f"important={self.important}",
                found="more than the whole budget",
                allowed="numbers from 0 to 1",
                next_step="important=0.5",
            )

    def select(self, view: VisualTokens, question: str | None = None) -> Selection:
        """Scores are the attention, which the diverse tokens do not follow."""
        import torch

        weights, count = self.weights(view), self.count(view)
        order = largest(weights, len(view))
        important = int(count * self.important)
        diverse = thinned(view.encoder_features, order[important:], count - important)
        return Selection(torch.cat([order[:important], diverse]).sort().values, weights)

    def choosing_flops(self, view: VisualTokens, kept: int) -> int:
        """Cosines of the two halves in every round."""
        important, products = int(kept * self.important), 0
        left, diverse = len(view) - important, kept - important
        while diverse and left > diverse:
            first = left - left // 2
            products += first * (left - first)
            left -= min(ROUND, left - diverse, first)
        return 2 * products * view.encoder_features.shape[1]


@dataclass(frozen=True)
class FasterVLM(ByAttention):
    """The patches of the largest attention stay; VisPruner's first version, and equal to it at `important=1`."""

    name: ClassVar[str] = "fastervlm"
    label: ClassVar[str] = "FasterVLM"
    summary: ClassVar[str] = "by CLS attention"
    paper: ClassVar[str] = "Zhang et al. (arXiv 2412.01818v1)"

    def score(self, view: VisualTokens, question: str | None = None) -> Tensor:
        """Attention to every patch, `(n,)`."""
        return self.weights(view)


def thinned(features: Tensor, residual: Tensor, count: int) -> Tensor:
    """`count` of the patches `residual`, indices of `features (n, c)`, after rounds that drop those most alike."""
    import torch
    from torch.nn.functional import normalize

    if not count:
        return residual[:0]
    rows = normalize(features.float(), dim=1)
    while len(residual) > count:
        first, second = residual[::2], residual[1::2]
        alike = (rows[first] @ rows[second].T).amax(dim=1)
        order = alike.argsort(descending=True, stable=True)
        residual = torch.cat([first[order[min(ROUND, len(residual) - count) :]], second])
    return residual
