"""Density-peaks clustering over nearest neighbours (DPC-kNN), in the form the RCB code relies on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Clusters(NamedTuple):
    """A clustering of `n` points.

    Attributes:
        density: `(n,)` float64, tie breaker included.
        delta: `(n,)` distance to the nearest point of higher density; the largest distance of all where there is none.
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
    scale: bool = True,
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
        scale: divide distances by the square root of `c`. The paper's literal form omits it and underflows.
    """
    x = x.double().cpu()
    n = len(x)
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / (x.shape[1] ** 0.5 if scale else 1)
    density = _density(distance, k, include_self) + (tie_noise(n) if noise is None else noise.double())
    higher = density[None, :] > density[:, None]
    delta = distance.where(higher, torch.inf).amin(-1)
    delta = delta.where(delta.isfinite(), distance.amax())
    centres = (density * delta).argsort(descending=True, stable=True)[:clusters]
    labels = distance[:, centres].argmin(-1)
    labels[centres] = torch.arange(len(centres))  # a duplicate of a better centre is nearer to that one
    return Clusters(density, delta, centres, labels)


def _density(distance: Tensor, k: int, include_self: bool) -> Tensor:
    n = len(distance)
    if not include_self:
        distance = distance.masked_fill(torch.eye(n, dtype=torch.bool), torch.inf)
    k = min(k, n if include_self else n - 1)
    if k == 0:
        return distance.new_ones(n)
    return (-distance.topk(k, largest=False).values.square().mean(-1)).exp()
