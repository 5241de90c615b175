"""Density-peaks clustering over nearest neighbours (DPC-kNN), in the form the RCB code relies on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Clusters(NamedTuple):
    """A clustering of `n` points.

    Attributes:
        density: `(n,)` float64, tie breaker included; its logarithm with `literal`.
        delta: `(n,)` distance to the nearest point of higher density, for a peak see `dpc_knn`.
        centres: `(m,)` indices of the centres, best `density * delta` first; a label is a position in this list.
        labels: `(n,)` int64.
    """

    density: Tensor
    delta: Tensor
    centres: Tensor
    labels: Tensor


def tie_noise(n: int, seed: int = 0) -> Tensor:
    """`(n,)` float64 uniform on [0, 1e-6): tells apart points of equal density, the same ones on every machine."""
    return torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 1e-6


def dpc_knn(
    x: Tensor,
    clusters: int,
    k: int,
    noise: Tensor | None = None,
    *,
    include_self: bool = True,
    literal: bool = False,
) -> Clusters:
    """Cluster the rows of `x (n, c)` around density peaks.

    Source: TCFormer's `cluster_dpc_knn`, whose signature the RCB code imports (its own copy was not released), and
    the paper's Eq. 12-13. Differs: float64 throughout, since in float16 densities of different tokens coincide and
    the tie breaker vanishes; distances without the matmul shortcut, which makes duplicates differ; seeded noise.

    Args:
        x: points.
        clusters: number of centres; `n` if there are fewer points.
        k: neighbours in the density; as many as there are if there are fewer.
        noise: `(n,)` added to the densities; by default `tie_noise(n)`.
        include_self: count a point as its own first neighbour (released code) or not (paper).
        literal: Eq. 12 and 13 as printed. Distances are not divided by the square root of `c`; a peak's delta is the
            largest distance of its own row, not of all; there is no tie breaker. Compared are logarithms, since the
            densities themselves underflow.
    """
    x = x.double().cpu()
    n = len(x)
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    if literal:
        density = _log_density(distance, k, include_self)
        peak = distance.amax(-1)
    else:
        distance = distance / x.shape[1] ** 0.5
        density = _log_density(distance, k, include_self).exp() + (tie_noise(n) if noise is None else noise.double())
        peak = distance.amax()
    delta = distance.where(density[None, :] > density[:, None], torch.inf).amin(-1)
    delta = delta.where(delta.isfinite(), peak)
    best = density + delta.log() if literal else density * delta
    centres = best.argsort(descending=True, stable=True)[:clusters]
    labels = distance[:, centres].argmin(-1)
    labels[centres] = torch.arange(len(centres))  # a duplicate of a better centre is nearer to that one
    return Clusters(density, delta, centres, labels)


def _log_density(distance: Tensor, k: int, include_self: bool) -> Tensor:
    n = len(distance)
    if not include_self:
        distance = distance.masked_fill(torch.eye(n, dtype=torch.bool), torch.inf)
    k = min(k, n if include_self else n - 1)
    if k == 0:
        return distance.new_zeros(n)
    return -distance.topk(k, largest=False).values.square().mean(-1)
