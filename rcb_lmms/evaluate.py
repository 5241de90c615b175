"""`rcb eval`: the runs of lmms-eval configuration files, one folder for each entry and task.

A task of its own per run, so that what one task lacks (Java, a login, a video) costs nothing of the others.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rcb_lmms.errors import UserError
from rcb_lmms.resources import data_dir
from rcb_lmms.runs import RECORD, make_task_manager, read_record, run_evaluation

LOCK, RESULTS = "lock", "results.json"
REQUIRED = ("model", "tasks", "output_path")
# `log_samples` is always on here; lmms-eval needs it said.
KEYS = (*REQUIRED, "model_args", "batch_size", "log_samples")

# Visual tokens of one view, or of one video frame, in the models of the paper: what its budgets are shares of.
NATIVE = {"llava": 576, "llava_next": 576, "llava_onevision": 729}
NATIVE_FRAME = 196


@dataclass(frozen=True)
class Entry:
    """One entry of a configuration file for one task; `name` is its folder's."""

    name: str
    model: str
    arguments: tuple[tuple[str, str], ...]
    task: str
    batch_size: int = 1


def run_folder(results: Path, entry: Entry, limit: int | None = None) -> Path:
    """Where an entry's run lies: `RESULTS/NAME/TASK`; partial runs apart from whole ones."""
    return Path(results) / (f"limit-{limit}" if limit else "") / entry.name / entry.task


def for_checkpoint(entry: Entry, pretrained: str | None) -> dict[str, str]:
    """An entry's model_args for another checkpoint.

    The laboratory's models have fewer tokens and one template: budgets become the same share of a view, and the
    original code's templates are left out.
    """
    arguments = dict(entry.arguments)
    if pretrained is None:
        return arguments
    if pretrained.partition(":")[0] == "lab":
        arguments.pop("template", None)
        if "keep" in arguments:
            family = _entry_families()[entry.model]
            native = NATIVE_FRAME if family == "llava_onevision" and "mvbench" in entry.task else NATIVE[family]
            arguments["ratio"] = f"{float(arguments.pop('keep')) / native:.6g}"
    return {"pretrained": pretrained} | arguments


def _entry_families() -> dict[str, str]:
    """Families by model id."""
    from rcb_lmms.models import ENTRIES

    return {f"{family}_{method}": family for family, methods in ENTRIES.items() for method in methods}


def read_configs(configs: Sequence[str | Path]) -> list[Entry]:
    """The runs of configuration files, each once; a file may be named by its stem in `eval_configs/`.

    Raises:
        UserError: no such file, not a configuration of entries of this package, or two entries for one folder.
    """
    known: dict[tuple[str, str], Entry] = {}
    for config in configs:
        for entry in _read_config(_find(config)):
            place = entry.name, entry.task
            if known.setdefault(place, entry) != entry:
                raise UserError(
                    wanted=f"one run in {'/'.join(place)}",
                    found=f"two: {known[place].model} {dict(known[place].arguments)}, {entry.model} "
                    f"{dict(entry.arguments)}",
                    allowed="a last part of output_path for each model and model_args",
                    next_step=f"change one of the two in {config}",
                )
    return list(known.values())


def _find(config: str | Path) -> Path:
    shipped = data_dir("eval_configs")
    for path in (Path(config), shipped / f"{config}.yaml"):
        if path.is_file():
            return path
    raise UserError(
        wanted=f"the configuration {config}",
        found="no such file",
        allowed="a YAML file of lmms-eval runs, or " + ", ".join(sorted(path.stem for path in shipped.glob("*.yaml"))),
        next_step="name one of these",
    )


def _read_config(path: Path) -> list[Entry]:
    import yaml

    try:
        runs = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _not_a_config(path, " ".join(str(error).split())) from error
    runs = runs if isinstance(runs, list) else [runs]
    if not all(isinstance(run, dict) for run in runs):
        raise _not_a_config(path, "something else than runs with keys and values")
    return [entry for run in runs for entry in _entries(path, run)]


def _entries(path: Path, run: dict[str, Any]) -> Iterator[Entry]:
    if missing := [key for key in REQUIRED if not run.get(key)]:
        raise _not_a_config(path, f"a run without {', '.join(missing)}")
    if unknown := sorted(set(run) - set(KEYS)):
        raise _not_a_config(path, f"a run with {', '.join(unknown)}")
    model, arguments = run["model"], run.get("model_args") or ""
    if model not in _entry_families():
        raise _not_a_config(path, f"the model {model}, which is none of `rcb list`")
    if not (isinstance(arguments, str) and isinstance(run["tasks"], str)):
        raise _not_a_config(path, f"model_args or tasks of {model} that are not text")
    pairs = [part.partition("=") for part in arguments.split(",") if part]
    for task in run["tasks"].split(","):
        yield Entry(
            name=Path(run["output_path"]).name,
            model=model,
            arguments=tuple((name.strip(), value.strip()) for name, _, value in pairs),
            task=task.strip(),
            batch_size=int(run.get("batch_size", 1)),
        )


