"""model_args of the entries: parsed, checked and resolved in one place."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from rcb_lmms.budget import Budget
from rcb_lmms.errors import UserError
from rcb_lmms.families import Family, default_codebook, family_class
from rcb_lmms.pruners import PRUNERS, make_pruner
from rcb_lmms.pruners.base import Pruner

# The setting of the paper's main table.
PAPER_TOKENS = 64

LOADING = ("pretrained", "dtype", "device", "attn_implementation", "preprocess", "template")
BUDGETS = ("keep", "ratio", "threshold", "match")


@dataclass(frozen=True)
class Target:
    """A mean number of retained tokens per view to calibrate for: a number, or a baseline's own mean."""

    tokens: float | None = None
    ratio: float | None = None
    baseline: Pruner | None = None

    def __str__(self) -> str:
        if self.baseline is not None:
            return f"{self.baseline.name}:{self.baseline.budget}"
        return f"{self.tokens:g}" if self.tokens is not None else f"ratio={self.ratio:g}"


@dataclass(frozen=True)
class Settings:
    """Resolved arguments of one entry.

    Attributes:
        loading: keyword arguments of `load_family`.
        pruner: the method; not yet fitted if `target` is given.
        target: what to calibrate for, or `None`.
        batch_size: questions per batch.
        seed: of sampling and of random pruning.
    """

    loading: dict[str, Any]
    pruner: Pruner
    target: Target | None
    batch_size: int
    seed: int


def resolve(family: str, method: str, arguments: dict[str, Any]) -> Settings:
    """Turn model_args into `Settings`.

    Raises:
        UserError: unknown argument, two budgets, a budget the method cannot take, an unknown choice.
    """
    arguments = {name: value for name, value in arguments.items() if value is not None}
    options = _method_options(method)
    budgets = _budget_names(method)
    allowed = [*LOADING, *budgets, *options, "preset", "batch_size", "seed"]
    unknown = sorted(set(arguments) - set(allowed) - {"max_batch_size"})
    if unknown:
        raise UserError(
            wanted=f"{family}_{'full' if method == 'none' else method} with {', '.join(unknown)}",
            found="model_args this entry does not have",
            allowed=", ".join(allowed),
            next_step="remove or correct: " + ", ".join(unknown),
        )
    loading = {name: arguments[name] for name in LOADING if name in arguments}
    loading.setdefault("pretrained", family_class(family).checkpoint)
    loading["family"] = family
    chosen = {name: arguments[name] for name in options if name in arguments}
    seed = int(arguments.get("seed", 0))
    if "seed" in _field_names(method):
        chosen["seed"] = seed
    if "codebook" in options:
        chosen.setdefault("codebook", default_codebook(family, loading["pretrained"]))
    given = {name: arguments[name] for name in budgets if name in arguments}
    budget, target = _budget(method, given, chosen)
    pruner = make_pruner(method, budget=budget, preset=str(arguments.get("preset", "official")), **chosen)
    return Settings(loading, pruner, target, _batch_size(arguments.get("batch_size", 1)), seed)


def describe(settings: Settings, family: Family) -> dict[str, Any]:
    """Resolved arguments as a record, and as the key of what depends on them."""
    codebook = getattr(settings.pruner, "codebook", None)
    names = [name for name in _field_names(settings.pruner.name) if name != "codebook"]
    return {
        **{name: str(value) for name, value in settings.loading.items()},
        "pruner": {name: str(getattr(settings.pruner, name)) for name in names},
        "target": str(settings.target) if settings.target else None,
        "codebook_sha256": codebook.sha256 if codebook is not None else None,
        "revision": family.revision,
        "fingerprint": family.fingerprint,
        "preprocess": family.preprocess,
        "template": family.template,
        "dtype": str(family.dtype),
        "device": str(family.device),
        "batch_size": settings.batch_size,
        "seed": settings.seed,
    }


def _field_names(method: str) -> list[str]:
    return [field.name for field in dataclasses.fields(PRUNERS[method])]


def _method_options(method: str) -> list[str]:
    # `scale` is what calibration sets; `preset` and `seed` are common to all entries.
    return [name for name in _field_names(method) if name not in ("budget", "scale", "preset", "seed")]


def _budget_names(method: str) -> tuple[str, ...]:
    counts = ("keep", "ratio")
    own = {"none": (), "rcb": BUDGETS, "fastv": counts, "random": counts}
    return own.get(method, (*counts, "match"))


def _budget(method: str, given: dict[str, Any], options: dict[str, Any]) -> tuple[Budget | None, Target | None]:
    if len(given) > 1:
        raise UserError(
            wanted="one budget",
            found=", ".join(f"{name}={value}" for name, value in given.items()),
            allowed="one of: " + ", ".join(_budget_names(method)),
            next_step="remove all but one",
        )
    if method == "none":
        return None, None
    name, value = next(iter(given.items()), ("keep", PAPER_TOKENS))
    value = value if name == "match" else _number(name, value)
    if name == "threshold":
        return Budget.threshold(value), None
    if name == "match":
        return _unfitted(method), matched(str(value))
    if method == "prumerge" or (method == "rcb" and options.get("variant", "max_cosine") == "max_cosine"):
        # These decide image by image: the budget is a mean over the benchmark.
        Budget.tokens(round(value)) if name == "keep" else Budget.ratio(value)
        return _unfitted(method), Target(tokens=value) if name == "keep" else Target(ratio=value)
    return (Budget.tokens(value) if name == "keep" else Budget.ratio(value)), None


def _unfitted(method: str) -> Budget:
    return Budget.threshold(1.0) if method == "rcb" else Budget.adaptive()


def matched(name: str) -> Target:
    """The target of `match=NAME` or `match=NAME:TOKENS`: the baseline's retained tokens.

    A baseline with a count is that number; FastV's counts the tokens behind its layer, the convention of the paper's
    tables. Only what a baseline decides image by image is measured.

    Raises:
        UserError: not a baseline.
    """
    method, _, tokens = name.partition(":")
    if method in ("prumerge", "prumerge_plus") and not tokens:
        return Target(baseline=make_pruner(method, budget=Budget.adaptive()))
    if method in ("prumerge", "prumerge_plus", "fastv", "random"):
        return Target(tokens=_number("match", tokens or PAPER_TOKENS))
    raise UserError(
        wanted=f"match={name}",
        found="no such baseline",
        allowed="prumerge, prumerge_plus, fastv, random, each with :TOKENS",
        next_step="match=prumerge, or match=fastv:144",
    )


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(
            wanted=f"{name}={value}", found="not a number", allowed="a number", next_step=f"{name}=64"
        ) from None


def _batch_size(value: Any) -> int:
    if not str(value).isdigit() or int(value) < 1:
        raise UserError(
            wanted=f"batch_size={value}",
            found="not a positive whole number",
            allowed="whole numbers from 1; it is halved by itself when memory runs out",
            next_step="batch_size=1",
        )
    return int(value)
