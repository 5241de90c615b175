"""Subsets of a task's documents that do not depend on their order, and tasks restricted to them.

A document is named by a hash of its columns other than images, and chosen by that name: a data set that is sorted anew
or grows keeps its subset.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from rcb_lmms.errors import UserError
from rcb_lmms.regress.declaration import Subset


def load_task(name: str, manager: Any) -> Any:
    """A task object of lmms-eval with its data.

    Raises:
        UserError: there is no such task, it is a group, or its data cannot be loaded.
    """
    from lmms_eval import tasks
    from tenacity import RetryError

    from rcb_lmms.models.task_data import unloadable

    if name not in manager.all_subtasks:
        raise UserError(
            wanted=f"task {name}",
            found="a group" if name in manager.all_tasks else "no such task",
            allowed="single tasks of lmms-eval and of this package",
            next_step="name the group's subtasks" if name in manager.all_tasks else "lmms_eval tasks lists them",
        )
    try:
        return tasks.get_task_dict([name], manager, "chat")[name]
    except (OSError, ValueError, RetryError) as error:
        raise unloadable(name, error) from error


def documents(task: Any) -> dict[str, dict[str, Any]]:
    """Every document's columns that are plain data, by its name, in the order of the data set."""
    docs = task.dataset_no_image[_split(task)]
    plain = docs.select_columns([name for name, feature in docs.features.items() if _plain(feature)])
    seen: Counter[str] = Counter()
    named = {}
    for doc in plain:
        digest = hashlib.sha256(json.dumps(doc, sort_keys=True, default=str).encode()).hexdigest()[:16]
        # Only documents that agree in all columns are told apart by their order.
        named[digest if not seen[digest] else f"{digest}+{seen[digest]}"] = doc
        seen[digest] += 1
    return named


def choose(docs: dict[str, dict[str, Any]], subset: Subset) -> list[str]:
    """Names of the chosen documents: from each stratum in turn, in the order of their names, until there are enough.

    Raises:
        UserError: a column that the documents do not have, or fewer documents than asked for.
    """
    columns = list(next(iter(docs.values()), {}))
    for column in filter(None, (subset.strata, subset.together)):
        if column not in columns:
            raise _refused(subset, f"no column {column}", ", ".join(columns))
    units: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, doc in docs.items():
        unit = str(doc[subset.together]) if subset.together else name
        units[str(doc[subset.strata]) if subset.strata else ""][unit].append(name)
    queues = [sorted(map(sorted, own.values())) for _, own in sorted(units.items())]
    chosen: list[str] = []
    for unit in _in_turn(queues):
        if len(chosen) >= subset.size:
            break
        chosen += unit
    if len(chosen) < subset.size:
        raise _refused(subset, f"{len(docs)} documents", f"up to {len(docs)}")
    return chosen


def restrict(task: Any, names: Sequence[str]) -> list[str]:
    """Leave a task only the named documents; returns the names in the order in which they now stand.

    Raises:
        UserError: documents that are not there.
    """
    positions = {name: position for position, name in enumerate(documents(task))}
    if missing := [name for name in names if name not in positions]:
        raise UserError(
            wanted=f"{len(names)} documents of {task.config.task} that the golden file names",
            found=f"the data changed: {len(missing)} of them are not among {len(positions)} documents",
            allowed="the data that the golden file was made from, in any order",
            next_step="restore the data, or record anew: rcb regress record",
        )
    order = sorted(names, key=positions.__getitem__)
    split = _split(task)
    with_media, without = task.dataset, task.dataset_no_image
    for dataset in [with_media] if with_media is without else [with_media, without]:
        dataset[split] = dataset[split].select([positions[name] for name in order])
    return order


def _split(task: Any) -> str:
    return task.config.test_split or task.config.validation_split


def _plain(feature: Any) -> bool:
    """Whether a column holds text and numbers, no images, sound or video."""
    from datasets import ClassLabel, List, Value

    if isinstance(feature, dict):
        return all(map(_plain, feature.values()))
    return _plain(feature.feature) if isinstance(feature, List) else isinstance(feature, (Value, ClassLabel))


def _in_turn(queues: list[list[list[str]]]) -> Iterator[list[str]]:
    for units in itertools.zip_longest(*queues):
        yield from filter(None, units)


def _refused(subset: Subset, found: str, allowed: str) -> UserError:
    return UserError(
        wanted=f"a subset of {subset.size} documents, strata={subset.strata}, together={subset.together}",
        found=found,
        allowed=allowed,
        next_step="correct the subset in the declaration",
    )
