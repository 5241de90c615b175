"""The feature space of visual tokens (paper 8.1, Figures 7 and 8): where tokens that say nothing lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import mannwhitneyu

from rcb_lmms.analysis.images import Shown
from rcb_lmms.analysis.tokens import read_tokens
from rcb_lmms.codebook.build import read_candidates
from rcb_lmms.codebook.select import cluster_labels, common_clusters, join
from rcb_lmms.codebook.settings import BuildSettings
from rcb_lmms.engine.session import Session
from rcb_lmms.errors import UserError, choose
from rcb_lmms.report.drawing import drawable, save_figure

METHODS = ("tsne", "pca")
NAMED_TOKENS = 10


def embed(tokens: np.ndarray, method: str, seed: int = 0) -> np.ndarray:
    """`(n, 2)` positions of `tokens (n, d)` in the plane, by scikit-learn.

    Raises:
        UserError: an unknown method, or fewer than three tokens.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    choose("method", method, METHODS)
    if len(tokens) < 3:
        raise UserError(
            wanted="a picture of the feature space",
            found=f"{len(tokens)} tokens",
            allowed="three or more",
            next_step="name an image with more tokens, or statistics with more candidates",
        )
    if method == "pca":
        return PCA(2, svd_solver="full").fit_transform(tokens)
    perplexity = min(30, (len(tokens) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(tokens)


def image_features(session: Session, shown: Shown, settings: BuildSettings, method: str) -> pd.DataFrame:
    """One row per token of an image: `x`, `y`, `word`, `probability`, `cluster`, `cluster_size`, `cls_similarity`.

    The clusters are those of building a codebook with all tokens of an image (paper 8.1).
    """
    tokens = shown.view.features.float().cpu()
    readings, _ = read_tokens(session, shown, range(len(tokens)), settings, [1])
    labels = cluster_labels(tokens, settings.clusters_per_image, settings.k_image, settings)
    position = embed(tokens.numpy(), method, settings.seed)
    table = pd.DataFrame([row.cells() for row in readings])[["token", "word", "probability", "cls_similarity"]]
    sizes = labels.bincount()[labels]
    return table.assign(x=position[:, 0], y=position[:, 1], cluster=labels.numpy(), cluster_size=sizes.numpy())


def explain_outliers(table: pd.DataFrame, tau_prob: float) -> str:
    """Whether tokens that say nothing lie in smaller clusters than the others (paper: they are outliers)."""
    silent = table["probability"] < tau_prob
    small, large = table["cluster_size"][silent], table["cluster_size"][~silent]
    told = f"{silent.sum()} of {len(table)} tokens stay below a top-1 probability of {tau_prob:g}"
    if not len(small) or not len(large):
        return f"{told}: there is nothing to compare."
    p = float(mannwhitneyu(small, large).pvalue)
    return (
        f"{told}; their clusters have {small.median():g} tokens in the median, those of the others {large.median():g} "
        f"(Mann-Whitney p = {p:.1g}), where the paper calls them outliers: "
        + ("too few differ to say." if p >= 0.05 else "as here." if small.median() < large.median() else "not here.")
    )


def candidate_map(stats: Path, settings: BuildSettings, method: str) -> tuple[pd.DataFrame, str]:
    """The redundant candidates of many images in the plane, from a build's statistics; no model is needed.

    Returns:
        one row per candidate: `x`, `y`, `image`, `token`, `common`, whether it is a prototype; and in words how many
        candidates there are, and how many lie where many images do.

    Raises:
        UserError: no statistics, or fewer than three candidates.
    """
    manifest, found = read_candidates(stats, settings)
    names = [entry["name"] for entry in manifest["images"]]
    tokens, patches, numbers = join(found)
    position = embed(tokens.float().numpy(), method, settings.seed)
    common = np.zeros(len(tokens), bool)
    common[torch.cat([*common_clusters(tokens, numbers, settings), torch.arange(0)]).numpy()] = True
    columns = {"x": position[:, 0], "y": position[:, 1], "token": patches.numpy(), "common": common}
    table = pd.DataFrame(columns).assign(image=[names[number] for number in numbers.tolist()])
    told = (
        f"{len(table)} candidates from {table['image'].nunique()} of {len(names)} images; {common.sum()} of "
        f"them, from {table['image'][common].nunique()} images, lie in clusters that are common to many."
    )
    return table, told


def draw_features(table: pd.DataFrame, out: Path) -> list[Path]:
    """Write Figure 7: an image's tokens coloured by top-1 probability, by cluster and by similarity to CLS."""
    panels: dict[str, tuple[Any, str]] = {
        "top-1 probability": (table["probability"], "viridis"),
        "cluster": (table["cluster"], "tab20"),
    }
    if table["cls_similarity"].notna().all():
        panels["similarity to CLS"] = (table["cls_similarity"].astype(float), "viridis")
    figure = _scatter(table, panels)
    first = figure.axes[0]
    for row in table.nlargest(NAMED_TOKENS, "probability").itertuples():
        first.annotate(drawable(row.word), (row.x, row.y), (2, 2), textcoords="offset points", fontsize=6)
    return save_figure(figure, out)


def draw_candidate_map(table: pd.DataFrame, out: Path) -> list[Path]:
    """Write Figure 8: candidates coloured by image, and beside it those that became prototypes."""
    images = pd.Series(pd.factorize(table["image"])[0])
    # Neighbouring numbers get colours far apart: the palette is gone through in large steps.
    panels = {
        "image": ((images * 0.6180339887) % 1, "hsv"),
        "common to many images": (table["common"].astype(float), "cividis"),
    }
    return save_figure(_scatter(table, panels, bars=False), out)


def _scatter(table: pd.DataFrame, panels: Mapping[str, tuple[Sequence, str]], bars: bool = True) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, (title, (values, colours)) in zip(axes, panels.items(), strict=True):
        points = panel.scatter(table["x"], table["y"], c=values, cmap=colours, s=14, linewidths=0)
        panel.set_title(title, fontsize=9)
        panel.set_xticks([])
        panel.set_yticks([])
        if bars:
            figure.colorbar(points, ax=panel, shrink=0.85).ax.tick_params(labelsize=7)
    return figure
