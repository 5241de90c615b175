"""PruMerge and PruMerge+: keep the patches that the CLS token attends to, and merge the others into them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from rcb_lmms.budget import Budget
from rcb_lmms.errors import UserError
from rcb_lmms.pruners.base import Pruner, Selection, VisualTokens
from rcb_lmms.pruners.checks import check_budget, check_choice, check_minimum, check_whole

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PruMerge(Pruner):
    """Centres are the outliers of CLS attention; every token lends them features; one residual token holds the rest.

    Merging happens before the projector. Budgets: `adaptive` (or none), as many centres as there are outliers; a count
    or a ratio, all but one of them centres and the last one the residual token.

    Released code:
        One wide head over the last block's keys, neighbours taken among all other tokens by cosine of their keys,
        attention weights added without normalisation, a residual token behind the centres: this is what runs here. The
        paper instead describes neighbours among the pruned tokens, a weighted average, and no residual token.

    Ours:
        All indices are those of 576 tokens, generalised to `n`. `scale` brings the method to a common budget.

    Attributes:
        scale: centres per outlier under the adaptive budget. 1 is official; others meet a mean (see `fit`), which is
            our reading of how the method was brought to a common budget.
        neighbours: tokens merged into a centre.
        order: of the centres. `ascending` by position; `official` by falling attention, as released.
    """

    scale: float = 1.0
    neighbours: int = 32
    order: str = "ascending"

    name: ClassVar[str] = "prumerge"
    label: ClassVar[str] = "PruMerge"
    summary: ClassVar[str] = "by CLS attention, image by image"
    budgets: ClassVar[tuple[str, ...]] = ("adaptive", "tokens", "ratio")
    fits_mean: ClassVar[bool] = True
    # The attention of a CLS token adds up to one in every view, so views cannot be compared by it.
    pools_views: ClassVar[bool] = False
    rewrites: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"encoder_features", "keys", "cls_attention"})
    least: ClassVar[int] = 2
    paper: ClassVar[str] = "Shang et al., LLaVA-PruMerge (arXiv 2403.15388)"

    def __post_init__(self) -> None:
        check_budget(self, *self.budgets, None)
        check_minimum(f"{self.name}'s centres per outlier", self.scale, 0)
        check_whole(f"{self.name}'s neighbours per centre", self.neighbours, 1)
        check_choice(f"{self.name}'s order of tokens", self.order, ("ascending", "official"))

    @property
    def ascending(self) -> bool:
        """Whether centres come in raster order; the released code feeds them by falling attention."""
        return self.order == "ascending"

    def select(self, view: VisualTokens, question: str | None = None) -> Selection:
        """Centres in `kept`, attention in `scores`, and `(k + 1, c)` merged features, the residual token last.

        Raises:
            UserError: a count that leaves no room for a centre and the residual token.
        """
        attention = view.cls_attention.float()
        centres = self._centres(attention)
        if self.order == "ascending":
            centres = centres.sort().values
        return Selection(centres, attention, features=merge(view, centres, self.neighbours))

    def choosing_flops(self, view: VisualTokens, kept: int) -> int:
        """Cosines of the centres' keys to all, the merging, and the residual token."""
        return 2 * (2 * (kept - 1) + 1) * view.encoder_features.numel()

    def count(self, view: VisualTokens, scores: Tensor | None = None) -> int:
        """Centres and the residual token, without merging anything."""
        return self._count(count_outliers(view.cls_attention), len(view)) + 1

    def evidence(self, view: VisualTokens) -> Tensor | None:
        """The view's outliers and its native tokens, `(2,)` float32."""
        import torch

        return torch.tensor([count_outliers(view.cls_attention), len(view)], dtype=torch.float32)

    def retained(self, evidence: Any) -> int:
        """Tokens that `select` leaves of a view with this evidence, the residual token included."""
        return self._count(*(int(number) for number in evidence)) + 1

    def fit(self, evidence: list[Any], weights: list[float], target: float) -> PruMerge:
        """The `scale` at which the weighted mean of retained tokens per view, residual included, is nearest `target`.

        A view's count steps by one where `scale * outliers` passes a half; between two steps nothing changes, so the
        search runs over the steps, and is exact.

        Raises:
            UserError: a target below 2 tokens, or above what every view gives at any scale.
        """
        import numpy as np

        pairs = np.stack([np.asarray(view, dtype=np.int64) for view in evidence])
        (kinds, member), shares = np.unique(pairs, axis=0, return_inverse=True), np.asarray(weights, dtype=np.float64)
        shares = np.bincount(member.ravel(), shares / shares.sum())
        outliers, native = kinds.T
        # A step of c * k is an odd number of halves: c = (2j + 1) / 2k; rounding unites equal fractions of unequal k.
        steps = [(2 * np.arange(n) + 1) / (2 * k) for k, n in kinds if k > 0]
        steps = np.unique(np.round(np.concatenate([[0.0], *steps]), 12))
        scales = np.append((steps[:-1] + steps[1:]) / 2, steps[-1] + 1)

        def mean(scale: float) -> float:
            return float(shares @ (np.clip(np.rint(scale * outliers), 1, native - 1) + 1))

        if not mean(scales[0]) - 1e-9 <= target <= mean(scales[-1]) + 1e-9:
            raise UserError(
                wanted=f"a mean of {target:g} retained tokens per view from {self.name}",
                found=f"means from {mean(scales[0]):g} (one centre and the residual token) to {mean(scales[-1]):g}",
                allowed="a mean between the two",
                next_step="choose a budget in that range",
            )
        low, high = 0, len(scales) - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if mean(scales[middle]) <= target else (low, middle)
        best = min((low, high), key=lambda step: abs(mean(scales[step]) - target))
        return replace(self, budget=Budget.adaptive(), scale=float(scales[best]))

    def _fixed(self, native: int) -> int | None:
        """Centres that the budget asks for; `None` if the method decides."""
        if self.budget is None or self.budget.kind == "adaptive":
            return None
        count = self.budget.count(native)
        if count < 2:
            raise UserError(
                wanted=f"{count} token per view from {self.name}",
                found="a method that needs one centre and one residual token",
                allowed=f"2 to {native} tokens per view",
                next_step="keep=2",
            )
        return count - 1

    def _count(self, outliers: int, native: int) -> int:
        """Centres: what the budget asks for, or as many as outliers, at least one, leaving one for the residual."""
        return self._fixed(native) or max(1, min(native - 1, round(self.scale * outliers)))

    def _centres(self, attention: Tensor) -> Tensor:
        """Centres in the official order, `(k,)` int64."""
        count = self._count(count_outliers(attention), len(attention))
        return attention.argsort(descending=True, stable=True)[:count]


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge with centres on a uniform grid beside the outliers.

    The grid brings in what attention overlooks. A fixed count takes the outliers first, then tokens spread evenly over
    those that are left.

    Released code:
        Adaptive: the grid starts at token 0 and steps by a third of the inverse outlier share. That crashes without
        outliers and beyond a third of them.

    Ours:
        There is always one centre and a step of at least one. The fixed count is ours as well: the released rule gives
        no exact count.
    """

    name: ClassVar[str] = "prumerge_plus"
    label: ClassVar[str] = "PruMerge+"
    summary: ClassVar[str] = "by CLS attention and a grid"
    fits_mean: ClassVar[bool] = False

    def count(self, view: VisualTokens, scores: Tensor | None = None) -> int:
        """Centres, those of the grid included, and the residual token, without merging anything."""
        return len(self._centres(view.cls_attention.float())) + 1

    def evidence(self, view: VisualTokens) -> None:
        """Nothing: a mean budget is met by a count."""
        return None

    def retained(self, evidence: Any) -> int:
        """The count of a fixed budget; else the evidence, a count that was measured."""
        fixed = self.budget is not None and self.budget.kind == "tokens"
        return int(self.budget.value if fixed else evidence[0])

    def fit(self, evidence: list[Any], weights: list[float], target: float) -> PruMergePlus:
        """The same method at a fixed count, `target` rounded: its grid has no scale that moves in small steps."""
        return replace(self, budget=Budget.tokens(round(target)))

    def _centres(self, attention: Tensor) -> Tensor:
        import torch

        native = len(attention)
        fixed = self._fixed(native)
        outliers = max(1, min(fixed or native - 1, round(self.scale * count_outliers(attention))))
        ranked = attention.argsort(descending=True, stable=True)[:outliers]
        free = torch.ones(native, dtype=torch.bool, device=attention.device)
        free[ranked] = False
        if fixed is None:
            stride = max(1, int(int(1 / (outliers / native)) / 3))
            grid = torch.arange(0, native - 1, stride, device=attention.device)
            grid = grid[free[grid]][: native - 1 - outliers]
        else:
            wanted, rest = fixed - outliers, free.nonzero().squeeze(1)
            grid = rest[torch.arange(wanted, device=rest.device) * len(rest) // max(1, wanted)]
        return torch.cat([ranked, grid])


def count_outliers(attention: Tensor) -> int:
    """Tokens above the upper fence of a box plot, Q3 + 1.5 (Q3 - Q1), with numpy's linear percentiles in float32."""
    import numpy as np

    values = attention.float().cpu().numpy()
    lower, upper = np.percentile(values, [25, 75])
    return int((values > upper + 1.5 * (upper - lower)).sum())


