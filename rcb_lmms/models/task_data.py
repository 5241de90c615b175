"""The data of tasks, looked at before lmms-eval loads it, and what is told of data that cannot be used.

lmms-eval tries a download five times, which takes half a minute, and ends in a traceback; and `datasets` takes its own
cache of a local folder whose files have changed since, because it knows the folder by the names of its files alone.
"""

from __future__ import annotations

import functools
import os
import re
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rcb_lmms.errors import UserError
from rcb_lmms.models.command import task_files
from rcb_lmms.resources import cache_dir

HUB_TIMEOUT_S = 5


def check_data(names: Iterable[str], include_path: str | Sequence[str] = ()) -> None:
    """Refuse tasks whose data is damaged, absent, or read from a cache of other files.

    Args:
        names: of tasks and groups.
        include_path: a folder or more of task files beside lmms-eval's and ours.

    Raises:
        UserError: a parquet file that cannot be read or has no rows, a cache that is out of date, a hub that cannot
            be reached or refuses.
    """
    for task, path, config in sorted(set(_data_sets(names, include_path))):
        if os.path.isdir(path):
            _check_folder(task, Path(path), config)
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not known_here(path):
            _check_hub(task, path)


def unloadable(task: str, error: BaseException) -> UserError:
    """The error for data that cannot be loaded, for what `datasets`, the hub, or lmms-eval's retries raise."""
    from tenacity import RetryError

    if isinstance(error, RetryError):
        error = error.last_attempt.exception()
    if isinstance(error, UserError):
        return error
    causes = [error] if error.__cause__ is None else [error, error.__cause__]
    found = "; ".join(" ".join(f"{type(cause).__name__}: {cause}".split())[:200] for cause in causes)
    gated = any(word in found.lower() for word in ("gated", "authenticated", "401", "403"))
    return UserError(
        wanted=f"the data of task {task}",
        found=found,
        allowed="a whole data set below the current folder, in the cache, or on the hub",
        next_step="ask for access on the data set's page, then: hf auth login"
        if gated
        else "hf download it again, which completes what is there; rcb lab data writes the laboratory's",
    )


def failure(tasks: str, error: Exception) -> UserError | None:
    """What a user can mend of an exception that lmms-eval let through; `None` if it is no task's or data's."""
    from tenacity import RetryError

    from rcb_lmms.files import write_atomic

    if isinstance(error, (RetryError, UserError)):
        return unloadable(tasks, error)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if re.search(r"lmms_eval[\\/]tasks[\\/]\w+[\\/]", frame.filename)]
    if not own:
        return None
    log = write_atomic(cache_dir() / "traceback.txt", "".join(traceback.format_exception(error)))
    place = re.sub(r".*lmms_eval[\\/]", "lmms_eval/", own[-1].filename)
    return UserError(
        wanted=f"the documents of {tasks}",
        found=f"one on which {place}, line {own[-1].lineno}, raised {type(error).__name__}: {error}",
        allowed="documents with everything that the task's own code reads, and no nulls among it",
        next_step=f"mend the data (the whole traceback: {log})",
    )


def _data_sets(names: Iterable[str], include_path: str | Sequence[str]) -> list[tuple[str, str, str]]:
    """Task, data set and configuration of every task that names and groups stand for."""
    return [
        (name, content["dataset_path"], str(content.get("dataset_name") or "default"))
        for name, _, content in task_configs(names, include_path)
        if content.get("task") == name and isinstance(content.get("dataset_path"), str)
    ]


def task_configs(
    names: Iterable[str], include_path: str | Sequence[str] = ()
) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """Name, file and content of every group and task that names stand for, what files include taken in."""
    import yaml

    class Plain(yaml.SafeLoader):
        """YAML without the functions that lmms-eval's tags name."""

    Plain.add_multi_constructor("!", lambda *_: None)

    @functools.cache
    def read(file: Path) -> dict[str, Any]:
        try:
            content = yaml.load(file.read_text(encoding="utf-8"), Plain)
        except (OSError, ValueError, RecursionError, yaml.YAMLError):  # lmms-eval passes over such files too
            return {}
        if not isinstance(content, dict):
            return {}
        included = content.get("include")
        base = read(file.parent / included) if isinstance(included, str) else {}
        return {**base, **content}

    texts = task_files(include_path)
    todo, seen = [*names], set()
    while todo:
        name = todo.pop()
        if name in seen or not isinstance(name, str):
            continue
        seen.add(name)
        for file in (file for file, text in texts.items() if re.search(rf"\b{re.escape(name)}\b", text)):
            content = read(file)
            if content.get("group") == name and isinstance(content.get("task"), list):
                todo += [task.get("task") if isinstance(task, dict) else task for task in content["task"]]
                yield name, file, content
            elif content.get("task") == name:
                yield name, file, content


