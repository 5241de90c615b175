"""Finished runs as they lie in folders, read and checked; every table and plot reads them through this module."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from rcb_lmms.files import answers_hash, no_file, read_jsonl
from rcb_lmms.report.scores import Samples, Scores, answer_of, mark_of, samples_of

RECORD, RESULTS = "run.json", "results.json"
# As `lmms_eval --output_path` names it: a date, a time, and this.
HOST_RESULTS = "_results.json"


class Unusable(Exception):
    """Why a folder or a file is in no table."""


class _Record(BaseModel):
    """What is read of a record; the rest of it may be anything."""

    status: str
    model: str
    arguments: dict[str, str]
    tasks: list[str]
    limit: float | None = None
    failures: list[Any] = []
    error: str | None = None
    versions: dict[str, str | None] = {}
    answers: dict[str, str] = {}


class _FinishedRecord(_Record):
    """A record that a run has completed."""

    resolved: dict[str, Any]
    calibrations: dict[str, dict[str, Any]]
    achieved: dict[str, dict[str, float]]
    totals: dict[str, float]


class _Results(BaseModel):
    """What is read of a results file."""

    results: dict[str, dict[str, Any]]
    groups: dict[str, dict[str, Any]] = {}
    group_subtasks: dict[str, list[str]] = {}
    counts: dict[str, dict[str, int]] = Field(alias="n-samples")


@dataclass(frozen=True)
class Run:
    """A whole run.

    Attributes:
        path: its folder or, of those that `lmms_eval --output_path` leaves, its results file.
        record: what this package noted of it: model, arguments, tasks, budgets, costs. Of a model of another package
            it is the model, its arguments and the tasks.
        results: lmms-eval's.
    """

    path: Path
    record: dict[str, Any]
    results: dict[str, Any]

    def parts(self, task: str) -> list[str]:
        """The tasks that a group consists of, or the task itself."""
        return self.results.get("group_subtasks", {}).get(task) or [task]

    def count(self, task: str) -> int:
        """Documents of a task or a group."""
        return sum(self.results["n-samples"][part]["original"] for part in self.parts(task))

    def metrics(self, task: str) -> dict[str, Any]:
        """lmms-eval's numbers of a task or a group, by metric and filter."""
        return {**self.results["results"], **self.results.get("groups", {})}.get(task, {})

    def value(self, task: str, metric: str) -> float | None:
        """A metric's number, whatever its filter is called."""
        value = next((value for key, value in self.metrics(task).items() if key.partition(",")[0] == metric), None)
        return float(value) if isinstance(value, (int, float)) else None

    def achieved(self, task: str, quantity: str) -> float | None:
        """A quantity of the record's `achieved`, mean over the parts of a task."""
        return mean_of(self.record["achieved"].get(part, {}).get(quantity) for part in self.parts(task))

    def rows(self, task: str) -> list[dict[str, Any]]:
        """The logged samples of one task, by document.

        Raises:
            Unusable: samples that are missing, damaged or another run's.
        """
        if self.path.name.endswith(HOST_RESULTS):
            path = self.path.with_name(f"{self.path.name.removesuffix(HOST_RESULTS)}_samples_{task}.jsonl")
        else:
            path = self.path / f"samples_{task}.jsonl"
        try:
            expected = self.count(task)
            rows = sorted(read_jsonl(path), key=lambda row: row["doc_id"])
            whole = len(rows) == expected == len({row["doc_id"] for row in rows})
            same = task not in self.record["answers"] or self.record["answers"][task] == answers_hash(rows)
        except (KeyError, TypeError, AttributeError, ValueError, OSError, RecursionError) as error:
            raise Unusable(f"{path.name} or {RESULTS} is damaged: {type(error).__name__} {error}") from error
        if not whole:
            raise Unusable(f"{path.name} has {len(rows)} of {expected} samples")
        if not same:
            raise Unusable(f"{path.name} holds other answers than those of the run in {RECORD}")
        return rows

    def scores(
        self, task: str, metrics: Sequence[str], *, combine: str | None = None, cluster: str | None = None
    ) -> Scores:
        """The scores of a task's samples.

        Args:
            task: or a group of tasks.
            metrics: keys of a sample, of which the first that is there holds its score.
            combine: how the scores of one cluster count, see `COMBINE`.
            cluster: what of the document groups samples that are not independent; `lmms_eval` logs no documents, and
                then it is looked for beside the score. By default it is what the score says itself, as those of this
                package do. Where none is known, every sample stands for itself.

        Raises:
            Unusable: samples that are missing, damaged or another run's.
        """
        found: list[Samples] = []
        answers: list[str] = []
        marks: list[float] = []
        whole, digest = True, hashlib.sha256()
        for part in self.parts(task):
            rows = self.rows(part)
            try:
                own = samples_of(rows, metrics, combine, cluster)
                # lmms-eval's own doc_hash covers the address of the image in memory, so it differs from run to run.
                for row in rows:
                    content = [row["doc_id"], row.get("target"), row.get("doc")]
                    digest.update(json.dumps(content, sort_keys=True).encode())
                answers += [answer_of(row) for row in rows]
                marks += [float("nan") if (mark := mark_of(row, metrics)) is None else mark for row in rows]
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise Unusable(f"samples_{part}.jsonl is damaged: {type(error).__name__} {error}") from error
            found, whole = found + own, whole and bool(own)
        return Scores(tuple(found) if whole else (), digest.hexdigest(), tuple(answers), np.array(marks))