def _not_a_config(path: Path, found: str) -> UserError:
    return UserError(
        wanted=f"runs from {path}",
        found=found,
        allowed=f"one run or a list of them, each with {', '.join(REQUIRED)} and perhaps "
        + ", ".join(key for key in KEYS if key not in REQUIRED),
        next_step="compare it with the files in eval_configs/",
    )


def evaluate(
    configs: Sequence[str | Path],
    results: Path,
    *,
    limit: int | None = None,
    pretrained: str | None = None,
    batch_size: int | None = None,
) -> list[str]:
    """Run configuration files; what is done is skipped, what was interrupted goes on.

    Args:
        configs: files, or stems of shipped ones.
        results: a folder; each run has its own below it (see `run_folder`).
        limit: only the first documents of each task; such runs lie apart and are in no table.
        pretrained: instead of the checkpoints that the files mean.
        batch_size: instead of the files'.

    Returns:
        Why runs failed, one text each; a failed run does not stop the others.

    Raises:
        UserError: a configuration that cannot be read, or a task that does not exist, before anything runs.
    """
    entries = read_configs(configs)
    if batch_size is not None:
        entries = [replace(entry, batch_size=batch_size) for entry in entries]
    managers = functools.cache(make_task_manager)
    todo = [entry for entry in entries if not _done(run_folder(results, entry, limit))]
    if todo:
        _check_tasks(todo, managers(todo[0].model))
    problems = []
    for number, entry in enumerate(entries, 1):
        print(f"[{number:>{len(str(len(entries)))}}/{len(entries)}] {entry.name} {entry.task} ", end="", flush=True)
        began, folder = time.perf_counter(), run_folder(results, entry, limit)
        try:
            fresh = _run(entry, folder, for_checkpoint(entry, pretrained), limit, managers)
            print(f"{time.perf_counter() - began:.1f} s" if fresh else "done before", flush=True)
        except Exception as error:  # whatever a data set, a model or a scorer raises; run.json has it in full
            told = (error.wanted, error.found) if isinstance(error, UserError) else (type(error).__name__, error)
            reason = "{}: {}".format(*told)
            print(f"failed: {reason}", flush=True)
            mend = f"; next: {error.next_step}" if isinstance(error, UserError) else ""
            problems.append(f"{folder}: {reason}{mend}")
    return problems


def _done(folder: Path) -> bool:
    with contextlib.suppress(UserError):  # a damaged record is reported when its turn comes
        return (read_record(folder) or {}).get("status") == "success" and (folder / RESULTS).exists()
    return False


def _check_tasks(entries: Sequence[Entry], manager: Any) -> None:
    unknown = sorted({entry.task for entry in entries} - set(manager.all_tasks))
    if unknown:
        raise UserError(
            wanted=f"the tasks {', '.join(unknown)}",
            found="no such task or group in lmms-eval or tasks/",
            allowed="names that `lmms_eval tasks list` shows, and the files in tasks/",
            next_step="correct the names in the configuration",
        )


def _run(entry: Entry, folder: Path, arguments: dict[str, str], limit: int | None, managers: Any) -> bool:
    """Whether the run was made now."""
    with locked(folder):
        done = _done(folder)
        if not done and (read_record(folder) or {}).get("status") == "success":
            raise UserError(
                wanted=f"the results that {folder / RECORD} speaks of",
                found=f"no {RESULTS} beside it",
                allowed="run folders as they were written",
                next_step=f"remove {folder} to run it again",
            )
        run_evaluation(
            entry.model,
            arguments,
            [entry.task],
            folder,
            batch_size=entry.batch_size,
            limit=limit,
            # Prompts may depend on the model, so managers are shared between runs of one entry only.
            task_manager=None if done else managers(entry.model),
        )
    return not done


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Refuse a second process in a run's folder. The system lets go of the lock when its process ends, however.

    Raises:
        UserError: another process is writing there.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        record = read_record(folder) or {}
        raise UserError(
            wanted=f"write to {folder}",
            found=f"process {record.get('process', '')} writing there since {record.get('started', 'just now')}",
            allowed="one process for each run; several may share a results folder",
            next_step="wait for it, or stop it: the same command then continues its work",
        ) from error
    try:
        yield
    finally:
        lock.release()
