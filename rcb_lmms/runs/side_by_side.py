"""Work in several processes: the laboratory's small model keeps one core busy, and its runs need nothing of another."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from rcb_lmms.errors import UserError

MOST_PROCESSES = 4  # each of 1.5 GB

Work = Callable[[Callable[..., Any], Iterable[tuple[Any, ...]]], Iterator[Any]]


def processes_for_runs() -> int:
    """How many runs of the laboratory's model to make at once: one for each core, and one where a GPU answers."""
    from rcb_lmms.families.loading import chosen_device

    return 1 if chosen_device(None) != "cpu" else min(MOST_PROCESSES, os.cpu_count() or 1)


@contextlib.contextmanager
def workers(number: int, prepare: Callable[[], Any], log: Path) -> Iterator[Work]:
    """Gives what calls a function with each of some arguments and yields the results as they come.

    Args:
        number: of processes, which share the cores and end when this one does, however; with 1 there is none but this.
        prepare: what each begins with, at once: imports, which take seconds.
        log: a file for all that they say.

    Raises:
        UserError: a process ended before its work did.
    """
    if number == 1:
        yield lambda function, items: (function(*item) for item in items)
        return
    threads = max(1, (os.cpu_count() or 1) // number)
    given = (prepare, log, threads, os.getpid())
    pool = ProcessPoolExecutor(number, multiprocessing.get_context("spawn"), _begin, given)
    for _ in range(number):
        pool.submit(os.getpid)  # one is started for each that none is idle for
    try:
        yield lambda function, items: _results([pool.submit(function, *item) for item in items], log)
    finally:
        pool.shutdown(cancel_futures=True)


def _results(futures: list[Future[Any]], log: Path) -> Iterator[Any]:
    for future in as_completed(futures):
        try:
            yield future.result()
        except BrokenProcessPool as error:
            raise UserError(
                wanted="work in several processes",
                found="one that ended before its work, perhaps for want of memory",
                allowed=f"1.5 GB of memory for each of up to {MOST_PROCESSES}",
                next_step=f"read {log}, and repeat the command: finished runs are kept",
            ) from error


def _begin(prepare: Callable[[], Any], log: Path, threads: int, parent: int) -> None:
    """The beginning of a process."""
    threading.Thread(target=_end_with, args=[parent], daemon=True).start()
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)
    prepare()
    import torch

    torch.set_num_threads(threads)
    gc.freeze()  # lmms-eval collects garbage behind every run, and need not look at all this again


def _end_with(parent: int) -> None:
    """End this process when that which started it was killed: the same command, given again, needs its folders."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
