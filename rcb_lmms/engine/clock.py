"""Seconds by stage: where the time of answering goes."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

STAGES = ("open", "tower", "choose", "pack", "prefill", "decode")


class Clock:
    """Adds up the seconds of stages; a GPU is waited for at the end of each, where its results are read anyway.

    Args:
        device: torch device of the model.

    Attributes:
        seconds: by stage: `open` waits for images, which threads read, and makes pixels of them; `tower` encodes and
            projects them; `choose` is the method's; `pack` makes prompts; `prefill` ends with the logits of a batch's
            first tokens, `decode` with its answers. `first_token` adds up, question by question, its share of all
            before the prefill and the whole prefill of its batch; over the number of questions it is the time to first
            token.
    """

    def __init__(self, device: Any):
        self.device = device
        self.seconds: Counter[str] = Counter(dict.fromkeys((*STAGES, "first_token"), 0.0))

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds inside a `with` block to a stage."""
        began = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                import torch

                torch.cuda.synchronize(self.device)
            self.seconds[stage] += time.perf_counter() - began

    def move(self, seconds: float, source: str, target: str) -> None:
        """Count seconds of one stage in another, where the two alternate."""
        self.seconds[source] -= seconds
        self.seconds[target] += seconds

    def before_prefill(self) -> float:
        """Seconds of all stages before the prefill so far."""
        return sum(self.seconds[stage] for stage in STAGES[: STAGES.index("prefill")])
