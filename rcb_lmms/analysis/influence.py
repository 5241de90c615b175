"""The context-centric view (paper 3.1.2, 7.3, Figures 2, 3, 6): what changes in the answer without a visual token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

from rcb_lmms.analysis.images import Shown
from rcb_lmms.codebook.divergence import divergence
from rcb_lmms.codebook.probe import ImageStatistics, Probe, measure, window
from rcb_lmms.codebook.settings import BuildSettings
from rcb_lmms.engine.session import Session
from rcb_lmms.report.drawing import drawable, save_figure

LEVELS = ("region", "global", "direct")


@dataclass(frozen=True)
class Influence:
    """Divergences of an image's tokens, in nats; `p` tokens.

    Attributes:
        statistics: of the single-token and the cascaded experiments.
        region: `(p,)` the 3 x 3 window without the token.
        whole: `(p,)` the view without the window.
        combined: `(p,)` both, weighted (Eq. 11).
        direct: `(p,)` the view without the token alone (Figure 6).
        direct_logits: `(p, t)` of that run, at the ids of the intact view.
        noise: divergence between the intact view and itself with every value moved by one rounding step of its type.
    """

    statistics: ImageStatistics
    region: Tensor
    whole: Tensor
    combined: Tensor
    direct: Tensor
    direct_logits: Tensor
    noise: float

    def logits(self, level: str, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, logits with and logits without the token number `row`, each `(t,)`, at one of `LEVELS`."""
        own = self.statistics
        if level == "region":
            return own.region_ids[row], own.region[row], own.region_ablated[row]
        without = own.whole_ablated if level == "global" else self.direct_logits
        return own.whole_ids[0], own.whole[0], without[row]


def influence(session: Session, shown: Shown, tokens: Sequence[int], settings: BuildSettings) -> Influence:
    """Run the cascaded and the direct leave-one-out experiments on some tokens of an image.

    Args:
        session: its method is not used; its `batch_size` is.
        shown: the image.
        tokens: raster indices.
        settings: as in building a codebook: prompt, article rule, divergence and its weights.
    """
    family, features = session.family, shown.view.features
    windows = {tuple(window(token, *shown.view.grid)) for token in tokens}
    with tqdm(total=3 * len(tokens) + 2 * len(windows) + 1, desc="prompts") as bar:
        found = measure(family, shown.view, settings, session.batch_size, tokens, bar)
        pad = family.pad_embedding.to(features)
        probe = Probe(family, features, settings, session.batch_size, bar)
        rounded, _ = probe.logits([_one_step_off(features)], skip=[probe.skips])
        without = [torch.cat([pad[None], features[token + 1 :]]) for token in tokens]
        direct, _ = probe.logits(without, tokens, skip=[probe.skips] * len(tokens))
    direct_logits = direct.gather(-1, found.whole_ids.to(direct.device).expand(len(tokens), -1)).cpu()
    rule = {"top_k": settings.top_k, "preset": settings.preset}
    region = divergence(found.region, found.region_ablated, **rule)
    whole = divergence(found.whole.expand_as(found.whole_ablated), found.whole_ablated, **rule)
    return Influence(
        statistics=found,
        region=region,
        whole=whole,
        combined=settings.k_region * region + settings.k_global * whole,
        direct=divergence(found.whole.expand_as(direct_logits), direct_logits, **rule),
        direct_logits=direct_logits,
        noise=float(divergence(probe.whole, rounded[0], **rule)),
    )


def _one_step_off(values: Tensor) -> Tensor:
    """Values moved up or down, at random, by one rounding step of their type: an error that any computation makes."""
    signs = torch.rand(values.shape, generator=torch.Generator().manual_seed(0)).sub(0.5).sign()
    return values * (1 + torch.finfo(values.dtype).eps * signs).to(values)


def influence_table(shown: Shown, found: Influence) -> pd.DataFrame:
    """One row per token: its place, its divergences, its similarity to CLS."""
    index = found.statistics.index.numpy()
    table = pd.DataFrame(
        {
            "token": index,
            "row": index // shown.view.grid[1],
            "column": index % shown.view.grid[1],
            "jsd_region": found.region.numpy(),
            "jsd_global": found.whole.numpy(),
            "jsd_combined": found.combined.numpy(),
            "jsd_direct": found.direct.numpy(),
        }
    )
    if shown.cls_similarity is not None:
        table["cls_similarity"] = shown.cls_similarity[index]
    return table


