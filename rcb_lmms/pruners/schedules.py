"""What methods share that prune inside the decoder by a schedule: which layers, and how many tokens behind each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from rcb_lmms.errors import BudgetError, UserError

if TYPE_CHECKING:
    from rcb_lmms.budget import Budget

# Of the language models that the papers' layers were chosen for (Vicuna 7B, Llama 3 8B).
PAPER_LAYERS = 32


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


def mean_tokens(counts: Sequence[int], layers: Sequence[int], native: int, depth: int) -> float:
    """Visual tokens that the layers process on average: `native` before the first step, `counts` behind each."""
    ends = [*layers[1:], depth]
    behind = sum(count * (end - begin) for count, begin, end in zip(counts, layers, ends, strict=True))
    return (native * layers[0] + behind) / depth


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


def spent(budget: Budget, native: int, shares: int, encoded: int) -> int:
    """Tokens that a budget allows a prompt of `native` visual tokens, all of them where a packing left too few."""
    capped = budget.kind == "tokens" and budget.value * shares > native
    return min(native, budget.count(max(native, encoded) if capped else native, shares))
