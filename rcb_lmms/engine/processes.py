"""Several processes, as torchrun or accelerate start them; one process is the same code with a gather of one."""

from __future__ import annotations

import os
from typing import TypeVar

Value = TypeVar("Value")


def rank_and_size() -> tuple[int, int]:
    """This process's number and how many there are."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own_device(gpus: int = 1) -> str | None:
    """The GPU of this process among those of its machine; `None` for a process alone, and where there is none.

    It is the first of as many as each process has.
    """
    import torch

    if rank_and_size()[1] == 1 or not torch.cuda.is_available():
        return None
    rank = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    return f"cuda:{rank * gpus % torch.cuda.device_count()}"


def join_processes() -> tuple[int, int]:
    """`rank_and_size`, after joining the other processes that torchrun started, if any.

    One may wait for another for days: shares of a long pass end at different times.
    """
    import datetime

    import torch.distributed as dist

    rank, size = rank_and_size()
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    return rank, size


def gather(value: Value) -> list[Value]:
    """`value` of every process, in the order of their ranks, on every process."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Value] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