def merge(view: VisualTokens, centres: Tensor, neighbours: int) -> Tensor:
    """Merged encoder features `(k + 1, c)`: each centre plus its neighbours, weighted by attention; the residual last.

    A centre's neighbours are the tokens, other centres included, whose keys have the largest cosine to its own; ties
    go to the lower index. The residual token is the attention-weighted sum of all tokens that are no centres.
    """
    import torch
    from torch.nn.functional import normalize

    features, attention = view.encoder_features.float(), view.cls_attention.float()
    keys = normalize(view.keys.float(), dim=1)
    likeness = keys[centres] @ keys.T  # (k, n)
    likeness.scatter_(1, centres[:, None], -torch.inf)
    nearest = likeness.argsort(dim=1, descending=True, stable=True)[:, : min(neighbours, len(view) - 1)]
    weights = torch.zeros_like(likeness).scatter_(1, nearest, attention[nearest])
    pruned = attention.clone()
    pruned[centres] = 0
    merged = torch.cat([features[centres] + weights @ features, (pruned @ features)[None]])
    return merged.to(view.encoder_features.dtype)


def cls_attention_from(queries_cls: Tensor, keys: Tensor) -> Tensor:
    """Attention of the CLS token to the patches, `(n,)` float32, the heads taken as one of width `c`.

    Args:
        queries_cls: `(c,)` query of the CLS token in the tower's last block, before head splitting and scaling.
        keys: `(n + 1, c)` keys of the same block, the CLS token's first; it takes part in the softmax, so that the
            result sums to less than 1.
    """
    logits = keys.float() @ queries_cls.float() / keys.shape[1] ** 0.5
    return logits.softmax(dim=0)[1:]
