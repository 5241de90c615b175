"""What a pruner receives and returns. Nothing here, nor in any pruner, imports a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from rcb_lmms.budget import Budget
from rcb_lmms.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class VisualTokens:
    """One view (an image, a tile, or a pooled video frame) at the place where pruning happens.

    Attributes:
        features: `(n, d)` projector output, in the language model's embedding space, raster order.
        grid: `(h, w)` with `h * w == n`.
        encoder_features: `(n, c)` vision-tower output before the projector.
        keys: `(n, c)` attention keys of the tower's last block, heads concatenated, unscaled.
        cls_attention: `(n,)` attention of the CLS token to the patches in the last block, one head of width `c`.
        cls_similarity: `(n,)` cosine of each patch to the CLS token in the layer the projector reads.
        key: names the view by its content; seeds what is random, so that results ignore the order of a run.
        native: tokens of the view at its full size; `None` says that it was encoded at that.

    The optional tensors are filled only if the pruner names them in `needs`.
    """

    features: Tensor
    grid: tuple[int, int]
    encoder_features: Tensor | None = None
    keys: Tensor | None = None
    cls_attention: Tensor | None = None
    cls_similarity: Tensor | None = None
    key: str = ""
    native: int | None = None

    def __len__(self) -> int:
        return self.features.shape[0]


@dataclass(frozen=True)
class Selection:
    """What stays of one view.

    Attributes:
        kept: `(k,)` int64 indices into the view, ascending unless the method's option says otherwise.
        scores: `(n,)` float32 of every token, higher = keep.
        features: `(r, c)` rewritten tokens before the projector, in packing order, if the method rewrites
            tokens (PruMerge: `r = k + 1`, the last one is the residual token); otherwise `None`.
        forced: tokens that stay only because of `min_keep`.
    """

    kept: Tensor
    scores: Tensor
    features: Tensor | None = None
    forced: int = 0

    def __len__(self) -> int:
        """Visual tokens that reach the language model."""
        return len(self.kept if self.features is None else self.features)


@dataclass(frozen=True)
class Pruner(ABC):
    """A method and its hyper-parameters; holds no state, so one instance serves every image.

    Class attributes:
        name: registry key, CLI value and table row.
        needs: optional fields of `VisualTokens` the method reads.
        least: tokens that it leaves of a view at least.
        paper: where the method was published.
    """

    budget: Budget | None = None

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    least: ClassVar[int] = 1
    paper: ClassVar[str] = ""

    @property
    def sees_question(self) -> bool:
        """Whether the choice depends on the question; if not, an image's kept tokens serve all its questions."""
        return False

    @abstractmethod
    def select(self, view: VisualTokens) -> Selection:
        """Choose the tokens of one view that stay."""

    def count(self, view: VisualTokens) -> int:
        """Tokens that `select` leaves of a view; cheaper than `select` where a method also rewrites tokens."""
        return len(self.select(view))

    # A budget that is a mean over a benchmark is met by fitting the method to evidence from a vision-only pass.

    def evidence(self, view: VisualTokens) -> Tensor | None:
        """What `fit` needs of one view, `(e,)`; `None` if the method's counts are exact and nothing is fitted."""
        return None

    def retained(self, evidence: Any) -> int:
        """Tokens the fitted method retains of the view with this evidence, `min_keep` included."""
        return int(evidence[0])

    def fit(self, evidence: list[Any], weights: list[float], target: float) -> Pruner:
        """The same method with the parameter that makes the weighted mean of retained tokens per view `target`.

        Raises:
            UserError: no parameter reaches the target, or the method has none.
        """
        raise UserError(
            wanted=f"a mean budget of {target:g} tokens for {self.name}",
            found="a method whose count is exact for every view",
            allowed="methods with a threshold or a scale: rcb, prumerge",
            next_step=f"keep={target:g}",
        )


def check_needs(view: VisualTokens, pruner: Pruner) -> None:
    """Refuse a view that lacks what the pruner reads (a tower without CLS token, for one).

    Raises:
        UserError: naming the missing fields and the methods that do without.
    """
    missing = sorted(name for name in pruner.needs if getattr(view, name) is None)
    if missing:
        raise UserError(
            wanted=f"{pruner.name} pruning",
            found=f"visual tokens without {', '.join(missing)}",
            allowed="a vision tower with a CLS token (CLIP)",
            next_step="use rcb, fastv or random with this model",
        )
