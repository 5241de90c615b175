"""The cells of the paper's tables, read from a results folder.

A cell needs all its runs, whole and successful; otherwise it stays blank, and what was passed over is named.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcb_lmms.errors import UserError
from rcb_lmms.evaluate import Entry, for_checkpoint, run_folder
from rcb_lmms.files import read_jsonl
from rcb_lmms.report.collect import RECORD, RESULTS, Excluded, Unusable, read_finished, read_json
from rcb_lmms.report.published import Benchmark, Block, Layout, Row

if TYPE_CHECKING:
    import numpy as np

# model_args that say where a model runs, not what it answers.
PLACES = {"pretrained", "device", "dtype", "attn_implementation", "video_backend"}


@dataclass(frozen=True)
class Samples:
    """Scores of one task's samples and the labels of what groups them, both `(n,)`; `None` if samples have no score.

    `digest` names the documents, so that runs over other data are never compared.
    """

    values: np.ndarray | None
    clusters: np.ndarray | None
    digest: str


@dataclass(frozen=True)
class Measured:
    """One run: its value on the printed scale, retained visual tokens per question, and samples by subtask."""

    folder: Path
    pretrained: str | None
    value: float
    tokens: float
    layer_average: float
    samples: tuple[Samples, ...]


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

        if any(samples.values is None for run in self.runs for samples in run.samples):
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
            "different samples": lambda run: [samples.digest for samples in run.samples],
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
        configs, sizes = results.get("configs", {}), results["n-samples"]
        samples = [_samples(folder, task, column, configs.get(task, {}), sizes[task]["original"]) for task in subtasks]
    except (KeyError, TypeError, AttributeError) as error:
        raise Unusable(f"{RECORD} or {RESULTS} is damaged: {type(error).__name__} {error}") from error
    if not isinstance(value, (int, float)):
        raise Unusable(f"{RESULTS} has no number for {column.metric}")
    pretrained = record["arguments"].get("pretrained")
    return Measured(folder, pretrained, value * column.scale, tokens, average, tuple(samples))


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


def _samples(folder: Path, task: str, column: Benchmark, config: dict[str, Any], expected: int) -> Samples:
    import numpy as np

    path = folder / f"samples_{task}.jsonl"
    try:
        rows = sorted(read_jsonl(path), key=lambda row: row["doc_id"])
        digest = hashlib.sha256()
        for row in rows:
            digest.update(json.dumps([row["doc_id"], row["target"], row["doc"]], sort_keys=True).encode())
        scored = [row for row in rows if row.get(column.metric) is not None]
        values = [_score(row[column.metric]) for row in scored]
        clusters = [_cluster(row, column, config.get("cluster_key")) for row in scored]
    except (KeyError, TypeError, ValueError) as error:
        raise Unusable(f"{path.name} is damaged: {type(error).__name__} {error}") from error
    if len(rows) != expected or len({row["doc_id"] for row in rows}) != expected:
        raise Unusable(f"{path.name} has {len(rows)} of {expected} samples")
    if not values or None in values:
        return Samples(None, None, digest.hexdigest())
    labels, index = np.unique(clusters, return_inverse=True)
    values = np.array(values, dtype=float)
    if column.unit is None:
        return Samples(values, labels[index], digest.hexdigest())
    whole = np.ones(len(labels))
    np.minimum.at(whole, index, values)
    return Samples(whole, labels, digest.hexdigest())


def _score(value: Any) -> float | None:
    value = value.get("score") if isinstance(value, dict) else value
    return float(value) if isinstance(value, (bool, int, float)) else None


def _cluster(row: dict[str, Any], column: Benchmark, key: str | None) -> str:
    """The label of what a sample stands and falls with: its image, or the question it is a rotation of."""
    own = {**row["doc"], **(row[column.metric] if isinstance(row[column.metric], dict) else {})}
    if column.unit is not None:
        return str(int(own["index"]) % column.unit)
    return str(own[key]) if key in own else str(row["doc_id"])
