"""V2Drop: visual tokens that the decoder's layers hardly change go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rcb_lmms.pruners.attention import largest
from rcb_lmms.pruners.schedules import InDecoder, layers_of
from rcb_lmms.pruners.tokens import LayerChoice, LayerStep, LayerView, PromptSizes


@dataclass(frozen=True)
class V2Drop(InDecoder):
    """A share of what is left stays behind two layers, and one token behind a third.

    A token counts by how far the layer before moved its hidden state. Under a causal mask visual tokens do not see the
    question behind them.

    Released code:
        It follows xuyang-liu16/V2Drop at 219e03e: the share is one half behind 3 and 17 of 32 layers, a mean of 202.8
        of 576; rotary positions keep their gaps.

    Ours:
        A budget is the mean over the layers, for which the share is solved.

    Attributes:
        layers: as `3-17-22`, the released ones; by default the same shares of the decoder's depth.
    """

    layers: str = ""

    name: ClassVar[str] = "v2drop"
    label: ClassVar[str] = "V2Drop"
    summary: ClassVar[str] = "inside the LLM, by how far layers move a token"
    paper: ClassVar[str] = "Chen et al., CVPR 2026 (arXiv 2509.01552)"

    def schedule(self, native: int, layers: int, shares: int = 1, encoded: int = 0) -> list[LayerStep]:
        """Steps whose mean over the layers is the budget; shares are of what is left, cut, at least one token."""
        behind = layers_of(self.name, self.layers, (3, 17, 22), layers)

        def counts(share: float) -> list[int]:
            own = [native]
            for _ in behind[:-1]:
                own.append(max(1, int(own[-1] * share)))
            return [*own[1:], 1]

        return self.solved(counts, behind, native, layers, self.budget.spent(native, shares, encoded))

    def step_flops(self, step: LayerStep, left: int, prompt: PromptSizes) -> int:
        """Lengths of differences: a difference, a square and a sum for every channel."""
        return 3 * left * prompt.shape.d

    def select_in_layer(self, view: LayerView, step: LayerStep) -> LayerChoice:
        """By the length of what the layer before added."""
        scores = (view.hidden[view.candidates] - view.before[view.candidates]).float().norm(dim=1)
        return LayerChoice(largest(scores, step.keep).sort().values, scores)
