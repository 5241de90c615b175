"""What methods share that rank patches by the attention of the vision tower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from rcb_lmms.pruners.base import Pruner, VisualTokens
from rcb_lmms.pruners.checks import check_budget, check_choice

if TYPE_CHECKING:
    from torch import Tensor

FIELDS = {"cls": "head_attention", "received": "received_attention"}


@dataclass(frozen=True)
class ByAttention(Pruner):
    """A method that reads attention in the block whose output the projector reads (block 22 of CLIP's 24).

    Attributes:
        attention: `cls` is the attention of the CLS token to the patches, mean over heads, as released. `received` is
            what a patch receives from all tokens on average, over heads and queries: the substitute for towers
            without a CLS token that the authors of VisPruner name; for the other methods it is our choice.
    """

    attention: str = "cls"

    needs: ClassVar[frozenset[str]] = frozenset({"head_attention"})
    elsewhere: ClassVar[Mapping[str, Any]] = {"attention": "received"}
    # The attention of a CLS token adds up to one in every view, so views cannot be compared by it.
    pools_views: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_budget(self, "tokens", "ratio")
        check_choice(f"{self.name}'s attention", self.attention, tuple(FIELDS))
        if self.attention == "received":
            needs = type(self).needs - {"head_attention", "cls_features"} | {"received_attention"}
            object.__setattr__(self, "needs", needs)

    def weights(self, view: VisualTokens) -> Tensor:
        """Attention to every patch, `(n,)` float32."""
        field = getattr(view, FIELDS[self.attention]).float()
        return field.mean(1) if self.attention == "cls" else field


def largest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores, best first, ties going to the lower index."""
    return scores.argsort(descending=True, stable=True)[:count]


def cosines(tokens: Tensor) -> Tensor:
    """Cosines of tokens `(n, d)` to each other, `(n, n)` float32."""
    from torch.nn.functional import normalize

    rows = normalize(tokens.float(), dim=1)
    return rows @ rows.T
