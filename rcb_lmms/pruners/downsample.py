"""Downsampling: the budget spent on a smaller image instead of a part of the whole one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from rcb_lmms.pruners.base import Pruner, Selection, VisualTokens
from rcb_lmms.pruners.checks import check_budget
from rcb_lmms.pruners.none import keep_all


@dataclass(frozen=True)
class Downsample(Pruner):
    """Views are shown to the vision tower at a size of as many patches as the budget allows; all their tokens stay.

    It must act before the tower, whose cost falls too; `Family.encode` does the work. It is a control: VTC-Bench
    compares methods on the samples that it answers wrong.

    Ours:
        A budget of `k` tokens is a grid of `floor(sqrt(k))` rows and `floor(k / rows)` columns: exact for squares,
        never above `k`, and below it by less than `rows`. What a run reports are the tokens of the grid. Rows are the
        shorter side, since photographs are wide and the families' square views have squeezed them.
    """

    name: ClassVar[str] = "downsample"
    label: ClassVar[str] = "Downsample"
    summary: ClassVar[str] = "a smaller image, whose tokens all stay"
    stage: ClassVar[str] = "pixels"

    def __post_init__(self) -> None:
        check_budget(self, "tokens", "ratio")

    def select(self, view: VisualTokens, question: str | None = None) -> Selection:
        """Every token, since the view was made small before; every score is 0."""
        return keep_all(view)

    def grid(self, native: tuple[int, int], views: int = 1) -> tuple[int, int]:
        """Rows and columns of the tokens that a view is to be encoded as.

        Args:
            native: those of the view at its full size.
            views: how many views have the budget together. All are made equal, so that a remainder is not spent.

        Raises:
            UserError: a budget above the view, or below one token for each of the views.
        """
        count = self.budget.split(views)[-1].count(math.prod(native))
        rows = min(math.isqrt(count), native[0])
        return rows, min(count // rows, native[1])
