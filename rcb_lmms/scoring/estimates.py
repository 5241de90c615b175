"""Scores as ratios of sums, with standard errors that know which samples share an image.

Every score of the tasks is a ratio of sums, or the mean or the sum of such ratios over strata (POPE's categories, MME's
subtasks). Its standard error is that of the linearised ratio, with whole clusters as the independent units.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

# lmms-eval's word for a number there is none of.
UNKNOWN = "N/A"


class Term(NamedTuple):
    """What one unit (a question, a pair, a group of questions) adds to a score.

    Attributes:
        numerator, denominator: added up within a stratum, then divided.
        cluster: names what the unit shares with others, such as an image.
        stratum: units of one stratum are divided by each other.
    """

    numerator: float
    denominator: float
    cluster: str
    stratum: str = ""


def score(terms: Iterable[Term], *, total: bool = False) -> float | str:
    """Mean over the strata (`total`: sum) of numerators over denominators; a ratio to zero counts as zero."""
    strata = _strata(terms)
    values = [_ratio(own) for own in strata]
    return math.fsum(values) / (1 if total else len(values)) if values else UNKNOWN


def stderr(terms: Iterable[Term], *, total: bool = False) -> float | str:
    """Standard error of `score`, or `N/A` where the samples do not show it.

    With `u = (numerator - ratio * denominator) / sum of denominators`, added up in each of `c` clusters, it is
    `sqrt(c / (c - 1) * sum of squares)`. That is the standard deviation over the root of the number for a mean of
    independent samples, and the delta method for F1. A cluster may reach into several strata.

    It is not known if a stratum has fewer than two clusters, or if nothing is divided by.
    """
    strata = _strata(terms)
    weight = 1 if total else 1 / max(1, len(strata))
    influence: dict[str, float] = defaultdict(float)
    for own in strata:
        clusters = {term.cluster for term in own}
        whole = math.fsum(term.denominator for term in own)
        if len(clusters) < 2 or not whole:
            return UNKNOWN
        ratio = _ratio(own)
        for term in own:
            influence[term.cluster] += weight * (term.numerator - ratio * term.denominator) / whole
    count = len(influence)
    return math.sqrt(count / (count - 1) * math.fsum(u * u for u in influence.values())) if strata else UNKNOWN


def accuracy(rows: Sequence[Mapping[str, Any]]) -> float | str:
    """Mean of the rows' `score`."""
    return score(_of_rows(rows))


def accuracy_stderr(rows: Sequence[Mapping[str, Any]]) -> float | str:
    """Standard error of `accuracy`, clustered by the rows' `cluster`."""
    return stderr(_of_rows(rows))


def with_stderr(row: dict[str, Any], *metrics: str) -> dict[str, dict[str, Any]]:
    """`row` for each metric and for its standard error, in this order.

    lmms-eval keeps the standard error of metric `m` as `m_stderr` and can fill it only for its own plain mean; a task
    that lists a metric of that name behind `m` fills it itself, in the results as in the printed table.
    """
    return {name: row for metric in metrics for name in (metric, f"{metric}_stderr")}


def _of_rows(rows: Sequence[Mapping[str, Any]]) -> list[Term]:
    return [Term(row["score"], 1.0, row["cluster"]) for row in rows]


def _strata(terms: Iterable[Term]) -> list[list[Term]]:
    strata: dict[str, list[Term]] = defaultdict(list)
    for term in terms:
        strata[term.stratum].append(term)
    return list(strata.values())


def _ratio(terms: list[Term]) -> float:
    whole = math.fsum(term.denominator for term in terms)
    return math.fsum(term.numerator for term in terms) / whole if whole else 0.0
