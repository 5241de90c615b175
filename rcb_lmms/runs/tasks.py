"""Tasks as lmms-eval finds them: ours and a folder's beside its own, and data sets below the current folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def make_task_manager(entry: str = "default", include_path: str | Path | None = None) -> Any:
    """lmms-eval's tasks with ours and a folder's beside them; takes some seconds, so make one for many runs."""
    from lmms_eval.tasks import TaskManager

    from rcb_lmms.resources import data_dir

    folders = [str(data_dir("tasks")), *([] if include_path is None else [str(include_path)])]
    return TaskManager("ERROR", include_path=folders, model_name=entry)


@contextlib.contextmanager
def working_directory(path: Path) -> Iterator[None]:
    """Inside `path` for a while: lmms-eval finds local data sets relative to the current directory."""
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)
