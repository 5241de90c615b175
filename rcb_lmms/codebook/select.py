"""From stored statistics to prototypes: four thresholds and two clusterings, without a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rcb_lmms.codebook.divergence import divergence, top1_probability
from rcb_lmms.codebook.dpc import dpc_knn, tie_noise
from rcb_lmms.codebook.probe import ImageStatistics
from rcb_lmms.codebook.settings import TOP_K_STORED, BuildSettings


@dataclass(frozen=True)
class Candidates:
    """Redundant candidates of one image.

    Attributes:
        features: `(c, d)` projector outputs.
        patches: `(c,)` raster indices.
        passed: how many probed patches passed each test, the funnel of the image.
    """

    features: Tensor
    patches: Tensor
    passed: dict[str, int]


def patch_scores(statistics: ImageStatistics, settings: BuildSettings) -> tuple[Tensor, Tensor]:
    """Top-1 probability `(p,)` and weighted divergence `(p,)` in nats of the probed patches (Eq. 6 and 11)."""
    single = top1_probability(statistics.single, TOP_K_STORED)
    region = divergence(statistics.region, statistics.region_ablated, settings.top_k, settings.preset)
    whole = statistics.whole.expand_as(statistics.whole_ablated)
    return single, settings.k_region * region + settings.k_global * divergence(
        whole, statistics.whole_ablated, settings.top_k, settings.preset
    )


def candidates(statistics: ImageStatistics, settings: BuildSettings) -> Candidates:
    """The probed patches that are unrecognisable, unneeded, and outliers of their image."""
    probability, jsd = patch_scores(statistics, settings)
    unrecognisable, unneeded = probability < settings.tau_prob, jsd < settings.tau_jsd
    # Rows of `features` that belong to the probed patches, in the order of `index`.
    rows = statistics.index if settings.cluster_input == "all" else torch.arange(len(statistics.index))
    labels = cluster_labels(statistics.features, settings.clusters_per_image, settings.k_image, settings)
    size = labels.bincount()[labels][rows]
    outlier = size < settings.tau_out if settings.by_paper else size <= settings.tau_out
    chosen = unrecognisable & unneeded & outlier
    passed = {
        "probed": len(probability),
        "p1 < tau_prob": int(unrecognisable.sum()),
        "JSD < tau_jsd": int(unneeded.sum()),
        "cluster within tau_out": int(outlier.sum()),
        "p1 and JSD": int((unrecognisable & unneeded).sum()),
        "candidates": int(chosen.sum()),
    }
    return Candidates(statistics.features[rows[chosen]], statistics.index[chosen], passed)


def common_clusters(tokens: Tensor, images: Tensor, settings: BuildSettings) -> list[Tensor]:
    """Positions of the candidates that are prototypes, one ascending tensor per surviving cluster.

    Args:
        tokens: `(c, d)` candidates of all images, in image order.
        images: `(c,)` number of each one's image.
        settings: `clusters_across`, `k_across`, `tau_in` and the rules.

    Returns:
        clusters in the order of their first candidate.
    """
    labels = cluster_labels(tokens, settings.clusters_across, settings.k_across, settings)
    members = [(labels == label).nonzero().flatten() for label in dict.fromkeys(labels.tolist())]
    return [
        rows for rows in members if (len(rows) if settings.by_paper else len(images[rows].unique())) > settings.tau_in
    ]


def cluster_labels(tokens: Tensor, clusters: int, k: int, settings: BuildSettings) -> Tensor:
    """`(n,)` cluster of each of `tokens (n, d)`, by the clustering of a codebook's build."""
    noise = tie_noise(len(tokens), settings.seed)
    literal = settings.preset == "paper_literal"
    return dpc_knn(tokens, clusters, k, noise, include_self=not settings.by_paper, literal=literal).labels


def describe_funnel(counts: dict[str, int], settings: BuildSettings) -> str:
    """One line that says how many patches passed each threshold."""
    return (
        f"{counts['images']} images, {counts['probed']} probed patches: "
        f"{counts['p1 < tau_prob']} with p1 < {settings.tau_prob:g}, "
        f"{counts['JSD < tau_jsd']} with JSD < {settings.tau_jsd:g}, "
        f"{counts['cluster within tau_out']} in clusters within {settings.tau_out}, {counts['p1 and JSD']} by p1 and "
        f"JSD, {counts['candidates']} candidates from {counts['images with candidates']} images, "
        f"{counts['prototypes']} in clusters over {settings.tau_in}"
    )


def join(found: list[Candidates]) -> tuple[Tensor, Tensor, Tensor]:
    """All images' candidates: tokens `(c, d)`, patches `(c,)` and image numbers `(c,)`."""
    numbers = [torch.full((len(image.patches),), number) for number, image in enumerate(found)]
    features, patches = ([getattr(image, name) for image in found] for name in ("features", "patches"))
    return torch.cat(features), torch.cat(patches), torch.cat(numbers)
