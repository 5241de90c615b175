"""Stored runs, read back: whole ones as `Run`, all others named with the reason they are left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcb_lmms.errors import UserError
from rcb_lmms.files import answers_hash, read_jsonl

if TYPE_CHECKING:
    import numpy as np

RECORD, RESULTS = "run.json", "results.json"
BUDGETS = ("keep", "ratio", "threshold", "match")


@dataclass(frozen=True)
class Benchmark:
    """How a task's sample rows are read.

    Attributes:
        label: the task in headings.
        metrics: keys of a sample row, of which the first present holds the sample's score.
        cluster: what groups samples that are not independent: the image, for questions about one image.
        chance: accuracy of guessing, where it is one number.
        official: key in the results of the score the paper reports, where that is not the mean of the samples.
        official_label: its name in headings.
    """

    label: str
    metrics: tuple[str, ...]
    cluster: Callable[[dict[str, Any]], object]
    chance: float | None
    official: str | None = None
    official_label: str = ""


def _cluster(row: dict[str, Any]) -> object:
    """What this package's own tasks say of a sample: what it shares with others, or else itself."""
    scored = next(value for key, value in row.items() if key.startswith("rcb_") and isinstance(value, dict))
    return row["doc_id"] if scored.get("cluster") is None else scored["cluster"]


BENCHMARKS = {
    "pope": Benchmark("POPE", ("pope_accuracy",), lambda row: row["doc"]["image_source"], chance=0.5),
    "mme": Benchmark(
        "MME",
        ("mme_perception_score", "mme_cognition_score"),
        lambda row: row["doc"]["question_id"],
        chance=0.5,
        official="mme_perception_score,none",
        official_label="MME perception",
    ),
    "rcb_pope": Benchmark("POPE (paper)", ("rcb_pope_accuracy",), _cluster, chance=0.5),
    "rcb_mme": Benchmark(
        "MME (paper)",
        ("rcb_mme_perception", "rcb_mme_cognition"),
        _cluster,
        chance=0.5,
        official="rcb_mme_perception,none",
        official_label="MME perception (paper)",
    ),
    "rcb_seed_image": Benchmark("SEED-Image", ("rcb_seed_accuracy",), _cluster, chance=0.25),
    "rcb_realworldqa": Benchmark("RealWorldQA", ("rcb_realworldqa_accuracy",), _cluster, chance=None),
    "rcb_mantis": Benchmark("Mantis", ("rcb_mantis_accuracy",), _cluster, chance=None),
    "rcb_muirbench": Benchmark("MuirBench", ("rcb_muirbench_accuracy",), _cluster, chance=None),
}


@dataclass(frozen=True)
class Scores:
    """A task's samples, sorted by document number; all three are `(n,)`.

    Attributes:
        values: score of each sample, 0 to 1.
        clusters: label of each sample's image.
        samples: names each sample by its content, so that runs over different data are never compared.
    """

    values: np.ndarray
    clusters: np.ndarray
    samples: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """A complete run: its folder, its record, its scores by task, and the official score of tasks that have one."""

    path: Path
    record: dict[str, Any]
    scores: dict[str, Scores]
    official: dict[str, float]

    @property
    def method(self) -> str:
        """Registry key of the method."""
        name = self.record["model"].removeprefix(self.record["resolved"]["family"] + "_")
        return "none" if name == "full" else name

    @property
    def arguments(self) -> dict[str, str]:
        """model_args as given."""
        return self.record["arguments"]

    @property
    def setting(self) -> tuple:
        """What runs that differ in nothing but their seed have in common."""
        return self.record["model"], *sorted((name, text) for name, text in self.arguments.items() if name != "seed")

    @property
    def target(self) -> float | None:
        """Retained visual tokens per question that were asked for, averaged over the tasks; `None` if unpruned."""
        if self.record["calibrations"]:
            return _mean(
                calibration["target"] * self._shares(task) for task, calibration in self.record["calibrations"].items()
            )
        kind, _, value = str(self.record["resolved"]["pruner"].get("budget")).partition("=")
        if kind == "ratio" and (native := self.mean("native_visual_tokens")) is not None:
            return float(value) * native
        shares = _mean(map(self._shares, self.record["achieved"])) or 1
        return float(value) * shares if kind == "tokens" else None

    def _shares(self, task: str) -> float:
        """How often a question of a task spends the budget: once for each of its views, unless that is per image."""
        per_view = self.record["resolved"].get("per", "view") == "view"
        return self.record["achieved"].get(task, {}).get("views", 1) if per_view else 1

    def mean(self, quantity: str) -> float | None:
        """An achieved quantity, averaged over the tasks."""
        return _mean(achieved[quantity] for achieved in self.record["achieved"].values())


@dataclass(frozen=True)
class Excluded:
    """A folder that is in no table, and why."""

    path: Path
    reason: str


