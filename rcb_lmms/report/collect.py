"""The runs below a folder for a table of them: whole ones as `Measured`, all others named with the reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rcb_lmms.errors import UserError
from rcb_lmms.report.reading import HOST_RESULTS, RECORD, RESULTS, Run, Scores, Unusable, mean_of, read_run
from rcb_lmms.report.scores import scored_by

BUDGETS = ("keep", "ratio", "threshold", "match")


@dataclass(frozen=True)
class Benchmark:
    """How a task's sample rows are read.

    Attributes:
        label: the task in headings.
        metrics: keys of a sample row, of which the first present holds the sample's score.
        cluster: what of the document groups samples that are not independent: the image, for questions about one
            image. `None` takes what the score says, as this package's own tasks do.
        combine: how the scores of one cluster count, see `COMBINE` in `scores.py`.
        chance: accuracy of guessing, where it is one number.
        official: metric whose number the paper reports, where that is not the mean of the samples.
        official_label: its name in headings.
        unit: what brings a score to the numbers shown: 100 for shares, which are shown in percent.
    """

    label: str
    metrics: tuple[str, ...]
    cluster: str | None = None
    combine: str | None = None
    chance: float | None = None
    official: str | None = None
    official_label: str = ""
    unit: int = 100

    @property
    def heading(self) -> str:
        """Of the column of its scores."""
        return f"{self.label} accuracy, %" if self.unit == 100 else self.label


BENCHMARKS = {
    "pope": Benchmark("POPE", ("pope_accuracy",), "image_source", chance=0.5),
    "mme": Benchmark(
        "MME",
        ("mme_perception_score", "mme_cognition_score"),
        "question_id",
        chance=0.5,
        official="mme_perception_score",
        official_label="MME perception",
    ),
    "rcb_pope": Benchmark("POPE (paper)", ("rcb_pope_accuracy",), chance=0.5),
    "rcb_mme": Benchmark(
        "MME (paper)",
        ("rcb_mme_perception", "rcb_mme_cognition"),
        chance=0.5,
        official="rcb_mme_perception",
        official_label="MME perception (paper)",
    ),
    "rcb_mmbench_en_dev": Benchmark("MMBench CircularEval", ("rcb_mmbench_circular",), combine="circular"),
    "rcb_seed_image": Benchmark("SEED-Image", ("rcb_seed_accuracy",), chance=0.25),
    "rcb_realworldqa": Benchmark("RealWorldQA", ("rcb_realworldqa_accuracy",)),
    "rcb_nocaps_val": Benchmark("NoCaps CIDEr", ("rcb_nocaps_cider",)),
    "rcb_flickr30k": Benchmark("Flickr30k CIDEr", ("rcb_flickr_cider",)),
    "rcb_mantis": Benchmark("Mantis", ("rcb_mantis_accuracy",)),
    "rcb_muirbench": Benchmark("MuirBench", ("rcb_muirbench_accuracy",)),
    "rcb_mvbench": Benchmark("MVBench", ("rcb_mvbench_accuracy",)),
}


@dataclass(frozen=True)
class Measured:
    """A run with its scores, the official ones too, how they are shown, and the run that made them, each by task."""

    run: Run
    scores: dict[str, Scores]
    official: dict[str, float]
    benchmarks: dict[str, Benchmark]
    sources: dict[str, Run]

    @property
    def path(self) -> Path:
        """The run's folder, or its results file."""
        return self.run.path

    @property
    def record(self) -> dict[str, Any]:
        """What this package noted of the run."""
        return self.run.record

    @property
    def method(self) -> str:
        """Registry key of the method; the model's name for a model of another package."""
        name = self.record["model"].removeprefix(f"{self.record['resolved'].get('family', '')}_")
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
            return mean_of(
                calibration["target"] * self._shares(task) for task, calibration in self.record["calibrations"].items()
            )
        kind, _, value = str(self.record["resolved"].get("pruner", {}).get("budget")).partition("=")
        if kind == "ratio" and (native := self.mean("native_visual_tokens")) is not None:
            return float(value) * native
        shares = mean_of(map(self._shares, self.record["achieved"])) or 1
        return float(value) * shares if kind == "tokens" else None

    def seconds(self, stage: str) -> float | None:
        """Of a stage or of the `processor`, per question that was asked in this run; `None` if the record lacks it."""
        totals = self.record["totals"]
        asked = totals.get("questions", 0) - totals.get("resumed_questions", 0)
        return totals[f"seconds_{stage}"] / asked if asked and f"seconds_{stage}" in totals else None

    @property
    def questions_per_second(self) -> float | None:
        """Of the record; `None` if it lacks it, and where every answer was taken over from an interrupted run."""
        return self.record["totals"].get("questions_per_second") or None

    def _shares(self, task: str) -> float:
        """How often a question of a task spends the budget: once for each of its views, unless that is per image."""
        per_view = self.record["resolved"].get("per", "view") == "view"
        return self.record["achieved"].get(task, {}).get("views", 1) if per_view else 1

    def mean(self, quantity: str) -> float | None:
        """An achieved quantity, averaged over the tasks."""
        return mean_of(achieved.get(quantity) for achieved in self.record["achieved"].values())


@dataclass(frozen=True)
class Excluded:
    """A folder that is in no table, and why."""

    path: Path
    reason: str


