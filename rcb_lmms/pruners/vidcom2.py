"""VidCom2: frames that stand out get more of a video's budget, and keep their most unusual tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rcb_lmms.errors import BudgetError
from rcb_lmms.pruners.attention import largest
from rcb_lmms.pruners.base import Pruner, Selection, VisualTokens
from rcb_lmms.pruners.checks import check_budget, check_choice

if TYPE_CHECKING:
    from torch import Tensor

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1, 2)
TEMPERATURE = 0.01


@dataclass(frozen=True)
class VidCom2(Pruner):
    """A token's place is how near it is to the mean of its video and of its frame; the nearest go.

    A frame's share of the budget grows with the distance of its tokens to the video's mean.

    Released code:
        It follows xuyang-liu16/VidCom2 at 944a17d, on all pooled tokens of a video: only the half of the channels that
        vary least count, tokens are normalised, and nearness is a sum of Gaussians of five widths.

    Ours:
        An image's views are taken for frames.

    Attributes:
        counts: `released` rounds every frame's count for itself, at least one, so that the total is only about the
            budget; `exact` gives what is over or short to the frames whose rounding lost or won most, as vLLM keeps
            the exact total (which frames, is our choice).
    """

    counts: str = "released"

    name: ClassVar[str] = "vidcom2"
    label: ClassVar[str] = "VidCom2"
    summary: ClassVar[str] = "what stands out in its frame and its video"
    paper: ClassVar[str] = "Liu et al., EMNLP 2025 (arXiv 2505.14454)"
    joins_views: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_budget(self, *self.budgets)
        check_choice("vidcom2's counts", self.counts, ("released", "exact"))

    def select(self, view: VisualTokens, question: str | None = None) -> Selection:
        """Scores are the nearness with its sign turned; a token's frame decides too."""
        import torch

        to_video, to_frame = nearness(view)  # (f, t) each
        scores = -(to_video + to_frame)
        counts, size = self._counts(view, to_video), scores.shape[1]
        kept = [
            largest(frame, count).sort().values + number * size
            for number, (frame, count) in enumerate(zip(scores, counts, strict=True))
        ]
        return Selection(torch.cat(kept), scores.flatten())

    def count(self, view: VisualTokens, scores: Tensor | None = None) -> int:
        """Tokens of all frames together."""
        return sum(self._counts(view, nearness(view)[0]))

    def choosing_flops(self, view: VisualTokens, kept: int) -> int:
        """Variance of all channels, and distances to two means of half of them: differences, squares, sums."""
        return 6 * view.features.numel()

    def _counts(self, view: VisualTokens, to_video: Tensor) -> list[int]:
        budget, size = self.budget.count(len(view)), to_video.shape[1]
        ratio = self.budget.value if self.budget.kind == "ratio" else budget / len(view)
        unlike = -to_video.mean(1)
        shares = ((unlike - unlike.max()) / TEMPERATURE).softmax(0)
        wanted = (ratio * (1 + shares - shares.mean())).clamp(max=1) * size
        if self.counts == "released":
            return wanted.round().clamp(min=1).long().tolist()
        if budget < view.frames:
            raise BudgetError(
                wanted=f"{budget} tokens of {view.frames} frames from vidcom2 with counts=exact",
                found="frames that keep one token each at least",
                allowed=f"{view.frames} to {len(view)} tokens",
                next_step=f"raise the budget to {view.frames} tokens, or show fewer frames",
            )
        return exact_counts(wanted.tolist(), budget, size)


def nearness(view: VisualTokens) -> tuple[Tensor, Tensor]:
    """Nearness of every token to the mean of its video and to that of its frame, `(f, t)` float32 each."""
    from torch.nn.functional import normalize

    tokens = view.features.float()
    steady = tokens.var(dim=0, correction=0).argsort(stable=True)[: tokens.shape[1] // 2]
    rows = normalize(tokens[:, steady], dim=1).unflatten(0, (view.frames, -1))  # (f, t, d / 2)
    return _gaussians(rows, rows.mean((0, 1), keepdim=True)), _gaussians(rows, rows.mean(1, keepdim=True))


def _gaussians(rows: Tensor, centre: Tensor) -> Tensor:
    squares = ((rows - centre) ** 2).sum(-1)
    return sum((-squares / (2 * width)).exp() for width in WIDTHS)


def exact_counts(wanted: list[float], total: int, size: int) -> list[int]:
    """Whole numbers from 1 to `size`, near `wanted`, with the sum `total`, which these bounds allow."""
    counts = [max(1, min(size, int(own))) for own in wanted]
    while (short := total - sum(counts)) != 0:
        step = 1 if short > 0 else -1
        room = [frame for frame, own in enumerate(counts) if 1 <= own + step <= size]
        counts[max(room, key=lambda frame: step * (wanted[frame] - counts[frame]))] += step
    return counts
