"""One step of a schedule inside the decoder: what stayed of each prompt, and where the later layers see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rcb_lmms.pruners.tokens import LayerChoice

Keep = int | Sequence[int]


@dataclass
class Step:
    """One step of a schedule, and what it did in the latest prefill; the lists hold one CPU tensor per row.

    Attributes:
        layer: layers that have run when it prunes.
        keep: candidates that stay, for all rows or one number per row.
        kept: `(keep,)` int64 positions, in the padded sequence, of the candidates that stayed, ascending.
        scores: `(candidates,)` float32 attention of the last token to each candidate that was left, by rising position.
    """

    layer: int
    keep: Keep
    kept: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    # What the next step chooses among: positions of what stayed, those of merged tokens behind them, which take the
    # places of tokens that went. `origins` says which candidate each was, -1 for a merged one.
    slots: list[Tensor] = field(default_factory=list)
    origins: list[Tensor] = field(default_factory=list)
    contents: list[Tensor | None] = field(default_factory=list)  # hidden states of the slots, where tokens moved
    # Positions in the padded prompt that the layers from here on see as queries, and whether they see them as keys.
    queries: Tensor | None = None  # (b, r)
    valid: Tensor | None = None  # (b, r)
    stays: Tensor | None = None  # (b, n)
    lost: Tensor | None = None  # (b,) tokens that this step and those before it dropped
    changed: dict[str, Any] = field(default_factory=dict)  # arguments of these layers

    def forget(self) -> None:
        """Empty the lists of the prefill before."""
        self.kept, self.slots, self.origins, self.scores, self.contents = [], [], [], [], []

    def take(
        self, where: Tensor, known: Tensor, choice: LayerChoice, hidden: Tensor, queries: Tensor, valid: Tensor
    ) -> None:
        """Note what a method chose of the next row; tokens move together where merged ones stand behind them.

        Args:
            where: `(c,)` the row's candidates.
            known: `(c,)` which candidate of the first step each of them was.
            choice: what stays.
            hidden: `(r, d)` the row's states before the step.
            queries: `(r,)` positions in the padded prompt that they stand for.
            valid: `(r,)` False for padding.
        """
        kept = choice.kept.cpu()
        origins, slots, content = known[kept], where[kept], None
        if choice.merged is not None:
            first = int((~valid).sum())
            columns = torch.searchsorted(queries[first:], slots) + first
            states = hidden[columns.to(hidden.device)]
            content = torch.cat([states, choice.merged.to(states)])
            slots = _room(where, kept, len(choice.merged))
            origins = torch.cat([origins, origins.new_full((len(choice.merged),), -1)])
        self.slots.append(slots)
        self.origins.append(origins)
        self.kept.append(origins[origins >= 0])
        self.scores.append(choice.scores.float().cpu())
        self.contents.append(content)

    def plan(self, stays: Tensor, candidates: list[Tensor], padding: Tensor, mode: str) -> None:
        """Which positions the later layers see: padding and pruned candidates go, rows are left-padded again.

        Args:
            stays: `(b, n)` what the step before left, which becomes what this one leaves.
            candidates: of every row.
            padding: `(b, n)` False for padding.
            mode: `drop` or `mask`.
        """
        for row, where, slots in zip(stays, candidates, self.slots, strict=True):
            row[where] = False
            row[slots] = True
        self.stays, self.lost = stays, padding.sum(1) - stays.sum(1)
        if mode == "mask":
            self.queries, self.valid = torch.arange(stays.shape[1]).expand(len(stays), -1), stays
            return
        longest = int(stays.sum(dim=1).max())
        self.queries = torch.zeros(len(stays), longest, dtype=torch.long)
        self.valid = torch.zeros(len(stays), longest, dtype=torch.bool)
        for row, queries, valid in zip(stays, self.queries, self.valid, strict=True):
            positions = row.nonzero().squeeze(1)
            queries[longest - len(positions) :] = positions
            valid[longest - len(positions) :] = True

    def moved(self, hidden: Tensor) -> Tensor:
        """The states `(b, r, d)` of what the step leaves, with those in the slots that moved there."""
        for row, content in enumerate(self.contents):
            if content is not None:
                first = int((~self.valid[row]).sum())
                columns = torch.searchsorted(self.queries[row, first:], self.slots[row]) + first
                hidden[row, columns.to(hidden.device)] = content
        return hidden


def _room(where: Tensor, kept: Tensor, merged: int) -> Tensor:
    """Positions `(k + merged,)` for kept tokens and merged ones behind them, both in their order.

    The merged ones take the last candidates' positions; a kept token gives way to its left as far as it has to.
    """
    places = list(range(len(where) - merged, len(where)))
    for own in reversed(kept.tolist()):
        places.insert(0, min(own, (places[0] if places else len(where)) - 1))
    return where[torch.tensor(places)]
