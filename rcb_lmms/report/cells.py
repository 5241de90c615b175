"""The cells of the paper's tables, read from a results folder.

A cell needs all its runs, whole and successful; otherwise it stays blank, and what was passed over is named.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcb_lmms.errors import UserError
from rcb_lmms.files import read_jsonl
from rcb_lmms.report.collect import (
    RECORD,
    RESULTS,
    Excluded,
    Unusable,
    check_answers,
    read_finished,
    read_json,
)
from rcb_lmms.report.published import Benchmark, Block, Layout, Row
from rcb_lmms.report.summary import version_notes
from rcb_lmms.runs.configs import Entry, for_checkpoint, run_folder

if TYPE_CHECKING:
    import numpy as np

# model_args that say where a model runs, not what it answers.
PLACES = {"pretrained", "device", "dtype", "attn_implementation", "video_backend"}

# What the samples of one cluster count for.
COMBINE: dict[str | None, Callable[[list[float]], list[float]]] = {
    None: lambda scores: scores,
    # CircularEval: a question is right in every rotation of its options, or wrong.
    "circular": lambda scores: [min(scores)],
    # MME: accuracy plus the accuracy of pairs, in percent.
    "pairs": lambda scores: [100 * sum(scores) / 2 + 100 * min(scores)] if len(scores) == 2 else [],
}


@dataclass(frozen=True)
class Samples:
    """What a column's number is the mean of, in one subtask, and the labels of what groups it, both `(n,)`."""

    values: np.ndarray
    clusters: np.ndarray


@dataclass(frozen=True)
class Measured:
    """One run.

    Attributes:
        value: on the printed scale.
        tokens: retained visual tokens per question; `layer_average` over the decoder's layers.
        samples: by subtask; `None` if not every sample has a score of its own.
        digest: of the documents, so that runs over other data are never compared.
        record: of the run.
    """

    folder: Path
    pretrained: str | None
    value: float
    tokens: float
    layer_average: float
    samples: tuple[Samples, ...] | None
    digest: str
    record: dict[str, Any]


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
        import numpy as np

        return float(np.std([run.value for run in self.runs], ddof=1)) if len(self.runs) > 1 else None

    def mean(self, quantity: str) -> float:
        """Mean over seeds of `tokens` or `layer_average`."""
        return sum(getattr(run, quantity) for run in self.runs) / len(self.runs)

    def scores(self) -> list[tuple[np.ndarray, np.ndarray]] | None:
        """Per subtask, every sample's score averaged over seeds, and the clusters; `None` if samples have none."""
        import numpy as np

        if any(run.samples is None for run in self.runs):
            return None
        by_subtask = zip(*(run.samples for run in self.runs), strict=True)
        return [(np.mean([part.values for part in parts], axis=0), parts[0].clusters) for parts in by_subtask]


@dataclass
class PaperTable:
    """A layout with what was measured.

    Attributes:
        cells: by block title, row label and column heading.
        excluded: run folders that are there but cannot be used, with the reason.
    """

    layout: Layout
    cells: dict[tuple[str, str, str], Cell]
    excluded: list[Excluded] = field(default_factory=list)

    @property
    def version_notes(self) -> list[str]:
        """What the runs were made with that differs."""
        runs = {run.folder: run.record for cell in self.cells.values() for run in cell.runs}
        return version_notes(runs.items())

    def cell(self, block: Block, row: Row, column: Benchmark) -> Cell | None:
        """A measured cell."""
        return self.cells.get((block.title, row.label, column.heading))

    def reference(self, block: Block, column: Benchmark) -> Cell | None:
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
    cells, excluded = {}, {}

    @functools.cache
    def read(entries: tuple[Entry, ...], column: Benchmark) -> Cell | None:
        runs = [_read_or_exclude(Path(results), entry, column, excluded) for entry in entries]
        return Cell(tuple(runs)) if all(runs) else None

    for block in layout.blocks:
        for column in layout.columns:
            rows = {row.label: row for row in block.rows}
            if block.reference is not None:
                rows[""] = layout.reference(block, block.rows[0])
            found = {label: read(tuple(row.entries(column)), column) for label, row in rows.items()}
            found = {label: cell for label, cell in found.items() if cell is not None}
            if block.reference is not None:
                _check_comparable(block, [run for cell in found.values() for run in cell.runs])
            cells |= {(block.title, label, column.heading): cell for label, cell in found.items()}
    return PaperTable(layout, cells, list(excluded.values()))


