"""The registry: a method's key here is also its command-line value and its row in a table."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from rcb_lmms.budget import Budget
from rcb_lmms.errors import UserError
from rcb_lmms.pruners.base import Pruner, Selection, VisualTokens, check_needs
from rcb_lmms.pruners.checks import check_choice
from rcb_lmms.pruners.downsample import Downsample
from rcb_lmms.pruners.fastv import FastV
from rcb_lmms.pruners.none import NoPruning
from rcb_lmms.pruners.prumerge import PruMerge, PruMergePlus
from rcb_lmms.pruners.random import RandomPruning
from rcb_lmms.pruners.rcb import RCB
from rcb_lmms.pruners.stride import Stride

__all__ = ["PRESETS", "PRUNERS", "Budget", "Pruner", "Selection", "VisualTokens", "check_needs", "make_pruner"]

PRUNERS: dict[str, type[Pruner]] = {
    pruner.name: pruner for pruner in (NoPruning, RCB, PruMerge, PruMergePlus, FastV, RandomPruning, Stride, Downsample)
}

PRESETS = ("official", "paper", "paper_literal")


def make_pruner(name: str, *, budget: Budget | None = None, preset: str = "official", **options: Any) -> Pruner:
    """A configured method.

    Args:
        name: a key of `PRUNERS`.
        budget: how many tokens may stay.
        preset: `official` follows the released code, `paper` and `paper_literal` the published text; methods for
            which the two agree take every preset alike.
        options: the method's own hyper-parameters, the fields of its class.

    Raises:
        UserError: an unknown method, preset or option (the message lists the allowed ones), or a value that the
            method refuses.
    """
    check_choice("a pruning method", name, tuple(PRUNERS))
    check_choice("a preset", preset, PRESETS)
    method = PRUNERS[name]
    known = {field.name for field in fields(method)}
    allowed = sorted(known - {"budget", "preset"})
    if unknown := sorted(set(options) - set(allowed)):
        raise UserError(
            wanted=f"options for {name}",
            found=", ".join(unknown),
            allowed=", ".join(allowed) or f"none: {name} has no options",
            next_step=f"leave out {', '.join(unknown)}",
        )
    if "preset" in known:
        options["preset"] = preset
    return method(budget=budget, **options)
