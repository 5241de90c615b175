"""The cells of the paper's tables, read from a results folder.

A cell needs all its runs, whole and successful; otherwise it stays blank, and what was passed over is named.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rcb_lmms.errors import UserError
from rcb_lmms.lab.checkpoint import is_lab
from rcb_lmms.report.collect import Excluded
from rcb_lmms.report.published import Block, Column, Layout, Row
from rcb_lmms.report.reading import RECORD, RESULTS, Run, Scores, Unusable, read_run
from rcb_lmms.report.summary import version_notes
from rcb_lmms.runs.configs import Entry, for_checkpoint, run_folder

# model_args that say where a model runs, not what it answers.
PLACES = {"pretrained", "device", "device_map", "dtype", "attn_implementation", "video_backend"}


@dataclass(frozen=True)
class Measured:
    """One run and what it says for a cell.

    Attributes:
        value: on the printed scale.
        tokens: retained visual tokens per question; `layer_average` over the decoder's layers.
    """

    run: Run
    value: float
    tokens: float
    layer_average: float
    scores: Scores

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.run.path

    @property
    def pretrained(self) -> str | None:
        """The checkpoint."""
        return self.run.record["arguments"].get("pretrained")


@dataclass(frozen=True)
class Cell:
    """The runs behind one cell, one per seed."""

    runs: tuple[Measured, ...]

    @property
    def value(self) -> float:
        """Mean over seeds."""
        return sum(run.value for run in self.runs) / len(self.runs)

    @property
    def std(self) -> float | None:
        """Sample deviation over seeds."""
        return float(np.std([run.value for run in self.runs], ddof=1)) if len(self.runs) > 1 else None

    def mean(self, quantity: str) -> float:
        """Mean over seeds of `tokens` or `layer_average`."""
        return sum(getattr(run, quantity) for run in self.runs) / len(self.runs)

    def scores(self) -> list[tuple[np.ndarray, np.ndarray]] | None:
        """Per subtask, every sample's score averaged over seeds, and the clusters; `None` if samples have none."""
        if not all(run.scores.parts for run in self.runs):
            return None
        by_subtask = zip(*(run.scores.parts for run in self.runs), strict=True)
        return [(np.mean([part.values for part in parts], axis=0), parts[0].clusters) for parts in by_subtask]


@dataclass
class PaperTable:
    """A layout with what was measured.

    Attributes:
        cells: by block title, row label and column heading.
        excluded: run folders that are there but cannot be used, with the reason.
        absent: by block title, run folders of the paper's rows that are not there.
    """

    layout: Layout
    cells: dict[tuple[str, str, str], Cell]
    excluded: list[Excluded] = field(default_factory=list)
    absent: dict[str, list[Path]] = field(default_factory=dict)

    @property
    def version_notes(self) -> list[str]:
        """What the runs were made with that differs."""
        runs = {run.folder: run.run.record for cell in self.cells.values() for run in cell.runs}
        return version_notes(runs.items())

    @property
    def measured_on(self) -> str:
        """What the measured numbers are called: they say it where they are those of the laboratory's models."""
        checkpoints = {str(run.pretrained) for cell in self.cells.values() for run in cell.runs}
        known = checkpoints and all(map(is_lab, checkpoints))
        return "laboratory model" if known else "here"

    def cell(self, block: Block, row: Row, column: Column) -> Cell | None:
        """A measured cell."""
        return self.cells.get((block.title, row.label, column.heading))

    def reference(self, block: Block, column: Column) -> Cell | None:
        """What the block's cells of a column are relative to, if it is another row."""
        return self.cells.get((block.title, "", column.heading))