def _check_comparable(block: Block, runs: list[Measured]) -> None:
    for run in runs[1:]:
        first = runs[0]
        kinds = {
            "different checkpoints": lambda run: run.pretrained,
            "different samples": lambda run: run.digest,
        }
        for found, of in kinds.items():
            if of(run) != of(first):
                raise UserError(
                    wanted=f"the block '{block.title}' of one table",
                    found=f"{found}: {first.folder} and {run.folder}",
                    allowed="runs of one checkpoint over the same samples",
                    next_step="move one of the two elsewhere, or run it again",
                )


def _read_or_exclude(results: Path, entry: Entry, column: Benchmark, excluded: dict[Path, Excluded]) -> Measured | None:
    folder = run_folder(results, entry)
    if not any((folder / name).exists() for name in (RECORD, RESULTS)):
        return None
    try:
        return _read(folder, entry, column)
    except Unusable as error:
        excluded[folder] = Excluded(folder, str(error))
        return None


def _read(folder: Path, entry: Entry, column: Benchmark) -> Measured:
    record = read_finished(folder)
    _check_entry(record, entry)
    results = read_json(folder / RESULTS)
    try:
        subtasks = results.get("group_subtasks", {}).get(column.task) or [column.task]
        own = {**results["results"], **results.get("groups", {})}[column.task]
        value = next((own[key] for key in own if key.partition(",")[0] == column.metric), None)
        achieved = [record["achieved"][task] for task in subtasks]
        quantities = ("retained_visual_tokens", "layer_average_visual_tokens")
        tokens, average = (sum(float(task[name]) for task in achieved) / len(achieved) for name in quantities)
        sizes = [results["n-samples"][task]["original"] for task in subtasks]
    except (KeyError, TypeError, AttributeError) as error:
        raise Unusable(f"{RECORD} or {RESULTS} is damaged: {type(error).__name__} {error}") from error
    if not isinstance(value, (int, float)):
        later = "; rcb captions adds it to the samples" if column.metric.endswith("_spice") else ""
        raise Unusable(f"{RESULTS} has no number for {column.metric}{later}")
    digest, samples = hashlib.sha256(), []
    for task, size in zip(subtasks, sizes, strict=True):
        check = functools.partial(check_answers, record, task)
        samples += _samples(folder / f"samples_{task}.jsonl", size, column, digest, check)
    pretrained = record["arguments"].get("pretrained")
    known = None if None in samples else tuple(samples)
    return Measured(folder, pretrained, value * column.scale, tokens, average, known, digest.hexdigest(), record)


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


def _samples(
    path: Path, expected: int, column: Benchmark, digest: Any, check: Callable[[list[dict[str, Any]]], None]
) -> list[Samples | None]:
    """Samples of one task, MME's by subtask; a `None` if some have no score."""
    import numpy as np

    try:
        rows = sorted(read_jsonl(path), key=lambda row: row["doc_id"])
        if len(rows) != expected or len({row["doc_id"] for row in rows}) != expected:
            raise Unusable(f"{path.name} has {len(rows)} of {expected} samples")
        check(rows)
        parts: dict[str, dict[str, list[float | None]]] = {}
        for row in rows:
            digest.update(json.dumps([row["doc_id"], row["target"], row["doc"]], sort_keys=True).encode())
            if (own := row.get(column.metric)) is not None:
                own = own if isinstance(own, dict) else {"score": own}
                part = own["category"] if column.combine == "pairs" else ""
                # Without a label, a sample stands for itself.
                label = str(row["doc_id"] if own.get("cluster") is None else own["cluster"])
                parts.setdefault(part, {}).setdefault(label, []).append(own.get("score"))
    except (KeyError, TypeError, ValueError) as error:
        raise Unusable(f"{path.name} is damaged: {type(error).__name__} {error}") from error
    if not parts or any(None in scores for clusters in parts.values() for scores in clusters.values()):
        return [None]
    found = []
    for clusters in parts.values():
        combined = {label: COMBINE[column.combine](scores) for label, scores in clusters.items()}
        labels = [label for label, values in combined.items() for _ in values]
        values = [value for values in combined.values() for value in values]
        found.append(Samples(np.array(values, dtype=float), np.array(labels)))
    return found
