"""What papers print for the rows of the field's common table, beside what runs of the same rows gave.

Scores are compared in percent of the unpruned model of the same table: its own score differs between papers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from rcb_lmms.report.collect import Measured
from rcb_lmms.report.reading import mean_of
from rcb_lmms.report.summary import Setting, group, unpruned_of

DATA = Path(__file__).with_name("field.yaml")


@functools.cache
def field_data() -> dict[str, Any]:
    """The published tables: `checkpoint`, `columns` by task, and `tables` with `source`, `unpruned` and `rows`."""
    return yaml.safe_load(DATA.read_text(encoding="utf-8"))


def beside_published(runs: Sequence[Measured]) -> pd.DataFrame:
    """One row per published row of a method and budget among the runs.

    Columns: `method`, `budget`, `source`, then per task `<task>` and `<task>_published`, in percent of the unpruned
    model, and `mean` and `mean_published` over the tasks that have both. Empty where no run is one of the field's: of
    its checkpoint, padded, with a budget that a table has, and the unpruned model beside it.

    Raises:
        UserError: runs that cannot share a table; see `group`.
    """
    rows = group(runs)
    found = [_row(row, rows, table) for row in rows for table in field_data()["tables"]]
    return pd.DataFrame([row for row in found if row])


def _row(row: Setting, rows: list[Setting], table: dict[str, Any]) -> dict[str, Any] | None:
    printed = table["rows"].get(row.first.method, {}).get(row.first.target)
    unpruned = unpruned_of(row, rows)
    if printed is None or unpruned is None or not _fields(row):
        return None
    numbers: dict[str, Any] = {"method": row.first.method, "budget": row.budget, "source": table["source"]}
    pairs = []
    for (task, column), value, whole in zip(field_data()["columns"].items(), printed, table["unpruned"], strict=True):
        metrics = table.get("columns", {}).get(task, column["metrics"])
        ours, reference = _score(row, task, metrics), _score(unpruned, task, metrics)
        here = 100 * ours / reference if ours is not None and reference else None
        there = None if value is None else 100 * value / whole
        numbers |= {task: here, f"{task}_published": there}
        pairs += [(here, there)] if None not in (here, there) else []
    if not pairs:
        return None
    here, there = (mean_of(values) for values in zip(*pairs, strict=True))
    return numbers | {"mean": here, "mean_published": there}


def _fields(row: Setting) -> bool:
    """Whether a run's checkpoint and preprocessing are those of the published tables."""
    given, resolved = row.first.arguments, row.first.record["resolved"]
    checkpoint = str(given.get("pretrained", resolved.get("pretrained", "")))
    return field_data()["checkpoint"] in checkpoint.lower() and resolved.get("preprocess") == "pad"


def _score(row: Setting, task: str, metrics: Sequence[str]) -> float | None:
    """The sum of metrics, mean over seeds."""
    parts = [mean_of(run.sources[task].value(task, name) for run in row.runs) for name in metrics if task in row.tasks]
    return sum(parts) if parts and None not in parts else None


def readable_published(table: pd.DataFrame) -> pd.DataFrame:
    """The same as text, `here / published` in each cell."""
    text = {"method": table["method"], "budget": table["budget"], "published in": table["source"]}
    headings = {task: column["heading"] for task, column in field_data()["columns"].items()} | {"mean": "mean"}
    for task, heading in headings.items():
        pairs = zip(table[task].astype(float), table[f"{task}_published"].astype(float), strict=True)
        text[heading] = [" / ".join("–" if pd.isna(own) else f"{own:.1f}" for own in pair) for pair in pairs]
    frame = pd.DataFrame(text)
    return frame.loc[:, [not (frame[column] == "– / –").all() for column in frame]]