def measure(layout: Layout, results: Path) -> PaperTable:
    """Read all runs of a table.

    Raises:
        UserError: no such folder, or runs of one block that cannot be compared.
    """
    if not Path(results).is_dir():
        raise UserError(
            wanted=f"runs below {results}",
            found="no such folder",
            allowed="a results folder of `rcb eval`",
            next_step="rcb eval " + next(block.config for block in layout.blocks if block.config),
        )
    cells, excluded, absent = {}, {}, {}

    @functools.cache
    def read(entries: tuple[Entry, ...], column: Column) -> Cell | None:
        runs = [_read_or_exclude(Path(results), entry, column, excluded) for entry in entries]
        return Cell(tuple(runs)) if all(runs) else None

    for block in layout.blocks:
        absent[block.title] = _absent(Path(results), layout, block)
        for column in layout.columns:
            rows = {row.label: row for row in block.rows}
            if block.reference is not None:
                rows[""] = layout.reference(block, block.rows[0])
            found = {label: read(tuple(row.entries(column)), column) for label, row in rows.items()}
            found = {label: cell for label, cell in found.items() if cell is not None}
            if block.reference is not None:
                _check_comparable(block, [run for cell in found.values() for run in cell.runs])
            cells |= {(block.title, label, column.heading): cell for label, cell in found.items()}
    return PaperTable(layout, cells, list(excluded.values()), absent)


def _absent(results: Path, layout: Layout, block: Block) -> list[Path]:
    rows = [row for row in (layout.reference(block, block.rows[0]), *block.rows) if not row.control]
    columns = [column for column in layout.columns if column.printed]
    folders = [run_folder(results, entry) for row in rows for column in columns for entry in row.entries(column)]
    return [path for path in dict.fromkeys(folders) if not any((path / name).exists() for name in (RECORD, RESULTS))]


def _check_comparable(block: Block, runs: list[Measured]) -> None:
    for run in runs[1:]:
        first = runs[0]
        kinds = {
            "different checkpoints": lambda run: run.pretrained,
            "different samples": lambda run: run.scores.documents,
        }
        for found, of in kinds.items():
            if of(run) != of(first):
                raise UserError(
                    wanted=f"the block '{block.title}' of one table",
                    found=f"{found}: {first.folder} and {run.folder}",
                    allowed="runs of one checkpoint over the same samples",
                    next_step="move one of the two elsewhere, or run it again",
                )


def _read_or_exclude(results: Path, entry: Entry, column: Column, excluded: dict[Path, Excluded]) -> Measured | None:
    folder = run_folder(results, entry)
    if not any((folder / name).exists() for name in (RECORD, RESULTS)):
        return None
    try:
        return _read(folder, entry, column)
    except Unusable as error:
        excluded[folder] = Excluded(folder, str(error))
        return None


def _read(folder: Path, entry: Entry, column: Column) -> Measured:
    run = read_run(folder)
    _check_entry(run.record, entry)
    tokens, average = (
        run.achieved(column.task, name) for name in ("retained_visual_tokens", "layer_average_visual_tokens")
    )
    if tokens is None or average is None:
        raise Unusable(f"{RECORD} has no tokens of {column.task}")
    if (value := run.value(column.task, column.metric)) is None:
        later = "; rcb captions adds it to the samples" if column.metric.endswith("_spice") else ""
        raise Unusable(f"{RESULTS} has no number for {column.metric}{later}")
    scores = run.scores(column.task, (column.metric,), combine=column.combine)
    return Measured(run, value * column.scale, tokens, average, scores)


def _check_entry(record: dict[str, Any], entry: Entry) -> None:
    """Refuse the record of a run that another entry left in this one's folder."""
    expected = for_checkpoint(entry, record["arguments"].get("pretrained"))
    differing = [f"model {record['model']}"] if record["model"] != entry.model else []
    differing += [f"tasks {record['tasks']}"] if record["tasks"] != [entry.task] else []
    differing += [
        f"{name}={record['arguments'].get(name)}"
        for name in sorted({*expected, *record["arguments"]} - PLACES)
        if record["arguments"].get(name) != expected.get(name)
    ]
    if differing:
        raise Unusable(f"{RECORD} is of another run: " + ", ".join(differing))
