"""model_args of the entries: parsed, checked and resolved in one place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rcb_lmms.budget import Budget
from rcb_lmms.calibration import Target, ThresholdFile
from rcb_lmms.calibration.fitting import check_least
from rcb_lmms.engine.engines import check_engine
from rcb_lmms.engine.options import shares_prefix
from rcb_lmms.engine.processes import rank_and_size
from rcb_lmms.errors import UserError
from rcb_lmms.families import Family, default_codebook, default_split, family_class
from rcb_lmms.families.devices import check_attention, check_device, check_placement
from rcb_lmms.families.video import VideoReader
from rcb_lmms.models import entry_id
from rcb_lmms.models.argument_types import ENGINE_OPTIONS, LOADING, budget_names, field_names, method_options, validated
from rcb_lmms.pruners import PRUNERS, make_pruner
from rcb_lmms.pruners.base import Pruner

# The setting of the paper's main table.
PAPER_TOKENS = 64


@dataclass(frozen=True)
class Settings:
    """Resolved arguments of one entry.

    Attributes:
        loading: keyword arguments of `load_family`.
        pruner: the method; not yet fitted if `target` is given.
        target: what to calibrate for, or `None`.
        per: `view` or `image`: what the budget is spent on.
        positions: `contiguous` or `original`: where what stays of an image stands.
        prefix_cache: `auto`, `on` or `off`: whether questions share what they have in common.
        batch_size: questions per batch.
        engine: what answers prompts.
        engine_options: its keyword arguments.
        seed: of sampling and of random pruning.
        thresholds: where the parameter for `target` is read instead of fitted.
    """

    loading: dict[str, Any]
    pruner: Pruner
    target: Target | None
    per: str
    batch_size: int
    seed: int
    thresholds: ThresholdFile | None = None
    positions: str = "contiguous"
    prefix_cache: str = "auto"
    engine: str = "auto"
    engine_options: dict[str, Any] = field(default_factory=dict)


def resolve(family: str, method: str, arguments: Mapping[str, Any]) -> Settings:
    """Turn model_args into `Settings`; everything that needs no model is checked here.

    Raises:
        UserError: a method that the family cannot have, an unknown argument or value, two budgets, a budget the method
            cannot take.
    """
    entry = entry_id(family, method)
    _check_provided(family, entry, method)
    given = validated(family, method, arguments)
    loading = _loading(family, method, given)
    budgets = {name: given[name] for name in budget_names(method) if name in given}
    chosen = {name: given[name] for name in method_options(method) if name in given}
    seed = given.get("seed", 0)
    if "seed" in field_names(method):
        chosen["seed"] = seed
    if "codebook" in field_names(method):
        chosen.setdefault("codebook", default_codebook(family, loading["pretrained"]))
    preset = given.get("preset", "official")
    # A threshold on a cosine means the variant that has one.
    if preset == "official" and not {"threshold", "thresholds"} & set(given):
        chosen = {**PRUNERS[method].official_options.get(family, {}), **chosen}
    chosen = {**(substitutes(family, method) or {}), **chosen}
    pruner = make_pruner(method, budget=_unfitted(method), preset=preset, **chosen)
    if not pruner.needs <= family_class(family).provides:
        options = ", ".join(f"{name}={chosen[name]}" for name in PRUNERS[method].elsewhere if name in chosen)
        raise _without(family, f"{entry} with {options}", pruner.needs)
    budget, target = _budget(pruner, budgets, given.get("ties"))
    if target is not None and target.measured is not None:
        _check_provided(family, f"match={target}", target.measured.name)
    if target is not None and target.count is not None:
        check_least(pruner, target.count)
    pruner = dataclasses.replace(pruner, budget=budget)
    thresholds = _thresholds(given.get("thresholds"), target)
    session = {name: given[name] for name in ("positions", "prefix_cache", "engine") if name in given}
    shares_prefix(pruner, session.get("prefix_cache", "auto"))
    check_engine(session.get("engine", "auto"), pruner, session.get("positions", "contiguous"))
    session["engine_options"] = _engine_options(given)
    if session.get("engine") == "vllm":
        loading["decoder"] = False
    per, batch_size = given.get("per", "view"), given.get("batch_size", 1)
    return Settings(loading, pruner, target, per, batch_size, seed, thresholds, **session)


def _engine_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of vLLM; the processes that data parallel means are those of torchrun, each with an engine."""
    options = {name: given[name] for name in ENGINE_OPTIONS if name in given}
    if options and given.get("engine") != "vllm":
        raise UserError(
            wanted=", ".join(f"{name}={value}" for name, value in options.items()),
            found=f"engine={given.get('engine', 'auto')}, which has no such argument",
            allowed="engine=vllm with them",
            next_step="engine=vllm, or leave them out",
        )
    if given.get("engine") == "vllm" and (other := [name for name in ("device_map", "quantization") if name in given]):
        raise UserError(
            wanted=f"{' and '.join(f'{name}={given[name]}' for name in other)} with engine=vllm",
            found="arguments of transformers: vLLM loads the language model itself, and whole",
            allowed="tensor_parallel_size, where one GPU has too little memory",
            next_step=f"leave out {', '.join(other)}, or engine=transformers",
        )
    copies, processes = options.pop("data_parallel_size", None), rank_and_size()[1]
    if copies not in (None, processes):
        raise UserError(
            wanted=f"data_parallel_size={copies}",
            found=f"{processes} process{'es' if processes > 1 else ''}",
            allowed="as many processes, each of which has an engine of its own",
            next_step=f"torchrun --nproc_per_node {copies} -m rcb_lmms.runs.host ...",
        )
    return options


