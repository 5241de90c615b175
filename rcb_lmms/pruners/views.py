"""Choosing the tokens of one image or video: view by view, or of all its views together."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import fields, replace

from rcb_lmms.pruners.base import Pruner, Selection, VisualTokens, check_needs

logger = logging.getLogger(__name__)

# What a budget is spent on: every view (image, tile, frame), or all views of one image or video.
PER = ("view", "image")


def choose_views(
    pruner: Pruner, views: Sequence[VisualTokens], per: str = "view", question: str | None = None
) -> list[Selection]:
    """One `Selection` per view of an image.

    Under `per="image"` the views compete for the budget as one; a method that sees a video as a whole is always given
    all its views, and spends their budgets together. Where a method cannot compare views (PruMerge), its
    counts are spread evenly over them, the first ones get what is left over.
    """
    for view in views:
        check_needs(view, pruner)
    pruner = pruner.among(views)
    if pruner.joins_views and len(views) > 1:
        whole = pruner if per == "image" else replace(pruner, budget=pruner.budget.times(len(views)))
        selections = _apart(whole.choose(joined(views), question), views)
    elif per == "view" or len(views) == 1:
        selections = [pruner.choose(view, question) for view in views]
    elif pruner.pools_views:
        selections = _apart(pruner.choose(joined(views), question), views)
    else:
        budgets = [pruner.budget] * len(views) if pruner.budget is None else pruner.budget.split(len(views))
        selections = [
            replace(pruner, budget=own).choose(view, question) for own, view in zip(budgets, views, strict=True)
        ]
    if forced := sum(selection.forced for selection in selections):
        logger.warning(
            "%s under %s keeps too little of an image: min_keep adds %d tokens (min_keep=0 is the released behaviour)",
            pruner.name,
            pruner.budget,
            forced,
        )
    return selections


def joined(views: Sequence[VisualTokens]) -> VisualTokens:
    """All views of an image as one row of tokens."""
    import torch

    tensors = {
        field.name: torch.cat([getattr(view, field.name) for view in views])
        for field in fields(VisualTokens)
        if all(isinstance(getattr(view, field.name), torch.Tensor) for view in views)
    }
    count = len(tensors["features"])
    frames = len(views) if len({len(view) for view in views}) == 1 else 1
    return VisualTokens(grid=(1, count), key=" ".join(view.key for view in views), frames=frames, **tensors)


def _apart(selection: Selection, views: Sequence[VisualTokens]) -> list[Selection]:
    """A selection among joined views, as one per view; the first carries what was forced and FLOPs, the last blanks."""
    ends = list(itertools.accumulate(map(len, views)))
    parts: list[Selection] = []
    for begin, end in zip([0, *ends], ends, strict=False):
        inside = (selection.kept >= begin) & (selection.kept < end)
        forced = 0 if parts else selection.forced
        blanks = selection.blanks if end == ends[-1] else 0
        flops = 0 if parts else selection.flops
        own = Selection(
            selection.kept[inside] - begin, selection.scores[begin:end], forced=forced, blanks=blanks, flops=flops
        )
        parts.append(own)
    return parts
