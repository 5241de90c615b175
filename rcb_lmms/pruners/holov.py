"""HoloV: every part of the image gets its share of the budget, and spends it by attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rcb_lmms.pruners.attention import ByAttention, cosines, largest
from rcb_lmms.pruners.base import Selection, VisualTokens
from rcb_lmms.pruners.checks import check_minimum, check_whole

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class HoloV(ByAttention):
    """Runs of tokens in raster order share the budget by attention and variance of likeness, then keep by attention.

    Released code:
        It follows obananas/HoloV at 1d2e65e. Its runs are one and a half rows of 24 x 24 tokens, where the paper speaks
        of crops. `official` feeds a run's tokens by falling attention (a run that is kept whole, in raster order), and
        zeros where a run is to keep more tokens than it has.

    Ours:
        The other presets feed tokens in raster order and give what a run cannot spend to the runs of the largest
        weight.

    Attributes:
        alpha: weight of the variance, 0.09 as released; it only moves counts between runs.
        runs: how many; 0 takes the released code's rule for Qwen2.5-VL, `int(1024 / 576 * n / count)`, which gives the
            16 of LLaVA-1.5 at 64 tokens.
        preset: see above.
    """

    alpha: float = 0.09
    runs: int = 0
    preset: str = "official"

    name: ClassVar[str] = "holov"
    label: ClassVar[str] = "HoloV"
    summary: ClassVar[str] = "by CLS attention, a share for every part of the image"
    paper: ClassVar[str] = "Zou et al., NeurIPS 2025 (arXiv 2510.02912)"
    needs: ClassVar[frozenset[str]] = frozenset({"head_attention"})
    # As released for tiles: runs over all views as one row of tokens.
    pools_views: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_minimum("holov's weight of the variance", self.alpha, 0)
        check_whole("holov's number of runs", self.runs, 0)

    @property
    def ascending(self) -> bool:
        """Whether tokens come in raster order."""
        return self.preset != "official"

    def select(self, view: VisualTokens, question: str | None = None) -> Selection:
        """Scores are the attention; a token's run decides too."""
        import torch

        weights, count, n = self.weights(view), self.count(view), len(view)
        runs = torch.arange(n, device=weights.device).tensor_split(self._parts(n, count))
        scores = torch.stack([self._score(weights[run], view.features[run]) for run in runs])
        shares = scores / (scores.sum() + 1e-6)
        official = self.preset == "official"
        slots = _shared(shares, count, None if official else [len(run) for run in runs])
        kept = []
        for run, slot in zip(runs, slots, strict=True):
            kept.append(run if slot >= len(run) else run[largest(weights[run], slot)])
        kept = torch.cat(kept)
        return Selection(kept if official else kept.sort().values, weights, blanks=count - len(kept))

    def choosing_flops(self, view: VisualTokens, kept: int) -> int:
        """Cosines of the tokens of every run to each other."""
        short, longer = divmod(len(view), self._parts(len(view), kept))
        sizes = [short + (run < longer) for run in range(self._parts(len(view), kept))]
        return 2 * sum(size**2 for size in sizes if size > 1) * view.features.shape[1]

    def _parts(self, n: int, count: int) -> int:
        return min(n, self.runs or max(1, int(1024 / 576 * n / count)))

    def _score(self, weights: Tensor, features: Tensor) -> Tensor:
        """A run's weight in the sharing, from attention `(m,)` and tokens `(m, d)`."""
        n = len(weights)
        if n == 1:
            return weights[0]
        alike = cosines(features).fill_diagonal_(0)
        mean = alike.sum(1) / (n - 1)
        variance = ((alike - mean[:, None]) ** 2).sum(1) / (n - 1)
        raised = 1000 * weights
        return (raised + self.alpha * variance * raised.abs().mean() / (variance.abs().mean() + 1e-6)).mean()


def _shared(shares: Tensor, count: int, rooms: list[int] | None) -> list[int]:
    """Slots of every run; with `rooms`, none gets more than it has, and all are spent."""
    slots = (shares * count).floor().long().tolist()
    order = largest(shares, len(shares)).tolist()
    if rooms is None:
        for run in order[: max(0, count - sum(slots))]:
            slots[run] += 1
        return slots
    slots = [min(slot, room) for slot, room in zip(slots, rooms, strict=True)]
    while (left := count - sum(slots)) > 0:
        for run in [run for run in order if slots[run] < rooms[run]][:left]:
            slots[run] += 1
    return slots
