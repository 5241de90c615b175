"""The registry: a method's key here is also its command-line value and its row in a table."""

from __future__ import annotations

import logging
from dataclasses import fields
from importlib.metadata import entry_points
from typing import Any

from rcb_lmms.budget import Budget
from rcb_lmms.errors import UserError
from rcb_lmms.pruners.base import Pruner, Selection, VisualTokens, check_facts
from rcb_lmms.pruners.cdpruner import CDPruner
from rcb_lmms.pruners.checks import check_choice
from rcb_lmms.pruners.dart import DART
from rcb_lmms.pruners.divprune import DivPrune
from rcb_lmms.pruners.downsample import Downsample
from rcb_lmms.pruners.evs import EVS
from rcb_lmms.pruners.fastv import FastV
from rcb_lmms.pruners.hiprune import HiPrune
from rcb_lmms.pruners.holov import HoloV
from rcb_lmms.pruners.none import NoPruning
from rcb_lmms.pruners.prumerge import PruMerge, PruMergePlus
from rcb_lmms.pruners.pyramiddrop import PyramidDrop
from rcb_lmms.pruners.random import RandomPruning
from rcb_lmms.pruners.rcb import RCB
from rcb_lmms.pruners.scope import Scope
from rcb_lmms.pruners.sparsevlm import SparseVLM
from rcb_lmms.pruners.stride import Stride
from rcb_lmms.pruners.v2drop import V2Drop
from rcb_lmms.pruners.vidcom2 import VidCom2
from rcb_lmms.pruners.views import choose_views
from rcb_lmms.pruners.visionzip import VisionZip
from rcb_lmms.pruners.vispruner import FasterVLM, VisPruner

logger = logging.getLogger(__name__)

__all__ = [
    "PRESETS",
    "PRUNERS",
    "Budget",
    "Pruner",
    "Selection",
    "VisualTokens",
    "choose_views",
    "make_pruner",
    "register",
]

PRUNERS: dict[str, type[Pruner]] = {}
# Outside packages name their methods in this entry-point group.
GROUP = "rcb_lmms.pruners"


def register(pruner: type[Pruner]) -> type[Pruner]:
    """Add a method to `PRUNERS`.

    Raises:
        UserError: facts that contradict each other, or a name that another method has.
    """
    check_facts(pruner)
    if PRUNERS.get(pruner.name, pruner) is not pruner:
        raise UserError(
            wanted=f"a new name for {pruner.__module__}.{pruner.__qualname__}",
            found=f"{pruner.name}, which is {PRUNERS[pruner.name].__module__}.{PRUNERS[pruner.name].__qualname__}",
            allowed="names other than " + ", ".join(PRUNERS),
            next_step="give the class another name",
        )
    PRUNERS[pruner.name] = pruner
    return pruner


def _register_outside() -> None:
    """Register the methods of installed packages; one that fails is named, and costs the others nothing."""
    for point in entry_points(group=GROUP):
        try:
            register(point.load())
        except Exception as error:  # whatever another package raises when it is imported
            package = point.dist.name if point.dist else point.value
            logger.error("the pruner %s of the package %s is left out: %s", point.name, package, error)


for _method in (
    NoPruning, RCB, PruMerge, PruMergePlus, FastV, RandomPruning, Stride, Downsample,
    VisionZip, DivPrune, VisPruner, FasterVLM, Scope, HoloV, HiPrune, CDPruner, VidCom2, EVS,
    PyramidDrop, SparseVLM, DART, V2Drop,
):  # fmt: skip
    register(_method)
_register_outside()

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
