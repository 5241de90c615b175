"""How many visual tokens may stay: the one place where a budget is rounded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from rcb_lmms.errors import BudgetError, UserError


@dataclass(frozen=True)
class Budget:
    """A count, a share, a score threshold, or the method's own choice; made by the class methods below.

    Attributes:
        kind: which of the four.
        value: tokens, share of the native tokens, or cosine threshold; `None` for `adaptive`.
        ties: threshold only: a token whose score equals the threshold stays if its position in the view is below
            this number. 0 is the strict rule of the released code, `ALL_TIES` the `<=` of the paper's Algorithm 2;
            the calibrator sets values between, so that a budget is met also where many tokens look the same.
    """

    kind: Literal["tokens", "ratio", "threshold", "adaptive"]
    value: float | None = None
    ties: int = 0

    ALL_TIES: ClassVar[int] = 2**31 - 1
    # Smaller shares leave nothing of a million tokens, more than any image or video has.
    LEAST_SHARE: ClassVar[float] = 1e-6

    @classmethod
    def tokens(cls, count: int) -> Budget:
        """Exactly `count` visual tokens per view."""
        number = _finite(count)
        if number is None or number % 1 or not 1 <= number <= cls.ALL_TIES:
            raise _bad("a number of retained tokens", count, f"whole numbers from 1 to {cls.ALL_TIES}", "keep=64")
        return cls("tokens", int(count))

    @classmethod
    def ratio(cls, share: float) -> Budget:
        """The share `share` of a view's native tokens, rounded once (half to even, as the released code)."""
        number = _finite(share)
        if number is None or not cls.LEAST_SHARE <= number <= 1:
            raise _bad("a share of retained tokens", share, f"numbers from {cls.LEAST_SHARE:g} to 1", "ratio=0.25")
        return cls("ratio", float(share))

    @classmethod
    def threshold(cls, cosine: float, ties: int = 0) -> Budget:
        """Every token whose largest cosine to a prototype is under `cosine`: a different count for each image."""
        number, place = _finite(cosine), _finite(ties)
        if place is None or place % 1 or not 0 <= place <= cls.ALL_TIES:
            raise _bad("positions at which a tie stays", ties, f"whole numbers from 0 to {cls.ALL_TIES}", "ties=0")
        if number is None or not -1 <= number <= 1:
            raise _bad("a cosine threshold", cosine, "numbers from -1 to 1", "threshold=0.45")
        return cls("threshold", float(cosine), int(ties))

    @classmethod
    def adaptive(cls) -> Budget:
        """As many as the method itself decides (PruMerge's outliers)."""
        return cls("adaptive")

    def count(self, native: int, shares: int = 1, *, rounds_dropped: bool = False) -> int:
        """Tokens that stay of `native`, among which a number of tokens may be spent `shares` times.

        A ratio is rounded half to even, as the released code does: what stays or, with `rounds_dropped`, what is
        dropped (the released softmax variants of RCB), which differs at exact halves: 364 or 365 of 729.

        Raises:
            UserError: the budget exceeds `native`, rounds to nothing, or is no count at all.
        """
        if self.kind == "tokens":
            count = int(self.value) * shares
        elif self.kind == "ratio":
            share = self.value
            count = native - round(native * (1 - share)) if rounds_dropped else round(native * share)
        else:
            raise _bad("a fixed number of retained tokens", self, "a count or a ratio", "keep=64 or ratio=0.25")
        if not 1 <= count <= native:
            raise BudgetError(
                wanted=f"{count} retained tokens ({self})",
                found=f"a view of {native} visual tokens",
                allowed=f"1 to {native} tokens per view",
                next_step=f"keep={min(max(count, 1), native)}, or a ratio",
            )
        return count

    def exceeds(self, native: int, shares: int = 1) -> bool:
        """Whether a number of tokens, spent `shares` times, is more than `native`."""
        return self.kind == "tokens" and self.value * shares > native

    def spent(self, native: int, shares: int = 1, encoded: int = 0) -> int:
        """Tokens that stay of a prompt's `native`: all of them where its packing left fewer of `encoded` than `count`.

        Raises:
            UserError: as `count` does.
        """
        among = max(native, encoded) if self.exceeds(native, shares) else native
        return min(native, self.count(among, shares))

    def split(self, parts: int) -> list[Budget]:
        """Budgets of `parts` views that have this one together; the first views get what is left over.

        Raises:
            UserError: a number of tokens smaller than that of the views.
        """
        if self.kind != "tokens":
            return [self] * parts
        if self.value < parts:
            raise _bad(f"{self} for one image", f"{parts} views of it", f"at least {parts}", f"keep={parts}")
        even, left = divmod(int(self.value), parts)
        return [Budget.tokens(even + (view < left)) for view in range(parts)]

    def times(self, views: int) -> Budget:
        """The budget of `views` views together that each have this one."""
        return Budget.tokens(int(self.value) * views) if self.kind == "tokens" else self

    def __str__(self) -> str:
        return self.kind if self.value is None else f"{self.kind}={self.value:g}"


def mean_tokens(counts: Sequence[float], layers: Sequence[int], native: float, depth: int) -> float:
    """Visual tokens that the layers process on average: `native` before the first step, `counts` behind each."""
    ends = [*layers[1:], depth]
    behind = sum(count * (end - begin) for count, begin, end in zip(counts, layers, ends, strict=True))
    return (native * layers[0] + behind) / depth


def layer_average(rank: float, native: float, layer: int, layers: int) -> float:
    """Visual tokens per layer, averaged over the decoder, when layers from `layer` on see `rank` of `native`.

    SparseVLM's convention for comparing FastV with pruning before the language model.
    """
    return mean_tokens([rank], [layer], native, layers)


def rank_for_layer_average(target: float, native: float, layer: int, layers: int) -> int:
    """The rank whose `layer_average` is nearest to `target`.

    Raises:
        UserError: the first `layer` full layers alone exceed the target (the arithmetic is in the message), or no
            layers are left to prune.
    """
    if not 1 <= layer < layers:
        raise _bad("pruning inside the decoder", f"layer {layer} of {layers}", f"layers 1 to {layers - 1}", "layer=2")
    rank = (target * layers - layer * native) / (layers - layer)
    if not 1 <= rank <= native:
        floor = layer_average(1, native, layer, layers)
        raise UserError(
            wanted=f"a layer average of {target:g} visual tokens",
            found=f"({layer} x {native:g} + {layers - layer} x rank) / {layers} = {target:g} needs rank {rank:.1f}",
            allowed=f"layer averages from {floor:.1f} to {native:g} with {layer} full layers of {layers}",
            next_step="raise the budget, prune at an earlier layer, or count tokens after pruning (convention=rank)",
        )
    return round(rank)


def _finite(value: object) -> float | None:
    """The value as a number; `None` for what is none, for truth values and for what no float can hold."""
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _bad(wanted: str, found: object, allowed: str, next_step: str) -> BudgetError:
    return BudgetError(wanted=wanted, found=str(found)[:80], allowed=allowed, next_step=next_step)