def read_run(path: Path) -> Run:
    """A whole run: of a folder as `rcb eval` leaves it, or of a results file as `lmms_eval --output_path` does.

    Raises:
        Unusable: a run that is foreign, damaged, not finished, failed or partial.
    """
    if not path.is_dir():
        results = _checked(_Results, _json(path), path.name)
        record = _record_of_host(results)
        if record.get("limit") is not None:
            raise Unusable(f"limited to the first {record['limit']} samples of each task")
        return Run(path, _checked(_FinishedRecord, record, path.name), results)
    record = _checked(_Record, _json(path / RECORD), RECORD)
    if record["status"] != "success":
        reason = record.get("error") or f"{len(record.get('failures', []))} failed samples"
        raise Unusable("not finished" if record["status"] == "started" else f"failed: {reason}")
    if record.get("limit") is not None:
        raise Unusable(f"limited to the first {record['limit']} samples of each task")
    record = _checked(_FinishedRecord, record, RECORD)
    return Run(path, {"answers": {}, **record}, _checked(_Results, _json(path / RESULTS), RESULTS))


def _record_of_host(results: dict[str, Any]) -> dict[str, Any]:
    """The record in a file of `lmms_eval --output_path`, completed by what that file says itself."""
    from lmms_eval.utils import simple_parse_args_string

    config, known = results.get("config"), results.get("rcb") or {}
    if not isinstance(config, dict) or not isinstance(known, dict):
        raise Unusable("no results of a run")
    given = config.get("model_args") or {}
    members = {member for group in results.get("group_subtasks", {}).values() for member in group}
    record = {
        "model": str(config.get("model")),
        "arguments": given if isinstance(given, dict) else simple_parse_args_string(str(given)),
        "resolved": {},
        "calibrations": {},
        "achieved": {},
        "totals": {},
        "failures": [],
        "versions": {},
        **known,
    }
    if record["failures"]:
        raise Unusable(f"failed: {len(record['failures'])} failed samples")
    tasks = [task for task in results.get("group_subtasks") or results["results"] if task not in members]
    record["arguments"] = {name: str(value) for name, value in record["arguments"].items() if str(value) != "None"}
    return record | {"status": "success", "tasks": tasks, "limit": config.get("limit"), "answers": {}}


def _checked(model: type[BaseModel], data: Any, name: str) -> dict[str, Any]:
    try:
        model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "all of it"
        raise Unusable(f"{name} is damaged: {place}: {first['msg']}") from error
    return data


def _json(path: Path) -> Any:
    if (found := no_file(path)) is not None:
        raise Unusable(f"no {path.name}" if found == "no such file" else f"{path.name} is {found}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Unusable(f"{path.name} is damaged: {error}") from error


def mean_of(values: Iterable[float | None]) -> float | None:
    """The mean, or `None` where one of the values is missing: an average over the rest would be of something else."""
    values = list(values)
    return None if not values or None in values else sum(values) / len(values)