def _thresholds(path: str | None, target: Target | None) -> ThresholdFile | None:
    if path is not None and target is None:
        raise UserError(
            wanted=f"thresholds={path}",
            found="a budget that is no mean, so that there is nothing to look up",
            allowed="keep, ratio or match of rcb with variant=max_cosine",
            next_step="remove thresholds, or choose another budget",
        )
    return None if path is None else ThresholdFile.load(path)


def supports(family: str, method: str) -> bool:
    """Whether a family's vision tower gives what a method of the registry reads."""
    return substitutes(family, method) is not None


def substitutes(family: str, method: str) -> dict[str, Any] | None:
    """Options with which a family's tower serves a method: none, those of `elsewhere`, or `None` if it cannot."""
    cls, provides = PRUNERS[method], family_class(family).provides
    if cls.needs <= provides:
        return {}
    if cls.elsewhere and cls(budget=_unfitted(method), **cls.elsewhere).needs <= provides:
        return dict(cls.elsewhere)
    return None


def _check_provided(family: str, wanted: str, method: str) -> None:
    """Refuse, before anything is loaded, what reads tensors that the family's tower does not have."""
    if not supports(family, method):
        raise _without(family, wanted, PRUNERS[method].needs)


def _without(family: str, wanted: str, needs: frozenset[str]) -> UserError:
    missing = sorted(needs - family_class(family).provides)
    return UserError(
        wanted=wanted,
        found=f"a vision tower without CLS token, which gives no {', '.join(missing)}",
        allowed=", ".join(entry_id(family, name) for name in PRUNERS if supports(family, name)),
        next_step=f"use {entry_id(family, 'rcb')} with a number of tokens",
    )