def collect(results: Path) -> tuple[list[Run], list[Excluded]]:
    """Every run below a folder, by path: whole ones, and those that are left out (damaged, foreign, partial, failed).

    Raises:
        UserError: there is no such folder, or no whole run in it.
    """
    results = Path(results)
    folders = sorted({path.parent for name in (RECORD, RESULTS) for path in results.rglob(name)})
    if not folders:
        raise UserError(
            wanted=f"runs below {results}",
            found="no folder with a run record" if results.is_dir() else "no such folder",
            allowed=f"a folder of runs, each with its {RECORD}",
            next_step="rcb eval, or rcb quickstart",
        )
    runs, excluded = [], []
    for folder in folders:
        try:
            runs.append(_read(folder))
        except Unusable as error:
            excluded.append(Excluded(folder, str(error)))
    if not runs:
        raise UserError(
            wanted=f"a table of the runs below {results}",
            found=f"none that can be used; the first: {excluded[0].path}: {excluded[0].reason}",
            allowed="whole runs of the tasks " + ", ".join(BENCHMARKS),
            next_step="run them again, or rcb table --paper for the tasks of the paper's tables",
        )
    return _joined(runs), excluded


def _joined(runs: list[Run]) -> list[Run]:
    """Runs beside each other that differ in nothing but their tasks, as `rcb eval` leaves them, as one run each."""
    alike: dict[tuple, list[Run]] = {}
    for run in runs:
        alike.setdefault((run.path.parent, run.setting, run.arguments.get("seed")), []).append(run)
    joined = []
    for (place, *_), parts in alike.items():
        tasks = [task for part in parts for task in part.scores]
        joined += parts if len(parts) == 1 or len(set(tasks)) < len(tasks) else [_join(place, parts)]
    return joined


def _join(place: Path, parts: list[Run]) -> Run:
    def union(of_part: Callable[[Run], dict[str, Any]]) -> dict[str, Any]:
        return {name: value for part in parts for name, value in of_part(part).items()}

    totals = [part.record["totals"] for part in parts]
    speeds = [(total.get("questions", 0), total.get("questions_per_second")) for total in totals]
    seconds = None if any(not speed for _, speed in speeds) else sum(number / speed for number, speed in speeds)
    record = parts[0].record | {
        "calibrations": union(lambda part: part.record["calibrations"]),
        "achieved": union(lambda part: part.record["achieved"]),
        "totals": {"questions_per_second": sum(number for number, _ in speeds) / seconds} if seconds else {},
    }
    return Run(place, record, union(lambda part: part.scores), union(lambda part: part.official))


class Unusable(Exception):
    """Why a folder or a file is in no table."""


def _read(folder: Path) -> Run:
    record = read_finished(folder)
    results = read_json(folder / RESULTS)
    scores = {task: _read_scores(folder, task, results, record) for task in record["tasks"]}
    official = {
        task: value
        for task in scores
        if (key := BENCHMARKS[task].official) and (value := results["results"][task].get(key)) is not None
    }
    return Run(folder, record, scores, official)


def read_finished(folder: Path) -> dict[str, Any]:
    """The record of a whole run.

    Raises:
        Unusable: a run that is foreign, damaged, not finished, failed or partial.
    """
    record = read_json(folder / RECORD)
    if not isinstance(record, dict) or not {"status", "model", "arguments", "tasks"} <= set(record):
        raise Unusable(f"{RECORD} is not a record of this package")
    if record["status"] != "success":
        reason = record.get("error") or f"{len(record.get('failures', []))} failed samples"
        raise Unusable("not finished" if record["status"] == "started" else f"failed: {reason}")
    if record.get("limit") is not None:
        raise Unusable(f"limited to the first {record['limit']} samples of each task")
    missing = sorted({"resolved", "achieved", "calibrations", "totals"} - set(record))
    if missing:
        raise Unusable(f"{RECORD} has no {', '.join(missing)}")
    return record


def _read_scores(folder: Path, task: str, results: dict[str, Any], record: dict[str, Any]) -> Scores:
    import numpy as np

    if task not in BENCHMARKS:
        raise Unusable(f"task {task} has no entry in BENCHMARKS, which says how its samples are read")
    path = folder / f"samples_{task}.jsonl"
    try:
        rows = sorted(read_jsonl(path), key=lambda row: row["doc_id"])
        values = np.array([_score(row, BENCHMARKS[task]) for row in rows])
        clusters = np.array([str(BENCHMARKS[task].cluster(row)) for row in rows])
        expected = results["n-samples"][task]["original"]
    except (KeyError, TypeError, ValueError) as error:
        raise Unusable(f"{path.name} or {RESULTS} is damaged: {type(error).__name__} {error}") from error
    if len(rows) != expected or len({row["doc_id"] for row in rows}) != expected:
        raise Unusable(f"{path.name} has {len(rows)} of {expected} samples")
    check_answers(record, task, rows)
    # lmms-eval's own doc_hash covers the address of the image in memory, so it differs from run to run.
    samples = tuple(json.dumps([row["doc_id"], row["target"], row["doc"]], sort_keys=True) for row in rows)
    return Scores(values, clusters, samples)


def check_answers(record: dict[str, Any], task: str, rows: list[dict[str, Any]]) -> None:
    """Hold samples against the record of the run that made them; records of earlier versions say nothing of them.

    Raises:
        Unusable: the samples are another run's.
    """
    known = record.get("answers")
    if isinstance(known, dict) and task in known and known[task] != answers_hash(rows):
        raise Unusable(f"samples_{task}.jsonl holds other answers than those of the run in {RECORD}")


def _score(row: dict[str, Any], benchmark: Benchmark) -> float:
    metric = next((metric for metric in benchmark.metrics if metric in row), benchmark.metrics[0])
    return float(row[metric]["score"])


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        Unusable: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Unusable(f"no {path.name}") from error
    except ValueError as error:
        raise Unusable(f"{path.name} is damaged: {error}") from error


def _mean(values) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None
