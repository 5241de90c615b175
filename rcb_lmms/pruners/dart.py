"""DART: tokens that duplicate a few pivots go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rcb_lmms.errors import UserError
from rcb_lmms.pruners.attention import largest
from rcb_lmms.pruners.checks import check_whole
from rcb_lmms.pruners.schedules import InDecoder, layers_of
from rcb_lmms.pruners.tokens import LayerChoice, LayerStep, LayerView, PromptSizes

if TYPE_CHECKING:
    from torch import Tensor

# Pivots among the visual tokens, and among the text behind them.
VISUAL_PIVOTS = TEXT_PIVOTS = 4


@dataclass(frozen=True)
class DART(InDecoder):
    """Pivots have the keys of largest length; each takes the tokens that are least like it.

    Before the layer, pivots are the four visual tokens and the four text tokens behind them whose keys, in the layer
    before, have the largest sum of absolute values; likeness is the cosine of the normalised hidden states.

    Released code:
        It follows ZichenWen1/DART as VTC-Bench copies it. `official` lets pivots choose in the order of a Python set of
        their positions and keeps `4 + 8 * (T // 8)` tokens: 68 where 64 are asked for.

    Ours:
        The other presets take visual pivots first, by falling length, and keep the budget exactly: the last pivot takes
        what is left over.

    Attributes:
        layer: decoder layers that see every token.
        preset: see above.
    """

    layer: int = 2
    preset: str = "official"

    name: ClassVar[str] = "dart"
    label: ClassVar[str] = "DART"
    summary: ClassVar[str] = "inside the LLM, what duplicates pivots goes"
    paper: ClassVar[str] = "Wen et al., EMNLP 2025 (arXiv 2502.11494)"
    sees_question: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("dart's number of full layers", self.layer, 1)

    def schedule(self, native: int, layers: int, shares: int = 1, encoded: int = 0) -> list[LayerStep]:
        """One step, behind `layer` layers; the budget counts what is left behind it.

        Raises:
            UserError: fewer tokens than the visual pivots, or more than the released code can leave.
        """
        count = self.budget.spent(native, shares, encoded)
        if self.preset == "official" and count < native:
            count = VISUAL_PIVOTS + 8 * (count // 8)
        if not VISUAL_PIVOTS <= count <= native:
            raise UserError(
                wanted=f"{count} tokens of {native} from dart",
                found=f"{VISUAL_PIVOTS} pivots among them that stay",
                allowed=f"{VISUAL_PIVOTS} to {native} tokens",
                next_step="another budget, or preset=paper, which keeps it exactly",
            )
        (behind,) = layers_of(self.name, str(self.layer), (2,), layers)
        return [LayerStep(behind, count)]

    def step_flops(self, step: LayerStep, left: int, prompt: PromptSizes) -> int:
        """All keys of a layer, and every pivot's cosines to the tokens that those before it left."""
        if step.keep == left:
            return 0
        shape = prompt.shape
        pivots = VISUAL_PIVOTS + TEXT_PIVOTS
        taken = sum(pivot * ((step.keep - VISUAL_PIVOTS) // pivots) for pivot in range(pivots))
        return shape.rows_flops(0, prompt.present(left)) + 2 * (pivots * (left - VISUAL_PIVOTS) - taken) * shape.d

    def select_in_layer(self, view: LayerView, step: LayerStep) -> LayerChoice:
        """Scores: 2 for visual pivots, 1 for what stays beside them, 0 for what goes.

        Raises:
            UserError: fewer text tokens behind the visual ones than there are text pivots.
        """
        import torch
        from torch.nn.functional import normalize

        if step.keep == len(view.candidates):
            return LayerChoice(torch.arange(step.keep), torch.ones(step.keep))
        lengths = view.keys().float().abs().sum(1)
        text = torch.arange(int(view.candidates[-1]) + 1, len(view.hidden))
        if len(text) < TEXT_PIVOTS:
            raise UserError(
                wanted=f"{TEXT_PIVOTS} text pivots of dart",
                found=f"{len(text)} tokens behind the image",
                allowed="questions behind the image",
                next_step="ask a longer question, or use another method",
            )
        own = view.candidates[largest(lengths[view.candidates], VISUAL_PIVOTS)].tolist()
        pivots = own + text[largest(lengths[text], TEXT_PIVOTS)].tolist()
        each, left = divmod(step.keep - VISUAL_PIVOTS, len(pivots))
        takes = [each] * (len(pivots) - 1) + [each + left]
        if self.preset == "official":
            # The order of a set of integers depends on the integers themselves: positions in the whole prompt.
            places = view.places[pivots].tolist()
            pivots = [pivots[places.index(place)] for place in set(places)]
        rows = normalize(view.norm(view.hidden).float(), dim=1)
        chosen = _least_alike(rows, pivots, takes, [int(i) for i in view.candidates if int(i) not in own])
        scores = torch.zeros(len(view.hidden))
        scores[chosen], scores[own] = 1.0, 2.0
        kept = torch.tensor(sorted(own + chosen))
        return LayerChoice(torch.searchsorted(view.candidates, kept), scores[view.candidates])


def _least_alike(rows: Tensor, pivots: list[int], takes: list[int], left: list[int]) -> list[int]:
    """Tokens of `left` that the pivots take in turn, each the ones of the smallest cosine to it, from unit rows."""
    chosen: list[int] = []
    for pivot, take in zip(pivots, takes, strict=True):
        nearest = largest(-(rows[left] @ rows[pivot]), take).tolist()
        taken = {left[index] for index in nearest}
        chosen += [index for index in left if index in taken]
        left = [index for index in left if index not in taken]
    return chosen
