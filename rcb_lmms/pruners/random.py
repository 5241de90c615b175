"""Random pruning, the baseline that any method has to beat."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rcb_lmms.pruners.base import Pruner, VisualTokens
from rcb_lmms.pruners.checks import check_budget, check_choice, check_whole

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RandomPruning(Pruner):
    """A fixed number of tokens per view, drawn without regard to content, in raster order.

    One uniform number per token, and the smallest ones stay: the control that every method has to beat.

    Released code:
        RCB's released baseline does the same, but one global generator runs through the data set, so that a result
        depends on the order and on the skipped samples (`draws=released`).

    Ours:
        `seed` and the view's `key`, which names its content, alone decide.

    Attributes:
        seed: RCB reports the mean over 42, 0 and 1234.
        draws: `content` as described; `released` takes the next numbers of torch's global generator on the CPU, as the
            released code does. Its sets are then the caller's to repeat: `torch.manual_seed`, and the same views in the
            same order. `seed` has no part in it.
    """

    seed: int = 42
    draws: str = "content"

    name: ClassVar[str] = "random"
    label: ClassVar[str] = "Random"
    summary: ClassVar[str] = "by `seed`"

    def __post_init__(self) -> None:
        check_budget(self, "tokens", "ratio")
        check_whole("random's seed", self.seed, 0)
        check_choice("random's draws", self.draws, ("content", "released"))

    def score(self, view: VisualTokens, question: str | None = None) -> Tensor:
        """Score every token by a draw with its sign turned, `(n,)` float32: the smallest draws stay."""
        import torch

        if self.draws == "released":
            return -torch.rand(len(view)).to(view.features.device)
        digest = hashlib.sha256(f"{self.seed}:{view.key}".encode()).digest()
        # A generator of the CPU also for tensors of a GPU: the two give different numbers for one seed.
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return -torch.rand(len(view), generator=generator).to(view.features.device)
