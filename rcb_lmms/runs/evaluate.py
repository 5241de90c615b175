"""`rcb eval`: the runs of lmms-eval configuration files, one folder for each entry and task.

A task of its own per run, so that what one task lacks (Java, a login, a video) costs nothing of the others.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rcb_lmms.errors import UserError
from rcb_lmms.files import no_file
from rcb_lmms.models.command import check_tasks
from rcb_lmms.models.task_data import check_data
from rcb_lmms.runs.configs import Entry, for_checkpoint, read_configs, run_folder
from rcb_lmms.runs.folder import RECORD, finished, locked, run_evaluation
from rcb_lmms.runs.tasks import make_task_manager

RESULTS = "results.json"


def evaluate(
    configs: Sequence[str | Path],
    results: Path,
    *,
    limit: int | None = None,
    pretrained: str | None = None,
    batch_size: int | None = None,
    include_path: Path | None = None,
) -> list[str]:
    """Run configuration files; what is done is skipped, what was interrupted goes on.

    Args:
        configs: files, or stems of shipped ones.
        results: a folder; each run has its own below it (see `run_folder`).
        limit: only the first documents of each task; such runs lie apart and are in no table.
        pretrained: instead of the checkpoints that the files mean.
        batch_size: instead of the files'.
        include_path: a folder of tasks beside lmms-eval's and ours, instead of the files'.

    Returns:
        Why runs failed, one text each; a failed run does not stop the others.

    Raises:
        UserError: a configuration that cannot be read, or a task that does not exist, before anything runs.
    """
    entries = read_configs(configs)
    if batch_size is not None:
        entries = [replace(entry, batch_size=batch_size) for entry in entries]
    if include_path is not None:
        entries = [replace(entry, include_path=str(include_path)) for entry in entries]
    for folder in {entry.include_path for entry in entries if entry.include_path}:
        _check_folder(folder)
    managers = functools.cache(make_task_manager)  # of each entry, since prompts may depend on the model
    asked: dict[str | None, list[str]] = {}
    for entry in entries:
        if not _done(run_folder(results, entry, limit)):
            asked.setdefault(entry.include_path, []).append(entry.task)
    for place, tasks in asked.items():
        check_tasks(list(dict.fromkeys(tasks)), _places(place))
    problems: dict[str, list[Path]] = {}
    spent: list[float] = []
    for number, entry in enumerate(entries, 1):
        print(f"[{number:>{len(str(len(entries)))}}/{len(entries)}] {entry.name} {entry.task} ", end="", flush=True)
        began, folder = time.perf_counter(), run_folder(results, entry, limit)
        try:
            tasks = tuple(asked.get(entry.include_path, ()))
            needed = functools.partial(managers, entry.model, entry.include_path, tasks)
            fresh = _run(entry, folder, for_checkpoint(entry, pretrained), limit, needed)
            spent += [time.perf_counter() - began] if fresh else []
            print(_told(spent, len(entries) - number) if fresh else "done before", flush=True)
        except Exception as error:  # whatever a data set, a model or a scorer raises; run.json has it in full
            told = (error.wanted, error.found) if isinstance(error, UserError) else (type(error).__name__, error)
            reason = "{}: {}".format(*told)
            print(f"failed: {reason}", flush=True)
            mend = f"; next: {error.next_step}" if isinstance(error, UserError) else ""
            problems.setdefault(f"{reason}{mend}", []).append(folder)
    return [
        f"{folders[0]}{f' and {len(folders) - 1} more' if len(folders) > 1 else ''}: {reason}"
        for reason, folders in problems.items()
    ]


def _told(spent: list[float], left: int) -> str:
    """The seconds of the last run, and what the runs that are left will take if they take as long on average."""
    seconds = left * sum(spent) / len(spent)
    return f"{spent[-1]:.1f} s" + (f", about {seconds / 60:.0f} min left" if seconds >= 60 else "")


def _done(folder: Path) -> bool:
    with contextlib.suppress(UserError):  # a damaged record is reported when its turn comes
        return finished(folder) and (folder / RESULTS).exists()
    return False


def _check_folder(folder: str) -> None:
    if not os.path.isdir(folder):
        raise UserError(
            wanted=f"tasks in {folder}",
            found=no_file(folder) or "a file",
            allowed="a folder of lmms-eval task files",
            next_step="--include_path FOLDER, relative to the folder you are in",
        )


def _places(include_path: str | None) -> list[str]:
    return [include_path] if include_path else []


def _run(entry: Entry, folder: Path, arguments: dict[str, str], limit: int | None, manager: Callable[[], Any]) -> bool:
    """Whether the run was made now."""
    with locked(folder):
        done = _done(folder)
        if not done and finished(folder):
            raise UserError(
                wanted=f"the results that {folder / RECORD} speaks of",
                found=f"no {RESULTS} beside it",
                allowed="run folders as they were written",
                next_step=f"remove {folder} to run it again",
            )
        if not done:
            check_data([entry.task], _places(entry.include_path))
        run_evaluation(
            entry.model,
            arguments,
            [entry.task],
            folder,
            batch_size=entry.batch_size,
            limit=limit,
            task_manager=None if done else manager(),
        )
    return not done
