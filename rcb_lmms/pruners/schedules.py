"""What methods share that prune inside the decoder by a schedule: which layers, and how many tokens behind each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from rcb_lmms.budget import mean_tokens
from rcb_lmms.errors import BudgetError, UserError
from rcb_lmms.pruners.base import Pruner, Selection, VisualTokens
from rcb_lmms.pruners.checks import check_budget
from rcb_lmms.pruners.none import keep_all
from rcb_lmms.pruners.tokens import LayerStep

# Of the language models that the papers' layers were chosen for (Vicuna 7B, Llama 3 8B).
PAPER_LAYERS = 32


@dataclass(frozen=True)
class InDecoder(Pruner):
    """A method that leaves views whole, and prunes between layers of the decoder by a schedule."""

    stage: ClassVar[str] = "layers"

    def __post_init__(self) -> None:
        check_budget(self, *self.budgets)

    def select(self, view: VisualTokens, question: str | None = None) -> Selection:
        """Every token, since nothing is known before the decoder has run; every score is 0."""
        return keep_all(view)

    def solved(
        self, counts_of: Callable[[float], list[int]], behind: Sequence[int], native: int, depth: int, target: int
    ) -> list[LayerStep]:
        """The steps whose mean over the layers is nearest to `target`, from the counts that a share gives."""
        found = solved(self.name, counts_of, lambda own: mean_tokens(own, behind, native, depth), target)
        return [LayerStep(layer, count) for layer, count in zip(behind, found, strict=True)]


def layers_of(method: str, given: str, default: Sequence[int], depth: int) -> list[int]:
    """The layers behind which a method prunes: as given (`8-16-24`), or the default's share of the depth (ours).

    Raises:
        UserError: numbers that do not rise, or layers that the decoder does not have.
    """
    if not given:
        scaled = [round(layer * depth / PAPER_LAYERS) for layer in default]
        layers = [max(own, number) for number, own in enumerate(scaled, 1)]  # each at least one behind the last
        layers = [min(own, depth - len(layers) + number) for number, own in enumerate(layers)]
    else:
        layers = [int(part) if part.isdecimal() else 0 for part in given.split("-")]
    if not 1 <= layers[0] <= layers[-1] < depth or any(later <= before for before, later in pairwise(layers)):
        raise UserError(
            wanted=f"{method} behind the layers {given or ', '.join(map(str, default))}",
            found=f"a decoder of {depth} layers",
            allowed=f"rising numbers from 1 to {depth - 1}, joined by -",
            next_step=f"layers={'-'.join(map(str, default))}",
        )
    return layers


def solved(
    method: str, counts_of: Callable[[float], list[int]], mean: Callable[[list[int]], float], target: float
) -> list[int]:
    """The counts of the share in 0 to 1 whose mean is nearest to `target`; both functions rise with the share.

    Raises:
        BudgetError: a target below the least or above the largest mean.
    """
    low, high = 0.0, 1.0
    least, most = mean(counts_of(low)), mean(counts_of(high))
    if not least - 0.5 <= target <= most + 0.5:
        raise BudgetError(
            wanted=f"{target:g} visual tokens per layer from {method}",
            found="a schedule of layers that none of its shares brings to this mean",
            allowed=f"means from {least:.1f} to {most:.1f} behind these layers",
            next_step="another budget, or earlier layers, such as layers=2-8-16",
        )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(counts_of(middle)) < target else (low, middle)
    return min(counts_of(low), counts_of(high), key=lambda counts: abs(mean(counts) - target))
