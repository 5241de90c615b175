"""Thresholds for mean budgets over scores that do not fit into memory: exact order statistics, read chunk by chunk.

`RCB.fit` sorts all scores; here the same cut is found digit by digit (a radix selection), so that memory is bounded by
one chunk whatever the size of a benchmark, and several targets share each reading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from rcb_lmms.pruners.rcb import always_kept

DIGITS = 1 << 16
SHIFTS = (48, 32, 16, 0)  # of the digits of a key: a score in the upper half, a position in the lower


@dataclass(frozen=True)
class Chunk:
    """Scores of some images, each made of parts that a method decides on one by one.

    Attributes:
        scores: `(t,)` float32, the parts one behind the other.
        parts: `(p,)` tokens of each part, all positive.
        weights: `(p,)` float64, how much a token of each part counts.
    """

    scores: np.ndarray
    parts: np.ndarray
    weights: np.ndarray

    @property
    def positions(self) -> np.ndarray:
        """Each token's position within its part, `(t,)`."""
        starts = np.cumsum(self.parts) - self.parts
        return np.arange(len(self.scores)) - np.repeat(starts, self.parts)

    def keys(self, min_keep: int = 0) -> np.ndarray:
        """`(t,)` uint64, ordered as scores are, and as positions where scores are equal; see `always_kept`."""
        scores = always_kept(self.scores, self.parts, min_keep) if min_keep else self.scores
        bits = (scores + np.float32(0)).view(np.uint32)  # -0.0 becomes 0.0, to which it is equal
        sign = np.uint32(1 << 31)
        ordered = np.where(bits & sign, ~bits, bits | sign).astype(np.uint64)
        return ordered << np.uint64(32) | self.positions.astype(np.uint64)

    def retained(self, cut: Cut, min_keep: int) -> np.ndarray:
        """Tokens that stay of each part, `(p,)`."""
        limit = np.float32(cut.threshold)
        passing = (self.scores < limit) | ((self.scores == limit) & (self.positions < cut.ties))
        counts = np.add.reduceat(passing.astype(np.int64), np.cumsum(self.parts) - self.parts)
        return np.maximum(counts, np.minimum(min_keep, self.parts))


@dataclass(frozen=True)
class Cut:
    """A threshold and the position up to which tokens of exactly that score stay (`Budget.threshold`)."""

    threshold: float
    ties: int


@dataclass
class _Search:
    """The first key with which `target` is reached, found digit by digit; `below` weighs all smaller keys."""

    target: float
    prefix: int = 0
    below: float = 0.0
    reached: float = 0.0
    before: int | None = field(default=None)

    def narrow(self, histogram: np.ndarray) -> None:
        filled = np.flatnonzero(histogram)
        reached = self.below + np.cumsum(histogram[filled])
        # Rounding can leave the last digit a hair under the target.
        place = min(int(np.searchsorted(reached, self.target)), len(filled) - 1)
        self.below = float(reached[place - 1]) if place else self.below
        self.reached = float(reached[place])
        self.prefix = self.prefix * DIGITS + int(filled[place])

    def cut(self) -> Cut:
        nearer_before = self.before is not None and self.target - self.below <= self.reached - self.target
        key = self.before if nearer_before else self.prefix
        ordered = np.uint32(key >> 32)
        sign = np.uint32(1 << 31)
        bits = ordered ^ sign if ordered & sign else ~ordered
        return Cut(float(bits.view(np.float32)), (key & 0xFFFFFFFF) + 1)


def find_cuts(chunks: Callable[[], Iterable[Chunk]], targets: Sequence[float], min_keep: int = 0) -> list[Cut]:
    """For each target the cut that keeps a total weight nearest to it, the smaller of two equally near ones.

    Every token is a step, in the order of score, then of position; tokens that agree in both step together. Equal to
    what `RCB.fit` finds in memory.

    Args:
        chunks: reads the scores; called five times.
        targets: total weights, positive and at most that of all tokens.
        min_keep: tokens of each part that stay whatever the cut.
    """
    searches = [_Search(target) for target in targets]
    for shift in SHIFTS:
        histograms = {search.prefix: np.zeros(DIGITS) for search in searches}
        for chunk in chunks():
            keys, weights = chunk.keys(min_keep), np.repeat(chunk.weights, chunk.parts)
            prefixes = keys >> np.uint64(shift + 16) if shift < SHIFTS[0] else np.zeros_like(keys)
            digits = (keys >> np.uint64(shift)) & np.uint64(DIGITS - 1)
            for prefix, histogram in histograms.items():
                own = prefixes == np.uint64(prefix)
                histogram += np.bincount(digits[own].astype(np.int64), weights[own], DIGITS)
        for search in searches:
            search.narrow(histograms[search.prefix])
    for chunk in chunks():
        keys = chunk.keys(min_keep)
        for search in searches:
            smaller = keys[keys < np.uint64(search.prefix)]
            if len(smaller):
                search.before = max(search.before or 0, int(smaller.max()))
    return [search.cut() for search in searches]
