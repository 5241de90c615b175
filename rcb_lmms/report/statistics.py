"""What a difference is worth. Questions about one image are not independent, so every test resamples images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest, bootstrap, permutation_test

RESAMPLES = 9999
CONFIDENCE = 0.95
# Bounds the memory of resampling: resamples drawn at once times clusters.
_BATCH_VALUES = 4_000_000


class Interval(NamedTuple):
    """A mean and the ends of its 95% confidence interval."""

    mean: float
    low: float
    high: float


def cluster_sums(values: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per cluster, the sum of its values and their number, each `(c,)`."""
    _, index = np.unique(clusters, return_inverse=True)
    return np.bincount(index, weights=values), np.bincount(index).astype(float)


def accuracy_interval(values: np.ndarray, clusters: np.ndarray) -> Interval:
    """Mean score in [0, 1] with a percentile bootstrap over clusters, `values (n,)`, `clusters (n,)`.

    If all samples are right or all are wrong, resampling sees no variation; then the interval is Clopper and Pearson's,
    with whole clusters as trials.
    """
    mean = float(values.mean())
    if mean in (0.0, 1.0) and (values == mean).all():
        number = len(set(clusters.tolist()))
        bounds = binomtest(int(mean) * number, number).proportion_ci(CONFIDENCE, "exact")
        return Interval(mean, float(bounds.low), float(bounds.high))
    return mean_interval(values, clusters)


def mean_interval(values: np.ndarray, clusters: np.ndarray) -> Interval:
    """Mean of any values, such as differences of two methods' scores, with a percentile bootstrap over clusters."""
    mean = float(values.mean())
    sums, counts = cluster_sums(values, clusters)
    if len(sums) < 2 or np.ptp(values) == 0:
        return Interval(mean, mean, mean)
    bounds = bootstrap(
        (sums, counts),
        lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
        paired=True,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        batch=max(1, _BATCH_VALUES // len(sums)),
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(mean, float(bounds.low), float(bounds.high))


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Exact two-sided McNemar p of two methods' right and wrong answers, each `(n,)` of 0 and 1.

    Takes questions for independent, which those about one image are not: `paired_p` is the test to quote.

    Raises:
        ValueError: scores that are neither 0 nor 1.
    """
    if not np.isin(np.concatenate([first, second]), (0, 1)).all():
        raise ValueError("McNemar's test needs scores of 0 and 1")
    gains, losses = int(np.sum(first > second)), int(np.sum(first < second))
    return float(binomtest(gains, gains + losses).pvalue) if gains + losses else 1.0


def paired_p(pairs: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> float:
    """Two-sided permutation p of the difference between two methods on the same samples.

    Whole clusters swap their two methods. Exact if there are few clusters, otherwise from 9999 draws with a fixed seed.

    Args:
        pairs: per task, the scores of both methods and the clusters, each `(n,)`; with several tasks the statistic is
            the mean over tasks of the differences in mean score.
    """
    per_task = [[cluster_sums(values, clusters)[0] / len(values) for values in two] for *two, clusters in pairs]
    first, second = (np.concatenate(sums) for sums in zip(*per_task, strict=True))
    differing = first != second
    if differing.sum() < 2:  # swapped or not, one difference is as large
        return 1.0
    result = permutation_test(
        (first[differing], second[differing]),
        lambda first, second, axis: (first - second).sum(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, _BATCH_VALUES // len(first)),
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)