def left_out(excluded: Sequence[Excluded]) -> list[str]:
    """Run folders that could not be used, a line for each reason."""
    reasons: dict[str, list[Path]] = {}
    for entry in excluded:
        reasons.setdefault(" ".join(entry.reason.split()), []).append(entry.path)
    return [
        f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}: {reason}"
        for reason, paths in reasons.items()
    ]


def collect(results: Path) -> tuple[list[Measured], list[Excluded]]:
    """Every run below a folder, by path: whole ones, and those that are left out (damaged, foreign, partial, failed).

    Raises:
        UserError: there is no such folder, or no whole run in it.
    """
    results = Path(results)
    folders = {path.parent for name in (RECORD, RESULTS) for path in results.rglob(name)}
    files = {path for path in results.rglob(f"[0-9]*_[0-9]*{HOST_RESULTS}") if path.parent not in folders}
    if not (places := sorted(folders | files)):
        raise UserError(
            wanted=f"runs below {results}",
            found="no folder with a run record, no results of lmms_eval" if results.is_dir() else "no such folder",
            allowed=f"a folder of runs, each with its {RECORD}, or the --output_path of lmms_eval --log_samples",
            next_step="rcb eval, or rcb quickstart",
        )
    runs, excluded = [], []
    for place in places:
        try:
            runs.append(_measured(read_run(place)))
        except Unusable as error:
            excluded.append(Excluded(place, str(error)))
    if not runs:
        raise UserError(
            wanted=f"a table of the runs below {results}",
            found=f"none that can be used; the first: {excluded[0].path}: {excluded[0].reason}",
            allowed="whole runs of tasks that score every sample, with their samples (--log_samples)",
            next_step="run them again, or rcb table --paper for the tasks of the paper's tables",
        )
    return _joined(runs), excluded


def _joined(runs: list[Measured]) -> list[Measured]:
    """Runs beside each other that differ in nothing but their tasks, as `rcb eval` leaves them, as one run each."""
    alike: dict[tuple, list[Measured]] = {}
    for run in runs:
        alike.setdefault((run.path.parent, run.setting, run.arguments.get("seed")), []).append(run)
    joined = []
    for (place, *_), parts in alike.items():
        tasks = [task for part in parts for task in part.scores]
        joined += parts if len(parts) == 1 or len(set(tasks)) < len(tasks) else [_join(place, parts)]
    return joined


def _join(place: Path, parts: list[Measured]) -> Measured:
    def union(of_part: Callable[[Measured], dict[str, Any]]) -> dict[str, Any]:
        return {name: value for part in parts for name, value in of_part(part).items()}

    totals = [part.record["totals"] for part in parts]
    speeds = [(part.record["totals"].get("questions", 0), part.questions_per_second) for part in parts]
    seconds = None if any(speed is None for _, speed in speeds) else sum(number / speed for number, speed in speeds)
    record = parts[0].record | {
        "calibrations": union(lambda part: part.record["calibrations"]),
        "achieved": union(lambda part: part.record["achieved"]),
        "totals": {
            **{name: sum(total[name] for total in totals) for name in set.intersection(*map(set, totals))},
            "questions_per_second": sum(number for number, _ in speeds) / seconds,
        }
        if seconds
        else {},
    }
    return Measured(
        replace(parts[0].run, path=place if parts[0].path.is_dir() else parts[0].path, record=record),
        union(lambda part: part.scores),
        union(lambda part: part.official),
        union(lambda part: part.benchmarks),
        union(lambda part: part.sources),
    )


def _measured(run: Run) -> Measured:
    """A run with its scores.

    Raises:
        Unusable: samples that are damaged, or a task that does not score every sample.
    """
    benchmarks, scores, official = {}, {}, {}
    for task in run.record["tasks"]:
        benchmark = BENCHMARKS.get(task) or _other(run, task)
        scores[task] = run.scores(task, benchmark.metrics, combine=benchmark.combine, cluster=benchmark.cluster)
        whole = benchmark.combine is not None or len(scores[task]) == run.count(task)
        if not scores[task].parts or not whole:
            raise Unusable(f"not every sample of {task} has a score of its own")
        values = scores[task].values
        if not 0 <= values.min() <= values.max() <= 1:
            benchmark = replace(benchmark, unit=1)
        if benchmark.official and (value := run.value(task, benchmark.official)) is not None:
            official[task] = value
        benchmarks[task] = benchmark
    return Measured(run, scores, official, benchmarks, dict.fromkeys(scores, run))


def _other(run: Run, task: str) -> Benchmark:
    """A task that this package does not know, by the first of its metrics that scores every sample."""
    rows = [row for part in run.parts(task) for row in run.rows(part)]
    for metric in dict.fromkeys(key.partition(",")[0] for part in run.parts(task) for key in run.metrics(part)):
        scores = [(scored_by(row, [metric]) or {}).get("score") for row in rows]
        if rows and all(isinstance(score, (int, float)) for score in scores):
            mean, value = sum(scores) / len(scores), run.value(task, metric)
            is_mean = value is None or any(abs(unit * mean - value) <= 0.01 * unit for unit in (1, 100))
            return Benchmark(f"{task} {metric}" + ("" if is_mean else ", mean of samples,"), (metric,))
    raise Unusable(f"no metric of task {task} scores every sample")
