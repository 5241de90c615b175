"""Which visual tokens stay of a question, and which are so close to the cut that another CPU may decide anew."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rcb_lmms.engine.session import Trace

# Distances from the cut within which rounding may decide. Measured between instruction sets (SSE, AVX2, AVX-512) and
# thread counts on the laboratory in float32: cosines differ by up to 1e-6, attention by up to 3e-5 of its value.
NEAR_COSINE = 1e-5
NEAR_ATTENTION = 2e-4


@dataclass(frozen=True)
class KeptSet:
    """One view, or for FastV one prompt: how many candidates, those that stay, and those near the cut."""

    native: int
    kept: frozenset[int]
    near: frozenset[int]

    def to_json(self) -> list[Any]:
        """`[native, "kept as ranges", "near as ranges"]`."""
        return [self.native, ranges(self.kept), ranges(self.near)]

    @classmethod
    def from_json(cls, parts: list[Any]) -> KeptSet:
        """The inverse of `to_json`."""
        native, kept, near = parts
        return cls(int(native), indices(kept), indices(near))


def ranges(numbers: Iterable[int]) -> str:
    """`{0, 1, 2, 5}` -> `0-2 5`."""
    runs = itertools.groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
    ends = [(own[0][1], own[-1][1]) for own in (list(run) for _, run in runs)]
    return " ".join(f"{first}-{last}" if last > first else str(first) for first, last in ends)


def indices(text: str) -> frozenset[int]:
    """The inverse of `ranges`.

    Raises:
        ValueError: not made by `ranges`.
    """
    ends = [tuple(map(int, part.split("-"))) for part in text.split()]
    return frozenset(number for run in ends for number in range(run[0], run[-1] + 1))


def near_the_cut(scores: Tensor, kept: Tensor, threshold: float | None = None) -> frozenset[int]:
    """Tokens whose side of the cut rounding could change.

    With a threshold, scores are cosines, near it if they are within `NEAR_COSINE`. Otherwise the cut lies between the
    lowest score that stays and the highest that goes, and near is `NEAR_ATTENTION` of these. Where the scores do not
    decide (PruMerge+ with its grid, scores that are all the same), nothing is near: all tokens are held exactly.

    Args:
        scores: `(n,)`, higher = keep.
        kept: `(k,)` indices.
        threshold: of the scores.
    """
    scores = scores.double().cpu()
    if threshold is not None:
        return _where((scores - threshold).abs() <= NEAR_COSINE)
    stays = torch.zeros(len(scores), dtype=torch.bool)
    stays[kept.cpu()] = True
    if stays.all() or not stays.any() or bool((scores == scores[0]).all()):
        return frozenset()
    lowest, highest = scores[stays].min(), scores[~stays].max()
    if lowest < highest:
        return frozenset()
    low, high = lowest - NEAR_ATTENTION * lowest.abs(), highest + NEAR_ATTENTION * highest.abs()
    return _where(torch.where(stays, scores <= high, scores >= low))


def _where(mask: Tensor) -> frozenset[int]:
    return frozenset(mask.nonzero().flatten().tolist())


def kept_sets(trace: Trace, threshold: float | None = None) -> list[KeptSet]:
    """What stayed of one question, view by view; of a layer method, step by step among the prompt's visual tokens.

    Args:
        trace: of the session that answered, whose stored views are those the answer was made from.
        threshold: of the scores, under a method that keeps by one.
    """
    if not trace.layer_kept:
        return [
            KeptSet(len(own.scores), frozenset(own.kept.tolist()), near_the_cut(own.scores, own.kept, threshold))
            for selections in trace.selections
            for own in selections
        ]
    sets, candidates = [], None
    for layer, positions in trace.layer_kept.items():
        scores = trace.layer_scores[layer]
        # Positions are counted among what the step before left.
        kept = positions if candidates is None else torch.searchsorted(candidates, positions)
        sets.append(KeptSet(len(scores), frozenset(kept.tolist()), near_the_cut(scores, kept)))
        candidates = positions
    return sets