def _check_folder(task: str, folder: Path, config: str) -> None:
    """Every parquet file that the folder's configuration names can be read, and the cache is made of these."""
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError

    try:
        builder = load_dataset_builder(str(folder), None if config == "default" else config)
    except (OSError, ValueError, DatasetsError) as error:
        raise unloadable(task, error) from error
    for split, files in (builder.config.data_files or {}).items():
        local = [Path(file) for file in files if str(file).endswith(".parquet") and Path(file).is_file()]
        rows = sum(_rows(task, file) for file in local)
        cached = sorted(Path(builder.cache_dir).glob(f"{builder.dataset_name}-{split}*.arrow"))
        if local and rows == 0:
            raise _damaged(task, local[0], "no rows")
        newer = [file for file in local if cached and file.stat().st_mtime > cached[0].stat().st_mtime]
        if newer and not _same_rows(local, cached):
            raise UserError(
                wanted=f"the data of task {task}",
                found=f"{newer[0]}, which changed after `datasets` had made its own copy of the folder, which it takes",
                allowed="a copy made of the files as they are now",
                next_step=f"rm -r {builder.cache_dir}",
            )


def _rows(task: str, file: Path) -> int:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(file).num_rows
    except (OSError, pyarrow.ArrowException) as error:
        raise _damaged(task, file, " ".join(f"{file.stat().st_size} bytes; {error}".split())[:200]) from error


def _damaged(task: str, file: Path, found: str) -> UserError:
    return UserError(
        wanted=f"the data of task {task}",
        found=f"{file}: {found}",
        allowed="whole parquet files with at least one row",
        next_step="hf download the data set again, which completes what is there; rcb lab data writes the laboratory's",
    )


def _same_rows(files: Sequence[Path], cached: Sequence[Path]) -> bool:
    """Whether parquet files and the cache made of them hold the same, column by column, in a few rows at a time."""
    import pyarrow.parquet
    from datasets import Dataset, concatenate_datasets

    copy = concatenate_datasets([Dataset.from_file(str(file)) for file in cached])
    start = 0
    for file in files:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(64):
            own = copy.data.table.slice(start, len(batch)).combine_chunks()
            start += len(batch)
            if own.to_pylist() != pyarrow.Table.from_batches([batch]).to_pylist():
                return False
    return start == len(copy)


def known_here(data_set: str) -> bool:
    """Whether `datasets` or the hub's client has something of a data set in its cache."""
    import datasets
    from huggingface_hub import constants

    owner, name = data_set.split("/")
    places = (Path(datasets.config.HF_DATASETS_CACHE) / f"{owner}___{name.lower()}",
              Path(constants.HF_HUB_CACHE) / f"datasets--{owner}--{name}")  # fmt: skip
    return any(place.exists() for place in places)


@functools.cache
def _hub_error(data_set: str) -> Exception | None:
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(data_set, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # the client's own, and those of two libraries below it
        return error
    return None


def _check_hub(task: str, data_set: str) -> None:
    error = _hub_error(data_set)
    if error is None:
        return
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        raise unloadable(task, error)
    from rcb_lmms.lab.data import BENCHMARKS

    name = next((name for name in BENCHMARKS if name in task), None)
    laboratory = f"; the laboratory's: rcb lab data --out lab --benchmark {name}, and run in lab" if name else ""
    raise UserError(
        wanted=f"the data of task {task}: {data_set}",
        found=f"no such folder here, nothing of it in the cache, and no hub: {type(error).__name__}",
        allowed="a folder of that name below the current one, the cache, or a connection",
        next_step=f"hf download --repo-type dataset {data_set}, where there is a connection{laboratory}",
    )
