"""Refusals that several methods share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rcb_lmms.errors import UserError

if TYPE_CHECKING:
    from rcb_lmms.pruners.base import Pruner

EXAMPLES = {
    "tokens": "keep=64",
    "ratio": "ratio=0.25",
    "threshold": "threshold=0.45",
    "adaptive": "Budget.adaptive()",
    None: "no budget",
}


def check_choice(what: str, found: object, allowed: Sequence[str]) -> None:
    """Refuse a value that is not one of the named ones.

    Raises:
        UserError: listing the named ones.
    """
    if found not in allowed:
        raise UserError(
            wanted=what, found=str(found), allowed=", ".join(allowed), next_step=f"for example {allowed[0]}"
        )


def check_budget(pruner: Pruner, *kinds: str | None) -> None:
    """Refuse a budget of a kind that the method cannot spend; `None` among `kinds` permits its absence.

    Raises:
        UserError: naming the kinds that it can.
    """
    found = pruner.budget.kind if pruner.budget is not None else None
    if found not in kinds:
        examples = [EXAMPLES[kind] for kind in kinds]
        raise UserError(
            wanted=f"a budget for {pruner.name}",
            found=str(pruner.budget) if pruner.budget is not None else "no budget",
            allowed=", ".join(examples),
            next_step=examples[0] if kinds[0] is not None else "leave the budget out",
        )


def check_minimum(what: str, found: object, least: float) -> None:
    """Refuse a hyper-parameter that is no number, or below its least sensible value.

    Raises:
        UserError: naming that value.
    """
    number = isinstance(found, (int, float)) and not isinstance(found, bool)
    if not number or not least <= found < math.inf:
        raise UserError(
            wanted=what, found=str(found), allowed=f"a number, {least} or more", next_step=f"for example {least}"
        )


def check_whole(what: str, found: object, least: int) -> None:
    """Refuse a hyper-parameter that is no whole number, or below its least sensible value.

    Raises:
        UserError: naming that value.
    """
    if not isinstance(found, int) or isinstance(found, bool) or found < least:
        raise UserError(
            wanted=what, found=str(found), allowed=f"a whole number, {least} or more", next_step=f"for example {least}"
        )
