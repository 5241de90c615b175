"""The redundancy codebook: drop every visual token that resembles a prototype of redundancy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rcb_lmms.budget import Budget
from rcb_lmms.codebook.artefact import Codebook, unit_rows
from rcb_lmms.errors import BudgetError, UserError
from rcb_lmms.pruners.base import Pruner, Selection, VisualTokens
from rcb_lmms.pruners.checks import check_budget, check_choice, check_whole

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


# The least that a redundancy can be, a cosine or a product of shares.
ALWAYS = -1.0
TILE = 1 << 22  # similarities in memory at a time: 16 MiB in float32


@dataclass(frozen=True)
class RCB(Pruner):
    """Keeps the tokens whose redundancy, a similarity to the codebook's prototypes, is low.

    A prototype is a visual token that the language model neither recognises on its own nor misses in its image (`rcb
    codebook build` finds them). A token's redundancy is its largest cosine to any prototype, behind the projector. What
    lies below a threshold stays, so that images keep different numbers of tokens; the threshold is calibrated on a
    benchmark until the mean meets the budget.

    Released code:
        `preset=official` is the released rule (redundancy < threshold, scores in the tower's float16), `preset=paper`
        that of Algorithm 2 (redundancy <= threshold). For LLaVA-OneVision the released code scores by
        `variant=double_softmax` and keeps exact counts, which the paper does not mention.

    Ours:
        Scores are float32. The threshold is the one whose mean is nearest to the budget, tokens that tie at it are told
        apart by position (`ties`), and one token of an image stays whatever it is (`min_keep`).

    Attributes:
        codebook: a `Codebook`, or the path or id of one.
        preset: `official` keeps redundancy < threshold, as the released code; `paper` and `paper_literal` keep
            redundancy <= threshold (Algorithm 2), unless the budget was calibrated: its `ties` then decide.
        variant: `max_cosine`, the largest cosine to a prototype (the paper); `double_softmax`, which the released code
            prefers for LLaVA-OneVision and the paper does not mention: the largest product of the softmax over tokens
            and the softmax over prototypes of the same cosines.
        min_keep: tokens that stay whatever the threshold. The released code has no such floor, which is 0 here.
        score_dtype: precision of the scores. Official: the vision tower's float16, in which many tokens tie.
        tie_mode: `double_softmax` with a count or a ratio only. `exact` meets the count, ties by position; `official`
            keeps the tokens strictly below the first one to go, so that ties at the cut are dropped with it.
    """

    codebook: Codebook | str | Path | None = None
    preset: str = "official"
    variant: str = "max_cosine"
    min_keep: int = 1
    score_dtype: str = "float32"
    tie_mode: str = "exact"

    name: ClassVar[str] = "rcb"
    label: ClassVar[str] = "RCB"
    summary: ClassVar[str] = "by the codebook, image by image"
    budgets: ClassVar[tuple[str, ...]] = ("threshold", "tokens", "ratio")
    official_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {"llava_onevision": {"variant": "double_softmax"}}
    paper: ClassVar[str] = "Beyond Intermediate States (arXiv 2503.20540), Algorithm 2"

    def __post_init__(self) -> None:
        check_budget(self, *self.budgets, None)
        check_choice("an rcb variant", self.variant, ("max_cosine", "double_softmax"))
        check_choice("a score dtype", self.score_dtype, ("float32", "float16", "bfloat16"))
        check_choice("a tie mode", self.tie_mode, ("exact", "official"))
        check_whole("a least number of retained tokens", self.min_keep, 0)
        if self.budget is not None and self.budget.kind == "tokens":
            self._check_floor(int(self.budget.value))
        if self.codebook is None:
            raise UserError(
                wanted="a redundancy codebook",
                found="none",
                allowed="a .safetensors file, the id of a codebook, or a Codebook",
                next_step="codebook=PATH; `rcb codebook build` makes one for your model",
            )
        if isinstance(self.codebook, (str, Path)):
            object.__setattr__(self, "codebook", Codebook.load(self.codebook))

    @property
    def fits_mean(self) -> bool:
        """Whether a threshold decides; the softmax of the other variant has counts alone."""
        return self.variant == "max_cosine"

    @property
    def least(self) -> int:
        """Tokens that stay of a view whatever the threshold."""
        return self.min_keep

    def score(self, view: VisualTokens, question: str | None = None) -> Tensor:
        """Score every token by minus its redundancy, `(n,)` float32."""
        return -self.redundancy(view)

    def count(self, view: VisualTokens, scores: Tensor | None = None) -> int:
        """Count the tokens that the budget and `min_keep` leave: every rule keeps a beginning of the order of scores.

        Raises:
            UserError: no budget.
        """
        check_budget(self, *self.budgets)
        return self.retained(self.redundancy(view) if scores is None else -scores)

    def select(self, view: VisualTokens, question: str | None = None) -> Selection:
        """The least redundant tokens in raster order; scores are minus the redundancy.

        Raises:
            UserError: no budget, a budget above the view, or a codebook of another width.
        """
        chosen = super().select(view)
        return replace(chosen, forced=len(chosen) - self._passing(-chosen.scores))

    def choosing_flops(self, view: VisualTokens, kept: int) -> int:
        """Cosines to the prototypes; the paper's 5.3 has one addition less for each, see `rcb_lmms.cost`."""
        return 2 * view.features.numel() * len(self.codebook)

    def redundancy(self, view: VisualTokens) -> Tensor:
        """The redundancy of every token, `(n,)` float32, at most 1; needs no budget.

        Raises:
            UserError: a codebook of another width than the tokens.
        """
        import torch

        self.codebook.check_width(view.features.shape[1], "the model in use")
        prototypes = self.codebook.normalized(view.features.device, getattr(torch, self.score_dtype))
        tokens = unit_rows(view.features.to(prototypes.dtype))
        if self.variant == "double_softmax":
            cosines = tokens @ prototypes.T
            scores = (cosines.softmax(dim=0) * cosines.softmax(dim=1)).amax(dim=1)
        else:
            tiles = tokens.split(max(1, TILE // len(prototypes)))
            scores = torch.cat([(tile @ prototypes.T).amax(dim=1) for tile in tiles])
        # Rounding makes cosines of 1.0000001, which no threshold could equal.
        return scores.float().clamp(-1, 1)

    def evidence(self, view: VisualTokens) -> Tensor:
        """The redundancy of every token, `(n,)` float32, on the CPU."""
        return self.redundancy(view).cpu()

    def retained(self, evidence: Any) -> int:
        """Tokens that `select` keeps of a view with these redundancies `(n,)`, those of `min_keep` included."""
        import torch

        return max(self._passing(torch.as_tensor(evidence)), min(self.min_keep, len(evidence)))

    def fit(self, evidence: list[Any], weights: list[float], target: float) -> RCB:
        """The threshold at which the weighted mean of retained tokens per view is nearest to `target`.

        Every token is a step of the mean, in the order of redundancy, then of position; the cut falls behind the step
        nearest to `target` (behind the first of two). Tokens that agree in both step together. The tokens that
        `min_keep` keeps of every view come first, so that a mean with them meets the target.

        Args:
            evidence: redundancies of each view.
            weights: how often each view is asked about.
            target: mean number of retained tokens per view.

        Raises:
            UserError: a target that is not positive, above the mean number of native tokens, or nearer to none than to
                one token of all views.
        """
        import numpy as np

        parts = np.array([len(view) for view in evidence])
        scores = np.concatenate([always_kept(view, self.min_keep) for view in evidence])
        positions = np.concatenate([np.arange(len(view), dtype=np.int32) for view in evidence])
        shares = np.asarray(weights, dtype=np.float64) / np.sum(weights)
        steps = np.repeat(shares, parts)
        check_target(target, steps.sum(), f"the mean over {len(evidence)} views")
        order = np.lexsort((positions, scores))
        kept = np.cumsum(steps[order])
        scores, positions = scores[order], positions[order]
        ends = np.append(np.flatnonzero((np.diff(scores) != 0) | (np.diff(positions) != 0)), len(order) - 1)
        if target < kept[ends[0]] / 2:
            raise UserError(
                wanted=f"a mean of {target:g} retained tokens per view",
                found=f"{len(evidence)} views, of which one token alone is a mean of {kept[ends[0]]:.3g}",
                allowed=f"means from {kept[ends[0]]:.3g}",
                next_step="raise the budget",
            )
        cut = ends[np.argmin(np.abs(kept[ends] - target))]
        return replace(self, budget=Budget.threshold(float(scores[cut]), ties=int(positions[cut]) + 1))

    def _passing(self, redundancy: Tensor) -> int:
        """How many tokens the budget alone keeps."""
        import torch

        if self.budget.kind == "threshold":
            limit = torch.tensor(self.budget.value, dtype=getattr(torch, self.score_dtype)).float().item()
            ties = self.budget.ties
            if self.preset != "official" and ties == 0:
                ties = Budget.ALL_TIES
            return int((redundancy < limit).sum() + (redundancy[:ties] == limit).sum())
        count = self.budget.count(len(redundancy), rounds_dropped=self.variant == "double_softmax")
        self._check_floor(count)
        if self.tie_mode == "official" and self.variant == "double_softmax" and count < len(redundancy):
            return int((redundancy < redundancy.sort().values[count]).sum())
        return count

    def _check_floor(self, count: int) -> None:
        """Refuse a floor above an exact count: it would replace the budget.

        Raises:
            BudgetError: naming both.
        """
        if self.min_keep > count:
            raise BudgetError(
                wanted=f"{count} retained tokens ({self.budget})",
                found=f"min_keep={self.min_keep}, which stay of every view whatever the budget",
                allowed=f"a floor of at most {count}",
                next_step=f"min_keep={count}, or a larger budget",
            )


def check_target(target: float, native: float, over: str) -> None:
    """Refuse a mean budget that no threshold reaches.

    Raises:
        UserError: with the arithmetic.
    """
    if not 0 < target <= native * (1 + 1e-9):
        raise UserError(
            wanted=f"a mean of {target:g} retained tokens per view",
            found=f"{native:.6g} native tokens per view ({over}), and keeping all gives no more",
            allowed=f"means above 0, up to {native:.6g}",
            next_step=f"lower the budget to {native:.6g} or less" if target > 0 else "use a positive budget",
        )


def always_kept(scores: Any, count: int) -> np.ndarray:
    """Scores of a view `(n,)` of which the `count` least, by score, then position, are lowered to `ALWAYS`.

    They are what `min_keep` keeps under every threshold; lowered, a cut counts them like all others.
    """
    import numpy as np

    lowered = np.asarray(scores, dtype=np.float32).copy()
    lowered[lowered.argsort(kind="stable")[:count]] = ALWAYS
    return lowered
