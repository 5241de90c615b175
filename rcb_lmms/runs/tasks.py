"""Tasks as lmms-eval finds them: ours and a folder's beside its own, and data sets below the current folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rcb_lmms.models.task_data import task_configs


def make_task_manager(entry: str = "default", include_path: str | Path | None = None, tasks: Sequence[str] = ()) -> Any:
    """lmms-eval's tasks with ours and a folder's beside them.

    Args:
        entry: a model id, by which tasks choose their words.
        include_path: a folder of more tasks.
        tasks: all that will be asked for, which saves the ten seconds in which lmms-eval reads every file it has.
    """
    from lmms_eval.tasks import TaskManager

    from rcb_lmms.resources import data_dir

    folders = [str(data_dir("tasks")), *([] if include_path is None else [str(include_path)])]
    found = list(task_configs(tasks, folders)) if tasks else []
    if not found or not {*tasks} <= {name for name, _, _ in found}:  # patterns, files, tags
        return TaskManager("ERROR", include_path=folders, model_name=entry)
    theirs = dict.fromkeys(str(file.parent) for _, file, _ in found)
    return TaskManager("ERROR", include_path=[*theirs, *folders], include_defaults=False, model_name=entry)


@contextlib.contextmanager
def working_directory(path: Path) -> Iterator[None]:
    """Inside `path` for a while: lmms-eval finds local data sets relative to the current directory."""
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)
