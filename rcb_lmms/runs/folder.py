"""One evaluation as a folder: the record is written first, results last, and a finished run is not repeated."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rcb_lmms.errors import UserError
from rcb_lmms.files import answers_hash, unwritable, write_atomic
from rcb_lmms.runs.tasks import make_task_manager

RECORD, LOCK = "run.json", ".rcb.lock"


def run_evaluation(
    entry: str,
    arguments: dict[str, Any],
    tasks: list[str],
    out: Path,
    *,
    batch_size: int = 1,
    limit: int | None = None,
    task_manager: Any = None,
) -> Path:
    """Run an entry through lmms-eval in this process and leave `run.json`, `results.json` and the samples in `out`.

    Args:
        entry: a model id, such as `llava_rcb`.
        arguments: its model_args, `batch_size` apart.
        tasks: task names; their data sets are looked up from the current directory, then on the hub.
        out: a folder of this run's own.
        batch_size: questions per batch; does not change answers in float32.
        limit: only the first documents of each task; such a run is marked and never enters a table.
        task_manager: an lmms-eval `TaskManager` to share between runs.

    A run that was interrupted goes on behind its last batch. Answers of changed sources are not kept.

    Returns:
        `out`. A folder that already holds a successful run of the same arguments is returned as it is.

    Raises:
        UserError: the folder belongs to another run, or samples failed (the record names them).
    """
    question = {
        "model": entry,
        "arguments": {name: str(value) for name, value in sorted(arguments.items())},
        "tasks": tasks,
        "limit": limit,
    }
    before = read_record(out)
    if before is not None:
        _check_same(before, question, out)
        if before["status"] == "success":
            return out
    record = {"status": "started", **question, "started": _now(), "process": os.getpid()}
    _write(out, record)
    from rcb_lmms.models.invocation import Context, evaluating
    from rcb_lmms.models.journal import forget

    began = time.perf_counter()
    try:
        with evaluating(Context(answers=out / "answers")) as context:
            results = _evaluate(entry, arguments, tasks, batch_size, limit, task_manager)
        run = asdict(context.only_record())
    except BaseException as error:
        lines = traceback.format_exception_only(error)
        _write(out, record | {"status": "failed", "finished": _now(), "error": "".join(lines).strip()})
        raise
    samples = results.pop("samples")
    for task, rows in samples.items():
        lines = [json.dumps(row, ensure_ascii=False, default=_described) for row in rows]
        write_atomic(out / f"samples_{task}.jsonl", "\n".join(lines) + "\n")
    write_atomic(out / "results.json", json.dumps(results, indent=1, default=str))
    record["answers"] = {task: answers_hash(rows) for task, rows in samples.items()}
    status = "failed" if run["failures"] else "success"
    record |= {key: value for key, value in run.items() if key not in question}
    _write(out, record | {"status": status, "finished": _now(), "wall_s": time.perf_counter() - began})
    if run["failures"]:
        raise UserError(
            wanted=f"answers of {entry} to every question",
            found=f"{len(run['failures'])} samples failed; the first: {run['failures'][0]['error']}",
            allowed="complete runs; a failed sample is in no metric, and the run in no table",
            next_step=f"read {out / RECORD}, mend the cause, and repeat the command",
        )
    forget(out / "answers")
    return out


def _evaluate(
    entry: str, arguments: dict[str, Any], tasks: list[str], batch_size: int, limit: int | None, task_manager: Any
) -> dict[str, Any]:
    from lmms_eval.evaluator import simple_evaluate

    from rcb_lmms.models.task_data import failure

    task_manager = task_manager or make_task_manager(tasks=tasks)
    # Tasks choose their words by the entry: a manager that served another one would ask in that one's.
    task_manager.model_name = entry
    try:
        return simple_evaluate(
            model=entry,
            model_args=",".join(f"{name}={value}" for name, value in arguments.items()),
            tasks=list(tasks),
            batch_size=batch_size,
            limit=limit,
            log_samples=True,
            bootstrap_iters=0,
            task_manager=task_manager,
            verbosity="ERROR",
        )
    except Exception as error:  # whatever a data set, a model or a scorer raises
        raise failure(", ".join(tasks), error) or error from error


def _described(value: Any) -> str:
    """What JSON does not know. lmms-eval leaves images that stand in lists; PIL's own words for them are an address."""
    from PIL import Image

    if isinstance(value, Image.Image):
        digest = hashlib.sha256(value.tobytes()).hexdigest()[:16]
        return f"image {value.mode} {value.width}x{value.height} sha256 {digest}"
    return str(value)


def read_record(out: Path) -> dict[str, Any] | None:
    """The record of the run in a folder; `None` if there is none."""
    path = Path(out) / RECORD
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(record, dict) and {"status", "model"} <= set(record)):
            raise ValueError("no record of a run")
        return record
    except ValueError as error:
        raise UserError(
            wanted=f"the run record {path}",
            found=f"a damaged file ({error})",
            allowed="the JSON that this package wrote",
            next_step=f"remove {path} to run it again",
        ) from error


def finished(out: Path) -> bool:
    """Whether the folder holds the record of a run that succeeded."""
    return (read_record(out) or {}).get("status") == "success"


def _check_same(before: dict[str, Any], question: dict[str, Any], out: Path) -> None:
    differs = [key for key in question if before.get(key) != question[key]]
    if differs:
        raise UserError(
            wanted=f"a folder for {question['model']} with {question['arguments']}",
            found=f"{out} holds another run: " + ", ".join(f"{key}={before.get(key)}" for key in differs),
            allowed="one folder per run",
            next_step="name another folder",
        )


def _write(out: Path, record: dict[str, Any]) -> None:
    write_atomic(Path(out) / RECORD, json.dumps(record, indent=1, default=str))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Refuse a second process in a folder. The system lets go of the lock when its process ends, however.

    Raises:
        UserError: another process is writing there, or the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        lock.acquire()
    except Timeout as error:
        record = read_record(folder) or {}
        raise UserError(
            wanted=f"write to {folder}",
            found=f"another process that writes there since {record.get('started', 'just now')}",
            allowed="one process for each folder of a run",
            next_step="wait for it, or stop it: the same command then continues its work",
        ) from error
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        yield
    finally:
        lock.release()
