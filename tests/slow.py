"""Slow, literal versions of a codebook's mathematics: Python floats and loops."""

from __future__ import annotations

import math


def softmax(values):
    weights = [math.exp(value - max(values)) for value in values]
    return [weight / sum(weights) for weight in weights]


def slow_dpc(x, clusters, k, noise, include_self=True, literal=False):
    """Density peaks by the book: Python floats and loops; `literal` is Eq. 12 and 13 as printed, in logarithms."""
    n, width = len(x), len(x[0])
    d = [[math.dist(x[i], x[j]) / (1 if literal else math.sqrt(width)) for j in range(n)] for i in range(n)]
    density = []
    for i in range(n):
        near = sorted(d[i][j] for j in range(n) if include_self or j != i)[:k]
        exponent = -sum(v * v for v in near) / len(near)
        density.append(exponent if literal else math.exp(exponent) + noise[i])
    largest = [max(row) for row in d] if literal else [max(map(max, d))] * n
    delta = [min([d[i][j] for j in range(n) if density[j] > density[i]], default=largest[i]) for i in range(n)]
    better = [density[i] + math.log(delta[i]) if literal else delta[i] * density[i] for i in range(n)]
    centres = sorted(range(n), key=lambda i: -better[i])[:clusters]
    labels = [
        centres.index(i) if i in centres else min(range(len(centres)), key=lambda c: d[i][centres[c]]) for i in range(n)
    ]
    return density, delta, centres, labels
