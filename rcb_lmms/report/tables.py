"""The table of a folder of runs: numbers as CSV, the same numbers for readers as Markdown. What is missing is blank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from rcb_lmms.files import write_atomic
from rcb_lmms.report.collect import Excluded, Measured, left_out
from rcb_lmms.report.field import beside_published, readable_published
from rcb_lmms.report.summary import comparison_table, summary_table, version_notes

# Behind the point, of scores in percent and of others.
DIGITS = {100: 1, 1: 3}


def row_names(table: pd.DataFrame) -> list[str]:
    """What tells the rows of a summary or a comparison table from each other, their budget apart."""
    return [f"{row.method} ({row.options})" if row.options else row.method for row in table.itertuples()]


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """A summary table as text, for people: percent, intervals in brackets, blanks for what is missing."""
    unit, factor = ("GFLOPs", 1e3) if table["prefill_tflops"].max() < 0.1 else ("TFLOPs", 1.0)
    text = {"checkpoint": table["pretrained"].fillna("")} if table["pretrained"].nunique(dropna=False) > 1 else {}
    text |= {
        "method": row_names(table),
        "budget": [_budget(row) for row in table.itertuples()],
        "retained": _column(table["retained_tokens"], "{:.1f}"),
        "layer average": _column(table["layer_average_tokens"], "{:.1f}"),
    }
    for task, benchmark in table.attrs["benchmarks"].items():
        text[benchmark.heading] = [_accuracy(row, task, benchmark.unit) for _, row in table.iterrows()]
        if benchmark.official and f"{task}_score" in table:
            text[benchmark.official_label] = _column(table[f"{task}_score"], "{:.1f}")
    text["relative, %"] = _column(table["relative"], "{:.1f}")
    text["p vs random"] = [probability(p) for p in table["p_vs_random"]]
    for name, title in AGREEMENT.items():
        if name in table:
            text[title] = _column(100 * table[name].astype(float), "{:.1f}")
    text["questions/s"] = _column(table["questions_per_second"], "{:.1f}")
    text["processor ms"] = _column(1e3 * table["processor_seconds"].astype(float), "{:.1f}")
    text[f"prefill {unit}"] = _column(table["prefill_tflops"] * factor, "{:.3g}")
    text["choosing ms"] = _column(1e3 * table["choose_seconds"].astype(float), "{:.2f}")
    text["method GFLOPs"] = _column(1e3 * table["method_tflops"].astype(float), "{:.3g}")
    frame = pd.DataFrame(text, index=table.index)
    return frame.loc[:, (frame != "").any()]


def readable_comparisons(table: pd.DataFrame) -> pd.DataFrame:
    """A comparison table as text, differences in percentage points."""
    rows = [
        {
            "method": name,
            "tokens asked": f"{row.target_tokens:.1f}",
            "task": table.attrs["benchmarks"][row.task].label,
            "difference to random, points": _difference(row, table.attrs["benchmarks"][row.task].unit),
            "p": probability(row.p),
            "McNemar p": probability(row.mcnemar_p),
        }
        for name, row in zip(row_names(table), table.itertuples(), strict=True)
    ]
    return pd.DataFrame(rows)


def _difference(row: Any, unit: int) -> str:
    mean, low, high = (f"{unit * value:+.{DIGITS[unit]}f}" for value in (row.difference, row.low, row.high))
    return f"{mean} [{low}, {high}]"


def probability(p: float | None) -> str:
    """A p-value as text; 9999 draws resolve nothing finer than 0.0002."""
    if pd.isna(p):
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _budget(row: Any) -> str:
    """The budget as given, with the tokens that it means unless it says so itself."""
    if pd.isna(row.target_tokens) or row.budget.startswith("keep="):
        return row.budget
    return f"{row.budget} ({row.target_tokens:.1f} tokens)".strip()


def _accuracy(row: Any, task: str, unit: int) -> str:
    if pd.isna(row[f"{task}_accuracy"]):
        return ""
    mean, low, high = (f"{unit * row[f'{task}_{name}']:.{DIGITS[unit]}f}" for name in ("accuracy", "low", "high"))
    spread = "" if pd.isna(row[f"{task}_std"]) else f" ± {unit * row[f'{task}_std']:.{DIGITS[unit]}f}"
    return f"{mean}{spread} [{low}, {high}]"


def _column(values: pd.Series, form: str) -> list[str]:
    return ["" if pd.isna(value) else form.format(value) for value in values]


AGREEMENT = {
    "agreement": "same answer, %",
    "right_to_wrong": "right to wrong, %",
    "wrong_to_right": "wrong to right, %",
    "hard_accuracy": "hard samples, %",
}

LEGEND = """\
Accuracy in brackets: 95% confidence interval, a bootstrap over images; ±: standard deviation over seeds. Retained: \
visual tokens per question that the language model receives; layer average: over the layers of the decoder, which for \
FastV includes its full first layers. Relative: the paper's score of each task in percent of the unpruned model's, \
averaged over the tasks. p vs random: random pruning at the same budget, averaged over its seeds sample by sample; \
permutation of whole images, two-sided, all tasks together. `lmms_eval` logs no documents: questions of its results \
are taken for independent where their scores do not name what groups them. Same answer: share of all \
samples to which the unpruned model gives the same answer, case and spaces apart; right to wrong, wrong to right: \
answers that pruning loses and gains. Hard samples: accuracy on those that the unpruned model gets right and \
`downsample` at the same budget gets wrong (VTC-Bench's grouping)."""


PUBLISHED = "In percent of the unpruned model of the same table, here / as published (rcb_lmms/report/field.yaml):"


def write_tables(runs: Sequence[Measured], excluded: Sequence[Excluded], out: Path) -> pd.DataFrame:
    """Write `table.md`, `table.csv` and `comparisons.csv` to `out`; returns the summary table.

    Runs of the field's common table get what papers print for them beside it, in `published.csv` too.

    Raises:
        UserError: runs that cannot share a table, or a folder that cannot be written.
    """
    table, comparisons = summary_table(runs), comparison_table(runs)
    parts = [_markdown(readable(table)), LEGEND]
    if len(comparisons):
        parts += ["Against random pruning, task by task:", _markdown(readable_comparisons(comparisons))]
    published = beside_published(runs)
    if len(published):
        parts += [PUBLISHED, _markdown(readable_published(published))]
        write_atomic(out / "published.csv", published.to_csv(index=False, lineterminator="\n"))
    parts += version_notes((run.path, run.record) for run in runs)
    if excluded:
        parts += ["Left out:", "\n".join(f"- {line}" for line in left_out(excluded))]
    write_atomic(out / "table.md", "\n\n".join(parts) + "\n")
    write_atomic(out / "table.csv", table.to_csv(index=False, lineterminator="\n"))
    write_atomic(out / "comparisons.csv", comparisons.to_csv(index=False, lineterminator="\n"))
    return table


def for_terminal(table: pd.DataFrame) -> str:
    """A summary table as lines of plain text."""
    frame = readable(table)
    align = ["left", "left", *["right"] * (frame.shape[1] - 2)]
    options = {"tablefmt": "simple", "disable_numparse": True, "maxheadercolwidths": 12, "showindex": False}
    return tabulate(frame, headers="keys", colalign=align, **options)


def _markdown(frame: pd.DataFrame) -> str:
    align = ["left", *["right"] * (frame.shape[1] - 1)]
    return frame.to_markdown(index=False, disable_numparse=True, colalign=align)
