"""The numbers of the paper's tables: every cell beside the printed one, and methods against each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from rcb_lmms.report.agreement import agreement_columns
from rcb_lmms.report.cells import Cell, PaperTable
from rcb_lmms.report.published import Block, Column, Layout, Row, layouts
from rcb_lmms.report.statistics import mean_interval, paired_p

SHARED = ("agreement", "right_to_wrong", "wrong_to_right", "hard_accuracy", "hard_samples")


def numbers(table: PaperTable) -> pd.DataFrame:
    """One row per cell and average: where it is printed, the printed and the measured number, absolute and relative.

    Columns: `table`, `block`, `row`, `column`, `place`, `published`, `published_std`, `published_tokens`,
    `published_relative`, `measured`, `measured_std` (over seeds), `seeds`, `relative` (to the unpruned model, in
    percent), `retained_tokens`, `layer_average_tokens`, `control` (not a row of the paper), `folder`, and what the
    answers behind a cell have in common with the unpruned model's (see `agreement_columns`).
    """
    rows = []
    for block in table.layout.blocks:
        for row in block.rows:
            cells = {column.heading: _cell_numbers(table, block, row, column) for column in table.layout.columns}
            averages = {
                label: _average_numbers(table.layout, row, label, [cells[column.heading] for column in columns])
                for label, columns in table.layout.averages.items()
            }
            for heading, values in (cells | averages).items():
                place = table.layout.place(block, row, heading) if pd.notna(values.get("published")) else ""
                head = {"table": table.layout.key, "block": block.title, "row": row.label, "column": heading}
                rows.append({**head, "place": place, **values, "control": row.control})
    frame = pd.DataFrame(rows)
    texts = ["table", "block", "row", "column", "place", "control", "folder"]
    return frame.astype({name: float for name in frame.columns.difference(texts)})


def _cell_numbers(table: PaperTable, block: Block, row: Row, column: Column) -> dict[str, Any]:
    cell, printed = table.cell(block, row, column), row.published.get(column.heading)
    whole = table.reference(block, column) if block.reference else cell
    printed_whole = table.layout.reference(block, row).published.get(column.heading)
    shared = {} if cell is None else _shared(cell, whole, _downsampled(table, block, row, column))
    return {
        **{name: shared.get(name) for name in SHARED},
        "published": printed and printed.value,
        "published_std": printed and printed.std,
        "published_tokens": printed and printed.tokens,
        "published_relative": printed and printed_whole and 100 * printed.value / printed_whole.value,
        "measured": cell and cell.value,
        "measured_std": cell and cell.std,
        "seeds": cell and len(cell.runs),
        "relative": cell and whole and whole.value and 100 * cell.value / whole.value,
        "retained_tokens": cell and cell.mean("tokens"),
        "layer_average_tokens": cell and cell.mean("layer_average"),
        "folder": cell and " ".join(run.folder.parent.name for run in cell.runs),
    }


def _downsampled(table: PaperTable, block: Block, row: Row, column: Column) -> Cell | None:
    """The control that makes the image as small as a row's budget."""
    rows = [other for other in block.rows if other.method == "downsample"]
    same = [other for other in rows if other.arguments.get("keep") == row.arguments.get("keep")]
    return table.cell(block, same[0], column) if same else None


def _shared(cell: Cell, whole: Cell | None, downsampled: Cell | None) -> dict[str, float | None]:
    others = (None if own is None or own is cell else {"": own.runs[0].scores} for own in (whole, downsampled))
    return agreement_columns([{"": run.scores} for run in cell.runs], *others)


def _average_numbers(layout: Layout, row: Row, label: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """An average of relative numbers, blank where one of them is missing."""

    def mean(name: str) -> float | None:
        values = [part[name] for part in parts]
        return None if None in values else sum(values) / len(values)

    printed = row.average if row.average is not None else mean("published_relative")
    if printed is None:
        printed = _printed_elsewhere(layout, row, parts)
    return {
        "published": printed,
        "published_relative": printed,
        "measured": mean("relative"),
        "relative": mean("relative"),
        "retained_tokens": mean("retained_tokens"),
        "layer_average_tokens": mean("layer_average_tokens"),
    }


def _printed_elsewhere(layout: Layout, row: Row, parts: list[dict[str, Any]]) -> float | None:
    """The same average of the same runs, where another table prints their numbers."""
    column = layout.columns[0]
    for other in layouts().values():
        for block in other.blocks:
            for same in block.rows:
                if same.name(column) == row.name(column) and all(c.heading in same.published for c in layout.columns):
                    whole = other.reference(block, same).published
                    shares = [same.published[c.heading].value / whole[c.heading].value for c in layout.columns]
                    return 100 * sum(shares) / len(shares)
    return None


def comparisons(table: PaperTable) -> pd.DataFrame:
    """RCB against every other row of its block and the unpruned model, column by column, on the same samples.

    Columns: `block`, `row`, `against`, `column`, `samples` (whole questions in CircularEval, images in MME),
    `difference` on the printed scale with `low` and `high` (95%, bootstrap over images), `p` (permutation of whole
    images, two-sided).
    """
    rows = [
        {"block": block.title, "row": row.label, "against": label, "column": column.heading, **found}
        for block in table.layout.blocks
        for row in block.rows
        if row.method == "rcb"
        for column in table.layout.columns
        for label, other in _others(table, block, row, column)
        if (found := _compared(column, table.cell(block, row, column), other)) is not None
    ]
    return pd.DataFrame(
        rows, columns=["block", "row", "against", "column", "samples", "difference", "low", "high", "p"]
    )


def _others(table: PaperTable, block: Block, row: Row, column: Column) -> Iterator[tuple[str, Cell | None]]:
    yield "unpruned", table.reference(block, column)
    first = next(other for other in block.rows if other.method == "rcb")
    for other in block.rows:
        # Variants of RCB are compared with its first row, and where a block has several budgets, equal ones.
        same_budget = other.arguments.get("keep") == row.arguments.get("keep")
        if other.label != row.label and same_budget and (other.method != "rcb" or other == first):
            yield other.label, table.cell(block, other, column)


def _compared(column: Column, cell: Cell | None, other: Cell | None) -> dict[str, float] | None:
    if cell is None or other is None or (mine := cell.scores()) is None or (theirs := other.scores()) is None:
        return None
    pairs = [(first, second, clusters) for (first, clusters), (second, _) in zip(mine, theirs, strict=True)]
    total = sum(len(first) for first, *_ in pairs)
    # Subtasks count alike, whatever their sizes: MVBench is their mean, MME their sum.
    unit = column.scale * (len(pairs) if column.combine == "pairs" else 1)
    weighted = [unit * (first - second) * total / (len(pairs) * len(first)) for first, second, _ in pairs]
    labels = [np.char.add(f"{number} ", clusters) for number, (*_, clusters) in enumerate(pairs)]
    interval = mean_interval(np.concatenate(weighted), np.concatenate(labels))
    bounds = {"difference": interval.mean, "low": interval.low, "high": interval.high}
    return {"samples": total, **bounds, "p": paired_p(pairs)}
