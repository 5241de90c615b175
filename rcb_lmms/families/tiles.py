"""Packings that families with tiles share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rcb_lmms.families.base import Rows

if TYPE_CHECKING:
    from torch import Tensor


def flat(views: Sequence[Tensor], newline: Tensor | None = None) -> Rows:
    """Views `(k, d)` one behind the other, and one `newline (d,)` at the end if given."""
    import torch

    if newline is None:
        return Rows(torch.cat(list(views)))
    rows = torch.cat([*views, newline[None].to(views[0])])
    return Rows(rows, (len(rows) - 1,))


def native(pack: Callable[[Tensor, Tensor], Tensor], views: Sequence[Tensor], newline: Tensor) -> Rows:
    """What the Hugging Face model itself makes of whole views `(n, d)`: unpadded, with a newline behind every row.

    Args:
        pack: `(views (v, n, d), newline (d,)) -> (k, d)`, the model's own packing.
        views: all tokens of every view.
        newline: the model's newline embedding.
    """
    import torch

    stacked = torch.stack(list(views))
    # The same packing of ones shows where zeros for newlines went, also behind interpolation.
    marks = pack(torch.ones_like(stacked[..., :1]), torch.zeros_like(newline[:1]))
    return Rows(pack(stacked, newline.to(stacked)), tuple((marks[:, 0] == 0).nonzero().flatten().tolist()))
