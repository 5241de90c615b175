"""Statistics over a data set (paper 3.2, 7.4, Figure 4): do tokens that others call unimportant say and change less?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr, t, wilcoxon
from tqdm import tqdm

from rcb_lmms.analysis.images import open_shown
from rcb_lmms.analysis.tokens import text_to_image_attention
from rcb_lmms.codebook.probe import measure, uniform_grid
from rcb_lmms.codebook.select import patch_scores
from rcb_lmms.codebook.settings import BuildSettings
from rcb_lmms.engine.session import Session
from rcb_lmms.errors import UserError
from rcb_lmms.report.drawing import save_figure

ORDERS = {"cls_similarity": "similarity to CLS", "attention": "text-to-image attention"}
VALUES = {"probability": "top-1 probability", "divergence": "divergence (nats)"}
LEVEL = 0.05
# What the paper calls high confidence in its examples (3.2: 40% to 80%).
CONFIDENT = 0.4


def measure_images(
    session: Session,
    images: Sequence[str | Path],
    settings: BuildSettings,
    layers: Sequence[int],
    patches: int = 64,
) -> pd.DataFrame:
    """One row per patch of an even grid: `image`, `token`, the two `VALUES`, and those of `ORDERS` that there are.

    Args:
        session: its method is not used; its `batch_size` is.
        images: files.
        settings: as in building a codebook.
        layers: decoder layers, from 1, whose attention (mean over heads) is summed.
        patches: about so many per image; the side of the grid is the rounded root.
    """
    tables = []
    for image in tqdm(images, "images", unit="image"):
        shown = open_shown(session, image)
        index = uniform_grid(*shown.view.grid, patches)
        statistics = measure(session.family, shown.view, settings, session.batch_size, index)
        probability, divergence = patch_scores(statistics, settings)
        attention = sum(text_to_image_attention(session.family, shown, settings.prompt, layers).values())
        columns = {"token": index, "probability": probability.numpy(), "divergence": divergence.numpy()}
        columns["attention"] = attention[index]
        if shown.cls_similarity is not None:
            columns["cls_similarity"] = shown.cls_similarity[index]
        tables.append(pd.DataFrame(columns).assign(image=shown.name))
    return pd.concat(tables, ignore_index=True)


@dataclass(frozen=True)
class Curve:
    """A value over the rank by an order, averaged over images; `k` patches per image.

    Attributes:
        order: one of `ORDERS`, highest first.
        value: one of `VALUES`.
        mean: `(k,)`.
        half_width: `(k,)` of the 95% confidence interval (Student's t over images).
        key: `(k,)` mean of the order's own quantity.
        correlation: mean over images of Spearman's rank correlation of the two quantities within an image.
        p: of Wilcoxon's signed-rank test that these correlations lie around zero.
        first: mean of the value over the quarter of patches of highest order.
        middle: over the half between.
        last: over the quarter of lowest order.
    """

    order: str
    value: str
    mean: np.ndarray
    half_width: np.ndarray
    key: np.ndarray
    correlation: float
    p: float
    first: float
    middle: float
    last: float

    @property
    def falls(self) -> bool:
        """Whether the value falls as the order does."""
        return self.p < LEVEL and self.correlation > 0


def curves(table: pd.DataFrame) -> list[Curve]:
    """The curves of Figure 4, for every order that the table has.

    Raises:
        UserError: fewer than two images, over which nothing can be averaged.
    """
    count = table["image"].nunique()
    if count < 2:
        raise UserError(
            wanted="curves over a data set",
            found=f"{count} image",
            allowed="two images or more; the paper has 100",
            next_step="name a folder with more images",
        )
    return [_curve(table, order, value) for order in ORDERS if order in table for value in VALUES]


def _curve(table: pd.DataFrame, order: str, value: str) -> Curve:
    ranked = table.sort_values(["image", order], ascending=[True, False], kind="stable")
    images = ranked["image"].nunique()
    values = ranked[value].to_numpy().reshape(images, -1)
    keys = ranked[order].to_numpy().reshape(images, -1)
    # Where one of both is constant within an image, there is no trend: its correlation counts as zero.
    pairs = zip(keys, values, strict=True)
    own = [spearmanr(key, row).statistic if np.ptp(key) and np.ptp(row) else 0.0 for key, row in pairs]
    quarter = max(1, values.shape[1] // 4)
    return Curve(
        order=order,
        value=value,
        mean=values.mean(0),
        half_width=t.ppf(0.975, images - 1) * values.std(0, ddof=1) / np.sqrt(images),
        key=keys.mean(0),
        correlation=float(np.mean(own)),
        p=float(wilcoxon(own).pvalue) if np.any(own) else 1.0,
        first=float(values[:, :quarter].mean()),
        middle=float(values[:, quarter:-quarter].mean()),
        last=float(values[:, -quarter:].mean()),
    )


def explain_curves(found: Sequence[Curve], table: pd.DataFrame) -> str:
    """What holds of the paper's claim (values do not fall with similarity or attention) and what does not."""
    parts = []
    for curve in found:
        verb = "falls" if curve.falls else "is not seen to fall"
        parts.append(
            f"{VALUES[curve.value]} {verb} with {ORDERS[curve.order]} ({curve.first:.3g} in the highest quarter, "
            f"{curve.middle:.3g} between, {curve.last:.3g} in the lowest; mean "
            f"rank correlation {curve.correlation:+.2f}, p = {curve.p:.1g})"
        )
    against = sum(curve.falls for curve in found)
    # What few images do not show is no proof that it is not there.
    claim = "is not contradicted" if not against else "does not hold" if against == len(found) else "fails in part"
    size = f"{table['image'].nunique()} images, {len(table)} patches"
    words = [
        f"of the quarter of lowest {ORDERS[order]}, {share:.0%} say a word with a probability of {CONFIDENT} or more"
        for order, share in confident_shares(table).items()
    ]
    return f"The paper's claim that neither falls {claim} here ({size}): " + "; ".join(parts + words) + "."


def confident_shares(table: pd.DataFrame) -> dict[str, float]:
    """Order -> share of patches in an image's lowest quarter by it whose top-1 probability is `CONFIDENT` or more."""
    shares = {}
    for order in (name for name in ORDERS if name in table):
        rank = table.groupby("image")[order].rank(method="first")
        lowest = table[rank <= table.groupby("image")[order].transform("size") // 4]
        shares[order] = float((lowest["probability"] >= CONFIDENT).mean())
    return shares


def curve_facts(curve: Curve) -> dict[str, Any]:
    """A curve as plain values."""
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in vars(curve).items()} | {
        "falls": curve.falls
    }


def draw_curves(found: Sequence[Curve], out: Path) -> list[Path]:
    """Write Figure 4: one row per order, one column per value, with confidence bands and the order's own quantity."""
    from matplotlib.figure import Figure

    orders = list(dict.fromkeys(curve.order for curve in found))
    figure = Figure(figsize=(9.5, 3.1 * len(orders)), layout="constrained")
    panels = figure.subplots(len(orders), len(VALUES), squeeze=False)
    for curve in found:
        panel = panels[orders.index(curve.order)][list(VALUES).index(curve.value)]
        rank = np.arange(1, len(curve.mean) + 1)
        other = panel.twinx()
        other.plot(rank, curve.key, color="0.6", linestyle="--", linewidth=1)
        other.set_ylabel(ORDERS[curve.order], color="0.4", fontsize=8)
        low, high = curve.mean - curve.half_width, curve.mean + curve.half_width
        panel.fill_between(rank, low, high, color="#0072B2", alpha=0.2, linewidth=0)
        panel.plot(rank, curve.mean, color="#0072B2", linewidth=1.4)
        panel.set_ylabel(VALUES[curve.value], color="#0072B2", fontsize=8)
        panel.set_xlabel(f"rank by falling {ORDERS[curve.order]}", fontsize=8)
        panel.set_title(f"rank correlation {curve.correlation:+.2f}, p = {curve.p:.1g}", fontsize=9)
        for axis in (panel, other):
            axis.tick_params(labelsize=7)
            axis.spines["top"].set_visible(False)
    return save_figure(figure, out)