def _loading(family: str, method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `load_family`, with what a record should name even where nobody asked for it."""
    own = family_class(family)
    loading = {name: given[name] for name in (*LOADING, "preprocess", "template", *own.options) if name in given}
    loading.setdefault("pretrained", own.checkpoint)
    loading.setdefault("video_backend", VideoReader.backend)
    loading.setdefault("max_frames_num", VideoReader.max_frames)
    loading["family"] = family
    check_placement(*(loading.get(name) for name in ("device", "device_map", "quantization")))
    if "device" in loading:
        check_device(loading["device"])
    if "attn_implementation" in loading:
        check_attention(loading["attn_implementation"])
    if "split" in own.options:
        loading.setdefault("split", default_split(family, loading["pretrained"]))
    if "pack" in own.options:
        loading["pack"] = _packing(method, loading["split"], loading.get("pack", "auto"))
    return loading


def _packing(method: str, split: bool, pack: str) -> str:
    """The family's `pack`: whole views as the Hugging Face model packs them, pruned ones as they come (`auto`)."""
    whole = not PRUNERS[method].budgets or PRUNERS[method].stage == "layers"
    if pack == "spatial_unpad" and not whole:
        raise UserError(
            wanted=f"pack=spatial_unpad with {method}",
            found="a method that prunes before the language model; unpadding and a newline per row need the whole grid",
            allowed="auto, flat, flat_newline; spatial_unpad with the entries full and fastv",
            next_step="pack=auto, which is flat for tiles",
        )
    return "spatial_unpad" if pack == "auto" and whole and split else pack


def describe(settings: Settings, family: Family) -> dict[str, Any]:
    """Resolved arguments as a record, and as the key of what depends on them."""
    codebook = getattr(settings.pruner, "codebook", None)
    names = [name for name in field_names(settings.pruner.name) if name != "codebook"]
    return {
        **{name: str(value) for name, value in settings.loading.items()},
        "pruner": {name: str(getattr(settings.pruner, name)) for name in names},
        "target": str(settings.target) if settings.target else None,
        "per": settings.per,
        "positions": settings.positions,
        "prefix_cache": settings.prefix_cache,
        "codebook_sha256": codebook.sha256 if codebook is not None else None,
        "codebook_model": codebook.meta.get("model") if codebook is not None else None,
        "thresholds_sha256": settings.thresholds.sha256 if settings.thresholds is not None else None,
        "revision": family.revision,
        "fingerprint": family.fingerprint,
        "preprocess": family.preprocess,
        "template": family.template,
        "dtype": str(family.dtype),
        "device": str(family.device),
        "device_map": _places(family) if settings.loading.get("device_map") else None,
        "attn_implementation": family.model.config._attn_implementation,
        "quantization": settings.loading.get("quantization"),
        "batch_size": settings.batch_size,
        "seed": settings.seed,
    }


def _places(family: Family) -> dict[str, str]:
    """Where each part of a model lies that was spread; transformers does not say it where all is in one place."""
    places = getattr(family.model, "hf_device_map", {"": family.device})
    return {name: str(where) for name, where in places.items()}


def _budget(pruner: Pruner, given: dict[str, Any], ties: Any) -> tuple[Budget | None, Target | None]:
    """The budget, and the mean to calibrate for where the method meets a mean over the benchmark instead of a count."""
    if len(given) > 1:
        raise UserError(
            wanted="one budget",
            found=", ".join(
                f"{name}={value if isinstance(value, str) else f'{value:g}'}" for name, value in given.items()
            ),
            allowed="one of: " + ", ".join(budget_names(pruner.name)),
            next_step="remove all but one",
        )
    if ties is not None and "threshold" not in given:
        raise UserError(
            wanted=f"ties={ties}",
            found="no threshold, at which tokens could tie",
            allowed="threshold=...,ties=..., as `rcb calibrate` prints them",
            next_step="remove ties, or give the threshold that it belongs to",
        )
    if not pruner.budgets:
        return None, None
    name, value = next(iter(given.items()), ("keep", PAPER_TOKENS))
    if name == "threshold":
        return Budget.threshold(value, ties or 0), None
    if name == "match":
        target = Target.parse(value)
        if target.count is not None and not pruner.fits_mean:
            return Budget.tokens(target.count), None
        return pruner.budget, target
    budget = Budget.tokens(round(value) if pruner.fits_mean else value) if name == "keep" else Budget.ratio(value)
    if pruner.fits_mean:
        return pruner.budget, Target.number(value) if name == "keep" else Target.share(value)
    return budget, None


def _unfitted(method: str) -> Budget | None:
    """Any budget of a kind that the method takes, until its own is known."""
    every = {"threshold": Budget.threshold(1.0), "adaptive": Budget.adaptive(), "tokens": Budget.tokens(1)}
    return next((every[kind] for kind in PRUNERS[method].budgets if kind in every), None)
