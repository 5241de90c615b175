"""Several processes, as torchrun or accelerate start them; one process is the same code with a gather of one."""

from __future__ import annotations

import os
from typing import TypeVar

Value = TypeVar("Value")


def rank_and_size() -> tuple[int, int]:
    """This process's number and how many there are."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def gather(value: Value) -> list[Value]:
    """`value` of every process, in the order of their ranks, on every process."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Value] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
