"""A command line of lmms-eval checked before lmms-eval is loaded, which finds a typing error after half a minute."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rcb_lmms.errors import UserError
from rcb_lmms.models import PARTS
from rcb_lmms.models.invocation import argument, asked_runs, configured_runs, refuse_response_cache
from rcb_lmms.resources import data_dir

LISTS = ("list", "list_groups", "list_subtasks", "list_tags")


def check_command() -> None:
    """Refuse what no run of an entry of this package can do.

    Raises:
        UserError: a misspelt entry, a response cache, model_args or gen_kwargs that are refused, no or misspelt tasks,
            a limit that is none.
    """
    _check_model(argument("--model"))
    runs = asked_runs()
    if not runs:
        return
    refuse_response_cache()
    from rcb_lmms.engine.options import Generation
    from rcb_lmms.models.argument_types import parse_arguments
    from rcb_lmms.models.arguments import resolve

    for model, arguments in runs:
        resolve(*PARTS[model], arguments)
    if generation := argument("--gen_kwargs"):
        Generation.parse("of this command", parse_arguments(generation))
    own = {"tasks": argument("--tasks"), "limit": argument("--limit"), "include_path": argument("--include_path")}
    for run in configured_runs() or [{}]:
        asked = {name: run.get(name) if value is None else value for name, value in own.items()}
        _check_limit(asked["limit"])
        _check_tasks(asked["tasks"], asked["include_path"])


def _check_model(name: str | None) -> None:
    near = get_close_matches(str(name), PARTS, cutoff=0.8)
    if name in PARTS or not near:
        return
    from lmms_eval.models import list_available_models

    if name not in list_available_models(include_aliases=True):
        raise UserError(
            wanted=f"--model {name}",
            found="no such entry",
            allowed="the models of `rcb list`, and lmms-eval's own",
            next_step=f"--model {near[0]}" + (f" (or {', '.join(near[1:])})" if near[1:] else ""),
        )


def _check_limit(limit: Any) -> None:
    try:
        number = math.inf if limit is None else float(limit)
    except (TypeError, ValueError):
        number = math.nan
    if limit is not None and not (number == -1 or 0 < number < math.inf):
        raise UserError(
            wanted=f"--limit {limit}",
            found="no number of samples",
            allowed="whole numbers from 1, a share between 0 and 1, or -1 for all",
            next_step="--limit 8, or leave it out",
        )


def _check_tasks(tasks: Any, include_path: Any) -> None:
    if tasks is not None and not isinstance(tasks, str):
        return  # lmms-eval's own forms in configuration files
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if not names:
        raise UserError(
            wanted="tasks to evaluate",
            found=f"--tasks {tasks!r}" if tasks is not None else "no --tasks",
            allowed="names that `lmms_eval tasks list` shows, separated by commas",
            next_step="--tasks pope",
        )
    if not os.path.isdir(tasks) and tasks not in LISTS:
        check_tasks(names, include_path if isinstance(include_path, str) else ())


def check_tasks(names: Sequence[str], include_path: str | Sequence[str] = ()) -> None:
    """Refuse names that no task file of lmms-eval, of this package or of more folders holds.

    Raises:
        UserError: unknown names, with the nearest known ones.
    """
    known = task_words(include_path)
    unknown = [name for name in names if not os.path.isfile(name) and not fnmatch.filter(known, name)]
    if unknown:
        near = [word for name in unknown for word in get_close_matches(name, known, n=1)]
        raise UserError(
            wanted=f"the tasks {', '.join(unknown)}",
            found="no such task or group in lmms-eval, in this package or in --include_path",
            allowed="names that `lmms_eval tasks list` shows, patterns of them such as mme*, and files",
            next_step=f"correct the names: {', '.join(near)}" if near else "lmms_eval tasks list",
        )


def task_files(include_path: str | Sequence[str] = ()) -> dict[Path, str]:
    """The task files of lmms-eval, of this package and of a folder or more, with their texts.

    Files that cannot be read are passed over, as lmms-eval does.
    """
    own = [include_path] if isinstance(include_path, str) else include_path
    return {**_shipped_files(), **{file: text for folder in own for file, text in _texts(Path(folder))}}


@functools.cache
def _shipped_files() -> dict[Path, str]:
    host = Path(importlib.util.find_spec("lmms_eval").origin).parent
    return {file: text for folder in (host / "tasks", data_dir("tasks")) for file, text in _texts(folder)}


def _texts(folder: Path) -> Iterator[tuple[Path, str]]:
    for file in folder.rglob("*"):
        if file.suffix in (".yaml", ".yml", ""):
            with contextlib.suppress(OSError):
                yield file, file.read_text(encoding="utf-8", errors="replace")


def task_words(include_path: str | Sequence[str] = ()) -> set[str]:
    """All words of all task files, the names of tasks among them; reading them so takes a tenth of a second."""
    return {word for text in task_files(include_path).values() for word in re.findall(r"[\w.+-]+", text)}
