"""Packings that families with tiles share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rcb_lmms.errors import UserError
from rcb_lmms.families.packed import Rows

if TYPE_CHECKING:
    from torch import Tensor

PACKINGS = ("auto", "flat", "flat_newline", "spatial_unpad")


def by_policy(
    policy: str,
    views: Sequence[Tensor],
    newline: Tensor,
    unpad: Callable[[Tensor, Tensor], Tensor],
    *,
    whole: bool,
) -> Rows:
    """An image's kept tokens packed by one of `PACKINGS`; a single view ends with a newline unless it is `flat`.

    Args:
        policy: see the families.
        views: kept tokens of each view, `(k, d)`; more than one means base view and tiles.
        newline: `(d,)`, the model's newline embedding.
        unpad: the model's own packing, see `native`.
        whole: nothing was pruned.

    Raises:
        UserError: `spatial_unpad` of pruned tiles.
    """
    if len(views) == 1:
        return flat(views, None if policy == "flat" else newline)
    if policy != "spatial_unpad":
        return flat(views, newline if policy == "flat_newline" else None)
    if not whole:
        raise UserError(
            wanted="pack=spatial_unpad for pruned tiles",
            found="tiles of which some tokens are gone; rows are unpadded and ended by newlines on the whole grid only",
            allowed="pack=flat or pack=flat_newline; spatial_unpad without pruning before the language model",
            next_step="pack=flat",
        )
    return native(unpad, views, newline)


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
