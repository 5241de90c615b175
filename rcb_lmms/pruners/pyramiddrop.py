"""PyramidDrop: fewer visual tokens at every stage of the decoder, by the attention of the last prompt token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rcb_lmms.pruners.attention import largest
from rcb_lmms.pruners.schedules import InDecoder, layers_of
from rcb_lmms.pruners.tokens import LayerChoice, LayerStep, LayerView


@dataclass(frozen=True)
class PyramidDrop(InDecoder):
    """The shares r, r squared and r cubed of the visual tokens stay behind three layers.

    Before a layer, the attention that this layer's own projections give the last prompt token ranks what is left.

    Released code:
        It follows Cooperx521/PyramidDrop at 6444f30: r is one half behind 8, 16 and 24 of 32 layers, a mean of 270 of
        576; positions are renumbered.

    Ours:
        A budget is the mean over the layers, for which r is solved, as the authors advise. Every visual token of a
        prompt with several images is a candidate; the released code has one image.

    Attributes:
        layers: as `8-16-24`, the released ones; by default the same shares of the decoder's depth. The authors
            advise 2-8-16 for small budgets, which the released layers cannot meet.
    """

    layers: str = ""

    name: ClassVar[str] = "pyramiddrop"
    label: ClassVar[str] = "PyramidDrop"
    summary: ClassVar[str] = "inside the LLM, in three stages, by the question"
    paper: ClassVar[str] = "Xing et al., CVPR 2025 (arXiv 2410.17247)"
    sees_question: ClassVar[bool] = True
    positions: ClassVar[str] = "contiguous"

    def schedule(self, native: int, layers: int, shares: int = 1, encoded: int = 0) -> list[LayerStep]:
        """Three steps whose mean over the layers is the budget; shares are cut to whole tokens, at least one."""
        behind = layers_of(self.name, self.layers, (8, 16, 24), layers)

        def counts(share: float) -> list[int]:
            return [max(1, int(native * share**power)) for power in range(1, len(behind) + 1)]

        return self.solved(counts, behind, native, layers, self.budget.spent(native, shares, encoded))

    def select_in_layer(self, view: LayerView, step: LayerStep) -> LayerChoice:
        """By the last token's attention in the layer that comes."""
        last = view.candidates.new_tensor([len(view.hidden) - 1])
        scores = view.attention("next", last).mean((0, 1))[view.candidates]
        return LayerChoice(largest(scores, step.keep).sort().values, scores)
