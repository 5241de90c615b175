"""What a set of runs says, as numbers: one row per method and budget; runs that differ only in their seed share a row.

What is missing stays missing: it is neither guessed nor averaged over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pandas as pd

from rcb_lmms.errors import UserError
from rcb_lmms.pruners import PRUNERS
from rcb_lmms.report.agreement import agreement_columns
from rcb_lmms.report.collect import BENCHMARKS, BUDGETS, Benchmark, Measured
from rcb_lmms.report.reading import Scores, mean_of
from rcb_lmms.report.statistics import accuracy_interval, mcnemar, mean_interval, paired_p

_PLACES = ("pretrained", "device", "device_map", "dtype", "seed", "batch_size", "max_batch_size")


@dataclass(frozen=True)
class Setting:
    """Runs of one method at one budget, one per seed."""

    runs: tuple[Measured, ...]

    @property
    def first(self) -> Measured:
        """The run that stands for all where they agree."""
        return self.runs[0]

    @property
    def budget(self) -> str:
        """The budget as given."""
        return ", ".join(f"{name}={text}" for name, text in self.first.arguments.items() if name in BUDGETS)

    @property
    def options(self) -> str:
        """Arguments that tell this row from others of its method, the budget apart."""
        given = self.first.arguments.items()
        return ", ".join(told(name, text) for name, text in sorted(given) if name not in (*_PLACES, *BUDGETS))

    @property
    def tasks(self) -> list[str]:
        """Tasks that every seed has answered."""
        return [task for task in self.first.scores if all(task in run.scores for run in self.runs)]

    def scores(self, task: str) -> np.ndarray:
        """`(n,)` score of every sample, averaged over the seeds."""
        return np.mean([run.scores[task].values for run in self.runs], axis=0)

    def headline(self, task: str) -> float | None:
        """The score the paper reports: the official one, or else the mean of the samples."""
        if self.first.benchmarks[task].official is None:
            return float(self.scores(task).mean())
        return mean_of(run.official.get(task) for run in self.runs)

    @property
    def speed(self) -> float | None:
        """Questions per second, averaged over seeds."""
        return mean_of(run.questions_per_second for run in self.runs)

    def mean(self, quantity: str) -> float | None:
        """An achieved quantity, averaged over tasks and seeds."""
        return mean_of(run.mean(quantity) for run in self.runs)


def told(name: str, text: str) -> str:
    """An argument as rows and lists show it: a codebook without its folder."""
    shown = PurePath(text).name.removesuffix(".safetensors") if name == "codebook" else text
    return f"{name}={shown}"


def group(runs: Sequence[Measured]) -> list[Setting]:
    """Runs as rows: unpruned first, then larger budgets before smaller, methods in the registry's order.

    Raises:
        UserError: two runs of one setting and seed, or runs of one task over different samples.
    """
    settings: dict[tuple, dict[str, Measured]] = {}
    for run in runs:
        seeds = settings.setdefault(run.setting, {})
        seed = run.arguments.get("seed", "")
        if seed in seeds:
            raise _mixture(seeds[seed], run, "the same run twice")
        seeds[seed] = run
        for task, scores in run.scores.items():
            other = next(earlier for earlier in runs if task in earlier.scores)
            if other.scores[task].documents != scores.documents:
                raise _mixture(other, run, f"different samples of {task}")
    order = [*PRUNERS]
    rows = [Setting(tuple(seeds.values())) for seeds in settings.values()]

    def place(row: Setting) -> tuple:
        budget = row.first.target or row.mean("retained_visual_tokens") or 0
        known = order.index(row.first.method) if row.first.method in order else len(order)
        return row.first.method != "none", -round(budget), known, row.first.method, row.options

    return sorted(rows, key=place)


def model_of(run: Measured) -> tuple[str | None, ...]:
    """What runs share whose methods are compared: the checkpoint, and whether it sees images in tiles.

    `lab` is the name of three checkpoints, one a family.
    """
    resolved = run.record["resolved"]
    return run.arguments.get("pretrained"), resolved.get("family"), resolved.get("split")


def _mixture(one: Measured, two: Measured, found: str) -> UserError:
    return UserError(
        wanted="one table of these runs",
        found=f"{found}: {one.path} and {two.path}",
        allowed="runs over the same samples, each once",
        next_step="move one of the two elsewhere",
    )


def summary_table(runs: Sequence[Measured]) -> pd.DataFrame:
    """Numbers of every method and budget.

    Columns: `pretrained`, `method`, `options`, `budget` (as given), `seeds`, `target_tokens`, `retained_tokens`,
    `layer_average_tokens`, then per task `<task>_accuracy`, `_low`, `_high` (95% interval over images), `_std` (over
    seeds), `_score` (official), `_retained`, then `relative` (mean over tasks of the paper's score, in percent of the
    unpruned model's), `p_vs_random`, what answers have in common with the unpruned model's (see `agreement_columns`),
    `questions_per_second`, `processor_seconds` and `choose_seconds` (a question), `prefill_tflops`, `method_tflops`
    and `runs` (folder names).

    How the tasks are shown is in the frame's `attrs["benchmarks"]`.

    Raises:
        UserError: runs that cannot share a table; see `group`.
    """
    rows, benchmarks = group(runs), benchmarks_of(runs)
    tasks = [task for task in benchmarks if any(task in row.tasks for row in rows)]
    table = pd.DataFrame([_numbers(row, rows, tasks) for row in rows])
    table.attrs["benchmarks"] = {task: benchmarks[task] for task in tasks}
    return table


def benchmarks_of(runs: Sequence[Measured]) -> dict[str, Benchmark]:
    """How every task of some runs is shown: those that this package knows first, in its order."""
    found: dict[str, Benchmark] = {}
    for run in runs:
        for task, own in run.benchmarks.items():
            found[task] = replace(own, unit=min(own.unit, found.get(task, own).unit))
    return {task: found[task] for task in sorted(found, key=lambda task: [*BENCHMARKS, task].index(task))}


def _numbers(row: Setting, rows: list[Setting], tasks: list[str]) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "pretrained": row.first.arguments.get("pretrained"),
        "method": row.first.method,
        "options": row.options,
        "budget": row.budget,
        "seeds": len(row.runs),
        "target_tokens": mean_of(run.target for run in row.runs),
        "retained_tokens": row.mean("retained_visual_tokens"),
        "layer_average_tokens": row.mean("layer_average_visual_tokens"),
    }
    for task in tasks:
        if task in row.tasks:
            numbers |= {f"{task}_{name}": number for name, number in _task_numbers(row, task).items()}
    unpruned, downsampled = unpruned_of(row, rows), _at_budget("downsample", row, rows)
    return numbers | {
        "relative": _relative(row, unpruned, tasks),
        "p_vs_random": _p_vs_random(row, _random(row, rows)),
        **agreement_columns([run.scores for run in row.runs], *(_others(row, own) for own in (unpruned, downsampled))),
        "questions_per_second": row.speed,
        "processor_seconds": mean_of(run.seconds("processor") for run in row.runs),
        "choose_seconds": mean_of(run.seconds("choose") for run in row.runs),
        "prefill_tflops": row.mean("prefill_tflops"),
        "method_tflops": row.mean("method_tflops"),
        "runs": " ".join(run.path.name for run in row.runs),
    }


def _others(row: Setting, other: Setting | None) -> dict[str, Scores] | None:
    """The scores of what a row is compared with, unless that is the row itself."""
    return None if other is None or other is row else other.first.scores


def _task_numbers(row: Setting, task: str) -> dict[str, float | None]:
    interval = accuracy_interval(row.scores(task), row.first.scores[task].clusters)
    seeds = [float(run.scores[task].values.mean()) for run in row.runs]
    return {
        "accuracy": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "std": float(np.std(seeds, ddof=1)) if len(seeds) > 1 else None,
        "score": row.headline(task) if row.first.benchmarks[task].official else None,
        "retained": mean_of(run.sources[task].achieved(task, "retained_visual_tokens") for run in row.runs),
    }


def unpruned_of(row: Setting, rows: Sequence[Setting]) -> Setting | None:
    """The unpruned model that a row is measured against; itself, if it is one."""
    return next((other for other in rows if other.first.method == "none" and _comparable(row, other)), None)


def _random(row: Setting, rows: list[Setting]) -> Setting | None:
    """The random row at the same budget."""
    return None if row.first.method == "random" else _at_budget("random", row, rows)


def _at_budget(method: str, row: Setting, rows: list[Setting]) -> Setting | None:
    """The row of a control at the budget that a method was asked for."""
    if row.first.target is None:
        return None
    candidates = [
        other
        for other in rows
        if other.first.method == method and other.first.target is not None and _comparable(row, other)
    ]
    return next((other for other in candidates if abs(other.first.target - row.first.target) <= 0.5), None)


def _comparable(row: Setting, other: Setting) -> bool:
    return model_of(row.first) == model_of(other.first)


def _relative(row: Setting, unpruned: Setting | None, tasks: list[str]) -> float | None:
    if unpruned is None or not set(tasks) <= {*row.tasks} & {*unpruned.tasks}:
        return None
    shares = []
    for task in tasks:
        score, whole = row.headline(task), unpruned.headline(task)
        if score is None or not whole:
            return None
        shares.append(score / whole)
    return 100 * sum(shares) / len(shares)


def _p_vs_random(row: Setting, random: Setting | None) -> float | None:
    if random is None or row.tasks != random.tasks:
        return None
    return paired_p([(row.scores(task), random.scores(task), row.first.scores[task].clusters) for task in row.tasks])


def comparison_table(runs: Sequence[Measured]) -> pd.DataFrame:
    """Every method against random at the same budget, task by task, on the same samples.

    Columns: `method`, `options`, `target_tokens`, `task`, `difference` of accuracy with `low` and `high` (95% interval
    over images), `p` (permutation of whole images; random averaged over its seeds, sample by sample) and `mcnemar_p`
    (exact, the largest over seeds; takes questions for independent).
    """
    rows = group(runs)
    found = []
    for row in rows:
        random = _random(row, rows)
        for task in row.tasks if random is not None else ():
            if task in random.tasks:
                found.append(_comparison(row, random, task))
    columns = ["method", "options", "target_tokens", "task", "difference", "low", "high", "p", "mcnemar_p"]
    table = pd.DataFrame(found, columns=columns)
    table.attrs["benchmarks"] = benchmarks_of(runs)
    return table


def _comparison(row: Setting, random: Setting, task: str) -> dict[str, Any]:
    scores, baseline, clusters = row.scores(task), random.scores(task), row.first.scores[task].clusters
    interval = mean_interval(scores - baseline, clusters)
    return {
        "method": row.first.method,
        "options": row.options,
        "target_tokens": row.first.target,
        "task": task,
        "difference": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "p": paired_p([(scores, baseline, clusters)]),
        "mcnemar_p": _mcnemar(row, random, task),
    }


def _mcnemar(row: Setting, random: Setting, task: str) -> float | None:
    """The largest over seeds; none for answers that are not just right or wrong."""
    pairs = [(one.scores[task].values, two.scores[task].values) for one in row.runs for two in random.runs]
    if not np.isin(np.concatenate([values for pair in pairs for values in pair]), (0, 1)).all():
        return None
    return max(mcnemar(*pair) for pair in pairs)


def version_notes(runs: Iterable[tuple[Path, dict[str, Any]]]) -> list[str]:
    """What runs of one table were made with that differs, a line for each package.

    Args:
        runs: folder and record of each.
    """
    found: dict[str, dict[str, list[Path]]] = {}
    for folder, record in runs:
        for name, version in (record.get("versions") or {}).items():
            found.setdefault(name, {}).setdefault(str(version), []).append(folder)
    return [
        f"mixed versions of {name}: "
        + "; ".join(f"{version} ({len(folders)} runs, {folders[0].name} first)" for version, folders in own.items())
        for name, own in found.items()
        if len(own) > 1
    ]