def candidate_changes(session: Session, found: Influence, rows: Sequence[int], count: int = 6) -> pd.DataFrame:
    """The candidates whose logits move most when tokens go (Figure 3), at each of `LEVELS`, by falling change.

    Args:
        session: whose tokenizer names candidates.
        found: the experiments.
        rows: numbers of tokens among those that were ablated.
        count: candidates for each token and level, out of the 50 likeliest.
    """
    lines = []
    for row in rows:
        for level in LEVELS:
            ids, intact, without = found.logits(level, row)
            for place in (intact - without).abs().argsort(descending=True, stable=True)[:count].tolist():
                word = session.family.tokenizer.decode([int(ids[place])]).strip() or repr(int(ids[place]))
                with_token, without_token = float(intact[place]), float(without[place])
                lines.append(
                    {
                        "token": int(found.statistics.index[row]),
                        "level": level,
                        "candidate": word,
                        "with": with_token,
                        "without": without_token,
                        "change": with_token - without_token,
                    }
                )
    return pd.DataFrame(lines)


def explain_cascade(found: Influence) -> tuple[dict[str, Any], str]:
    """Why tokens are not left out one by one: numbers, and a sentence of them (paper 7.3, Figure 6)."""

    def spread(values: Tensor) -> dict[str, float]:
        low, middle, high = torch.quantile(values.double(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
        return {"p10": low, "median": middle, "p90": high}

    facts: dict[str, Any] = {
        "tokens": len(found.direct),
        "noise": found.noise,
        **{name: spread(getattr(found, name)) for name in ("region", "whole", "combined", "direct")},
        "direct_within_noise": int((found.direct <= found.noise).sum()),
        "answers_changed": {level: changed_answers(found, level) for level in LEVELS},
    }
    told = (
        f"Without one token the view's prediction moves by {facts['direct']['median']:.1e} nats in the median (10% to "
        f"90%: {facts['direct']['p10']:.1e} to {facts['direct']['p90']:.1e}), without its 3 x 3 window by "
        f"{facts['whole']['median']:.1e}, and the window without the token by {facts['region']['median']:.1e}; "
        f"one rounding step in every value moves it by {found.noise:.1e}, which is more than without one token for "
        f"{facts['direct_within_noise']} of {len(found.direct)} tokens. The likeliest candidate changes for "
        + ", ".join(f"{count} ({level})" for level, count in facts["answers_changed"].items())
        + " of them."
    )
    if len(found.direct) > 2:
        rank = spearmanr(found.direct.numpy(), found.combined.numpy())
        facts["rank_correlation"] = {"direct_combined": float(rank.statistic), "p": float(rank.pvalue)}
        told += f" Direct and cascaded divergence rank the tokens alike by {rank.statistic:+.2f} (Spearman)."
    return facts, told


def changed_answers(found: Influence, level: str) -> int:
    """For how many tokens the likeliest candidate is another one without it, at one of `LEVELS`."""
    pairs = [found.logits(level, row)[1:] for row in range(len(found.direct))]
    return sum(int(intact.argmax()) != int(without.argmax()) for intact, without in pairs)


def influence_maps(shown: Shown, found: Influence) -> dict[str, Any]:
    """Title -> `(n,)` values for overlays."""
    titles = {"region": found.region, "global": found.whole, "combined": found.combined, "direct": found.direct}
    maps = {}
    for title, values in titles.items():
        maps[f"divergence, {title} (nats)"] = drawn = np.full(len(shown.view), np.nan)
        drawn[found.statistics.index.numpy()] = values.numpy()
    return maps


def draw_candidates(changes: pd.DataFrame, out: Path) -> list[Path]:
    """Write Figure 3: for each token and level, the logits with and without it of the candidates that move most."""
    from matplotlib.figure import Figure

    tokens = list(dict.fromkeys(changes["token"]))
    figure = Figure(figsize=(9, 2.3 * len(tokens) + 0.4), layout="constrained")
    panels = figure.subplots(len(tokens), len(LEVELS), squeeze=False)
    for line, token in zip(panels, tokens, strict=True):
        for panel, level in zip(line, LEVELS, strict=True):
            own = changes[(changes["token"] == token) & (changes["level"] == level)]
            place = np.arange(len(own))
            panel.bar(place - 0.2, own["with"], 0.4, color="#0072B2", label="with the token")
            panel.bar(place + 0.2, own["without"], 0.4, color="#E69F00", label="without it")
            panel.set_xticks(place, [*map(drawable, own["candidate"])], rotation=30, ha="right", fontsize=7)
            panel.set_title(f"token {token}, {level}: {own['change'].abs().max():.2g} at most", fontsize=8)
            panel.tick_params(axis="y", labelsize=7)
            panel.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("logit", fontsize=8)
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return save_figure(figure, out)
