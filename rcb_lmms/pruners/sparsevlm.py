"""SparseVLM: text tokens that the image speaks to rate the visual tokens, stage by stage, and what goes is merged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rcb_lmms.budget import mean_tokens
from rcb_lmms.errors import UserError
from rcb_lmms.pruners.attention import largest
from rcb_lmms.pruners.checks import check_choice
from rcb_lmms.pruners.schedules import InDecoder, layers_of, solved
from rcb_lmms.pruners.tokens import LayerChoice, LayerStep, LayerView, PromptSizes

if TYPE_CHECKING:
    from torch import Tensor

NATIVE = 576
# The best tokens that stay behind the three layers, by the budget they are named after.
RANKED = {
    "1.5": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "2.0": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
# Heads of 32 that version 2.0 listens to.
HEADS, OF_HEADS = 14, 32


@dataclass(frozen=True)
class SparseVLM(InDecoder):
    """Raters are text tokens behind the image that it resembles more than their mean; their attention ranks.

    Layers 2, 6 and 15 of 32 run on all current tokens; then their output is pruned.

    Released code:
        It follows Gumpest/SparseVLMs at 26a5f48. Version 1.5 merges three tenths of what goes into a few tokens behind
        the image and renumbers positions; 2.0 merges nothing, keeps positions, divides attention by what rotary
        positions alone would give, and listens to 14 of 32 heads. Counts are lists for 192, 128, 96 and 64 of 576
        tokens, the mean of the counts behind each layer, while the layers process more: 82.3 for 64.

    Ours:
        For other budgets the nearest list is scaled until its mean is met; of other numbers of heads the same share
        listens. Where no text token lies above the mean, all of them rate; the released code then keeps arbitrary
        tokens. Of equally dense tokens the earlier one counts as denser, where the released code lets unseeded noise
        decide. With several images, merged tokens stand behind the last one.

    Attributes:
        version: `1.5` or `2.0`.
        layers: as `3-7-16`: how many layers have run at each step; by default the released shares of the depth.
    """

    version: str = "1.5"
    layers: str = ""

    name: ClassVar[str] = "sparsevlm"
    label: ClassVar[str] = "SparseVLM"
    summary: ClassVar[str] = "inside the LLM, rated by words, the rest merged"
    paper: ClassVar[str] = "Zhang et al., ICML 2025 (arXiv 2410.04417)"
    sees_question: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("sparsevlm's version", self.version, tuple(RANKED))

    @property
    def positions(self) -> str:
        """Renumbered where tokens are merged."""
        return "contiguous" if self.version == "1.5" else "original"

    def schedule(self, native: int, layers: int, shares: int = 1, encoded: int = 0) -> list[LayerStep]:
        """Three steps; `keep` counts merged tokens too."""
        behind = layers_of(self.name, self.layers, (3, 7, 16), layers)
        target = self.budget.spent(native, shares, encoded)
        lists = RANKED[self.version]
        known = min(lists, key=lambda own: abs(own / NATIVE - target / native))
        if target * NATIVE == known * native:
            ranked = [max(1, round(own * native / NATIVE)) for own in lists[known]]
        else:
            ranked = self._scaled(lists[known], native, behind, layers, target)
        if len(behind) != len(ranked):
            raise UserError(
                wanted=f"sparsevlm behind the layers {self.layers}",
                found=f"{len(behind)} layers",
                allowed="three layers",
                next_step="layers=3-7-16",
            )
        return self._steps(ranked, native, behind)

    def _steps(self, ranked: Sequence[int], native: int, behind: Sequence[int]) -> list[LayerStep]:
        steps, current = [], native
        for layer, own in zip(behind, ranked, strict=True):
            own = min(own, current - 1) if current > 1 else 1
            merged = clusters(current - own) if self.version == "1.5" and current > own else 0
            steps.append(LayerStep(layer, own + merged, own))
            current = own + merged
        return steps

    def _scaled(self, shape: Sequence[int], native: int, behind: Sequence[int], depth: int, target: float) -> list[int]:
        # As the code counts: behind each of these layers, its own output included.
        counted = [layer - 1 for layer in behind]

        def counts(share: float) -> list[int]:
            scale = share * native / min(shape)
            return [min(native - 1, max(1, round(own * scale))) for own in shape]

        def mean(ranked: list[int]) -> float:
            return mean_tokens([step.keep for step in self._steps(ranked, native, behind)], counted, native, depth)

        return solved(self.name, counts, mean, target)

    def step_flops(self, step: LayerStep, left: int, prompt: PromptSizes) -> int:
        """Likeness of text and image, the raters' attention, and distances of what is merged.

        Which text tokens rate depends on the prompt: all are counted, the most that it can be. Version 2.0 divides by
        the attention that positions alone would give, of which the products are counted.
        """
        shape, tokens, text = prompt.shape, prompt.present(left), prompt.text
        flops = 2 * prompt.visual * text * shape.d + shape.rows_flops(text, tokens)
        if self.version == "2.0":
            return flops + 2 * text * tokens * shape.head_width
        merged = int(0.3 * (left - step.ranked)) + 1 if step.keep > step.ranked else 0
        return flops + 2 * merged**2 * shape.d

    def select_in_layer(self, view: LayerView, step: LayerStep) -> LayerChoice:
        """By the raters' attention in the layer before, mean over heads and raters.

        Raises:
            UserError: no text behind the image.
        """
        rows = _raters(view)
        attention = view.attention("before", rows)  # (h, r, m)
        if self.version == "2.0":
            attention = _without_positions(attention, rows, view)
        scores = attention[:, :, view.candidates].mean((0, 1))
        kept = largest(scores, step.ranked).sort().values
        if step.keep == step.ranked:
            return LayerChoice(kept, scores)
        gone = [index for index in largest(scores, len(scores)).tolist() if index not in set(kept.tolist())]
        recycled = gone[: int(0.3 * len(gone)) + 1]
        merged = merge(view.hidden[view.candidates[recycled]], clusters(len(gone)))
        return LayerChoice(kept, scores, merged)


def clusters(gone: int) -> int:
    """Merged tokens that are made of so many that go."""
    return int((int(0.3 * gone) + 1) / 10) + 1


def _raters(view: LayerView) -> Tensor:
    """Indices among the present tokens of the text tokens that rate."""
    import torch

    text = torch.arange(int(view.visual[-1]) + 1, len(view.embeds), device=view.embeds.device)
    if not len(text):
        raise UserError(
            wanted="sparsevlm pruning",
            found="no text behind the image",
            allowed="questions behind the image",
            next_step="use a method that does not read the question",
        )
    likeness = (view.embeds[view.visual.to(text.device)] @ view.embeds[text].T).float().softmax(1).mean(0)
    raters = text[likeness > likeness.mean()]
    return torch.searchsorted(view.places, (raters if len(raters) else text).to(view.places.device))


def _without_positions(attention: Tensor, rows: Tensor, view: LayerView) -> Tensor:
    """Attention divided by what rotary positions alone would give, of the heads in which it then is the largest."""
    import torch

    cosine, sine = (part.float() for part in view.rope)
    half = cosine.shape[1] // 2
    sign = torch.cat([-torch.ones(half), torch.ones(half)]).to(cosine.device)
    turned = cosine + sign * sine  # a vector of ones, rotated
    alone = turned[rows.to(turned.device)] @ turned.T / math.sqrt(turned.shape[1])
    attention = attention / alone.to(attention.device)
    heads = max(1, round(len(attention) * HEADS / OF_HEADS))
    sums = attention[:, :, view.candidates].sum((1, 2))
    return attention[sums.topk(heads).indices]


def merge(states: Tensor, count: int) -> Tensor:
    """Means `(count, d)` of clusters of hidden states `(n, d)`, by density peaks, the densest first."""
    import torch

    rows = states.float()
    distances = torch.cdist(rows[None], rows[None])[0] / math.sqrt(rows.shape[1])
    nearest = distances.topk(min(count, len(rows)), dim=1, largest=False).values
    # Equal densities are told apart by place; the released code draws noise of this size for it.
    density = (-(nearest**2).mean(1)).exp() + torch.linspace(1e-6, 0, len(rows), device=rows.device)
    denser = density[None] > density[:, None]
    gap = distances.masked_fill(~denser, float(distances.max())).amin(1)
    centres = (density * gap).topk(count).indices
    assigned = distances[centres].argmin(0)
    assigned[centres] = torch.arange(count, device=assigned.device)
    sums = torch.zeros(count, rows.shape[1], device=rows.device).index_add_(0, assigned, rows)
    sizes = torch.bincount(assigned, minlength=count)[:, None]
    return (sums / (sizes + 1e-6)).to(states.dtype)
