"""Which arguments an entry has, of which types: derived from its family's options and its method's fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, create_model

from rcb_lmms.budget import Budget
from rcb_lmms.engine.engines import ENGINES
from rcb_lmms.engine.options import PREFIX_CACHE
from rcb_lmms.errors import UserError, checked
from rcb_lmms.families import family_class
from rcb_lmms.families.devices import ATTENTION, DEVICE_MAPS, QUANTIZATION
from rcb_lmms.families.tiles import PACKINGS
from rcb_lmms.families.video import BACKENDS
from rcb_lmms.families.weights import DTYPES
from rcb_lmms.models import entry_id
from rcb_lmms.pruners import PRESETS, PRUNERS
from rcb_lmms.pruners.views import PER


def _no_flag(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number")
    return value


def one_of(choices: Iterable[str]) -> Any:
    """The type of an argument that takes one of some words."""
    return Literal[tuple(choices)]


Text = Annotated[str, Field(min_length=1), BeforeValidator(lambda value: str(value))]
Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_no_flag)]
Whole = Annotated[int, BeforeValidator(_no_flag)]
Count = Annotated[Whole, Field(ge=1, le=1 << 31)]
FIELD_TYPES = {"int": Whole, "float": Number, "bool": bool, "str": Text}

LOADING = {
    "pretrained": Text,
    "dtype": one_of(DTYPES),
    "device": Text,
    "attn_implementation": one_of(ATTENTION),
    "device_map": one_of(DEVICE_MAPS),
    "quantization": one_of(QUANTIZATION),
    "video_backend": one_of(BACKENDS),
    "max_frames_num": Count,
}
# lmms-eval's own names for vLLM.
ENGINE_OPTIONS = {
    "tensor_parallel_size": Count,
    "data_parallel_size": Count,
    "gpu_memory_utilization": Annotated[Number, Field(gt=0, le=1)],
}
FAMILY_OPTIONS = {"split": bool, "pack": one_of(PACKINGS), "grid": Text}
BUDGETS = {
    "keep": Annotated[Number, Field(gt=0, le=1 << 31)],
    # A view has at most 729 tokens: under this not one of them would stay.
    "ratio": Annotated[Number, Field(ge=1e-3, le=1)],
    "threshold": Annotated[Number, Field(ge=-1, le=1)],
    "match": Text,
}


def argument_types(family: str, method: str) -> dict[str, Any]:
    """Every argument of an entry, by name, with the type that pydantic checks."""
    own = family_class(family)
    budgets = {name: BUDGETS[name] for name in budget_names(method)}
    types = {
        **LOADING,
        "preprocess": one_of(own.preprocessing),
        "template": one_of(("checkpoint", own.paper_template)),
        **{name: FAMILY_OPTIONS.get(name, Any) for name in own.options},
        **budgets,
        **method_options(method),
        "preset": one_of(PRESETS),
        "batch_size": Count,
        "prefix_cache": one_of(PREFIX_CACHE),
        "seed": Annotated[Whole, Field(ge=0, lt=1 << 63)],
        "engine": one_of(ENGINES),
        **ENGINE_OPTIONS,
    }
    if budgets:
        types["per"] = one_of(PER)
    if budgets and PRUNERS[method].stage == "view":
        types["positions"] = one_of(("contiguous", "original"))
    if "threshold" in budgets:
        types |= {"thresholds": Text, "ties": Annotated[Whole, Field(ge=0, le=Budget.ALL_TIES)]}
    return types


def validated(family: str, method: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that were given, of their types; `None` and lmms-eval's `max_batch_size` say nothing.

    Raises:
        UserError: an unknown argument, or a value of another type or out of range.
    """
    entry, types = entry_id(family, method), argument_types(family, method)
    given = {name: value for name, value in arguments.items() if value is not None and name != "max_batch_size"}
    if unknown := sorted(set(given) - set(types)):
        near = [f"{name}: {', '.join(found)}" for name in unknown if (found := get_close_matches(name, types))]
        raise UserError(
            wanted=f"{entry} with {', '.join(unknown)}",
            found="model_args this entry does not have",
            allowed=", ".join(types),
            next_step=f"remove or correct: {', '.join(unknown)}" + (f" (near {'; '.join(near)})" if near else ""),
        )
    model = create_model("Arguments", **{name: (own | None, None) for name, own in types.items()})
    values = checked(model, given, wanted=f"{entry} with {', '.join(f'{name}={given[name]}' for name in given)}"[:300])
    return {name: getattr(values, name) for name in types if name in given}


def parse_arguments(text: str) -> dict[str, str]:
    """`keep=36,seed=1` as a dictionary. lmms-eval's own parser takes the last of two values without a word.

    Raises:
        UserError: an argument without a value, or with two.
    """
    pairs = [part.partition("=") for part in text.split(",")] if text.strip() else []
    alone = [name for name, equals, _ in pairs if not equals]
    names = [name.strip() for name, _, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if alone or twice:
        raise UserError(
            wanted=f"model_args {text}"[:300],
            found=f"{', '.join(alone) or 'an empty argument'} without a value"
            if alone
            else f"{', '.join(twice)} with more than one value",
            allowed="NAME=VALUE, separated by commas, each name once",
            next_step="give one value for each argument",
        )
    return {name: value for name, _, value in pairs}


def field_names(method: str) -> list[str]:
    """Names of a method's hyper-parameters."""
    return [field.name for field in dataclasses.fields(PRUNERS[method])]


def method_options(method: str) -> dict[str, Any]:
    """A method's own hyper-parameters; `scale` is what calibration sets, and `preset` and `seed` are common to all."""
    common = ("budget", "scale", "preset", "seed")
    return {
        field.name: FIELD_TYPES.get(getattr(field.type, "__name__", str(field.type)), Any)
        for field in dataclasses.fields(PRUNERS[method])
        if field.name not in common
    }


def budget_names(method: str) -> tuple[str, ...]:
    """model_args that give a method its budget, of which one may be used."""
    kinds = set(PRUNERS[method].budgets)
    named = {"keep": "tokens", "ratio": "ratio", "threshold": "threshold"}
    names = {name for name, kind in named.items() if kind in kinds}
    if kinds & {"threshold", "adaptive"}:
        names.add("match")
    return tuple(name for name in BUDGETS if name in names)
