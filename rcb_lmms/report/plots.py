"""Accuracy over visual tokens per decoder layer: one panel per task, drawn from a summary table alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from rcb_lmms.lab.checkpoint import is_lab
from rcb_lmms.pruners import PRUNERS
from rcb_lmms.report.collect import Benchmark
from rcb_lmms.report.drawing import save_figure

# Colours that people with any colour vision tell apart (Okabe and Ito, 2008); markers differ as well.
STYLES = {
    "rcb": ("#D55E00", "o"),
    "prumerge": ("#0072B2", "s"),
    "prumerge_plus": ("#56B4E9", "D"),
    "fastv": ("#009E73", "^"),
    "random": ("#7F7F7F", "X"),
}
_OTHER_STYLES = (("#CC79A7", "v"), ("#E69F00", "P"), ("#F0E442", "*"))


def accuracy_plot(table: pd.DataFrame, out: Path) -> list[Path]:
    """Write `out` with the endings `.png` and `.svg`; equal tables give equal SVG files.

    Args:
        table: of `rcb_lmms.report.tables.summary_table`.
        out: path without ending.
    """
    return save_figure(_figure(table, table.attrs["benchmarks"]), out, ("png", "svg"))


def _figure(table: pd.DataFrame, benchmarks: Mapping[str, Benchmark]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.2 + 4.2 * len(benchmarks), 4.1), layout="constrained")
    panels = figure.subplots(1, len(benchmarks), squeeze=False)[0]
    for panel, (task, benchmark) in zip(panels, benchmarks.items(), strict=True):
        _panel(panel, table.dropna(subset=[f"{task}_accuracy"]), task, benchmark)
    handles = {label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    if table["pretrained"].astype(str).map(is_lab).all():
        figure.suptitle("laboratory model")
    columns = -(-len(handles) // 2)
    options = {"loc": "outside lower center", "ncols": columns, "frameon": False}
    figure.legend(list(handles.values()), list(handles), **options)
    return figure


def _panel(panel: Any, table: pd.DataFrame, task: str, benchmark: Benchmark) -> None:
    pruned = table[table["method"] != "none"]
    names = list(dict.fromkeys((row.method, row.options) for row in pruned.itertuples()))
    others = iter(_OTHER_STYLES * len(names))
    for method, options in names:
        chosen = pruned[(pruned["method"] == method) & (pruned["options"] == options)]
        chosen = chosen.sort_values("layer_average_tokens")
        mean, low, high = (benchmark.unit * chosen[f"{task}_{name}"] for name in ("accuracy", "low", "high"))
        label = PRUNERS[method].label if method in PRUNERS else method
        colour, marker = STYLES[method] if method in STYLES and not options else next(others)
        panel.errorbar(
            chosen["layer_average_tokens"],  # where a method costs: FastV's first layers see every token
            mean,
            yerr=[mean - low, high - mean],
            color=colour,
            marker=marker,
            markersize=6,
            linewidth=1.4,
            elinewidth=1,
            capsize=2.5,
            label=f"{label} ({options})" if options else label,
        )
    for row in table[table["method"] == "none"].itertuples():
        mean, low, high = (benchmark.unit * getattr(row, f"{task}_{name}") for name in ("accuracy", "low", "high"))
        panel.axhspan(low, high, color="black", alpha=0.08, linewidth=0, label="unpruned, 95% interval")
        panel.axhline(mean, color="black", linewidth=1.2, label=f"unpruned ({getattr(row, f'{task}_retained'):.0f})")
    if benchmark.chance is not None:
        panel.axhline(100 * benchmark.chance, color="black", linestyle=":", linewidth=1.2, label="chance")
    _axes(panel, pruned, benchmark)


def _axes(panel: Any, pruned: pd.DataFrame, benchmark: Benchmark) -> None:
    from matplotlib.ticker import NullLocator

    ticks = sorted({round(tokens) for tokens in pruned["layer_average_tokens"].dropna()})
    panel.set_xscale("log")
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    if ticks:
        panel.set_xlim(ticks[0] / 1.35, ticks[-1] * 1.35)
    panel.set_title(benchmark.label)
    panel.set_xlabel("visual tokens per decoder layer (log scale)")
    panel.set_ylabel("accuracy, % (95% interval)" if benchmark.unit == 100 else "score (95% interval)")
    panel.grid(axis="y", color="0.9", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
