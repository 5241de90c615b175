"""What lmms-eval was asked and does not tell its models: this is the one place that looks past the host's interface.

lmms-eval makes a model from `--model_args` alone. Two of its other arguments matter to an entry: `--seed`, which a
user expects to seed random pruning too, and `--use_cache`, whose key lacks what the answers of these entries depend on.
Nor can whoever starts lmms-eval hand anything to the models it makes, or get them back: a `Context` does both.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcb_lmms.errors import UserError, host_command_runs

if TYPE_CHECKING:
    from rcb_lmms.models.record import RunRecord

# Position of torch's seed among the four that `--seed` takes: python, numpy, torch, few-shot.
TORCH_SEED = 2


@dataclass
class Context:
    """What whoever starts lmms-eval shares with the entries that lmms-eval makes.

    Attributes:
        answers: a folder for answers as they come (see `Journal`); without it none is kept before the run's end.
        records: of the runs that were made, in their order.
    """

    answers: Path | None = None
    records: list[RunRecord] = field(default_factory=list)

    def only_record(self) -> RunRecord:
        """The record, where one run was made."""
        (record,) = self.records
        return record


_context: ContextVar[Context | None] = ContextVar("rcb_lmms_context", default=None)


@contextlib.contextmanager
def evaluating(context: Context) -> Iterator[Context]:
    """Inside, entries that lmms-eval makes find `context`."""
    token = _context.set(context)
    try:
        yield context
    finally:
        _context.reset(token)


def current_context() -> Context:
    """The context of the run that goes on; an empty one where somebody else started lmms-eval."""
    return _context.get() or Context()


def argument(name: str) -> str | None:
    """The value of an argument on the command line, `--name value` or `--name=value`; the last one counts."""
    found = None
    for position, word in enumerate(sys.argv):
        if word == name and position + 1 < len(sys.argv):
            found = sys.argv[position + 1]
        elif word.startswith(f"{name}="):
            found = word.partition("=")[2]
    return found


def configured_runs() -> list[dict[str, Any]]:
    """The runs of the file that `--config` names; none if it names none, or one that lmms-eval will refuse."""
    path = argument("--config")
    return _runs_of(path) if path and Path(path).is_file() else []


@cache
def _runs_of(path: str) -> list[dict[str, Any]]:
    import yaml

    try:
        runs = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return []
    return [run for run in (runs if isinstance(runs, list) else [runs]) if isinstance(run, dict)]


def asked_runs() -> list[tuple[str, dict[str, Any]]]:
    """Model ids and model_args that the command line or its configuration file asks for, if they are ours.

    Raises:
        UserError: an argument without a value, or with two.
    """
    from rcb_lmms.models import PARTS
    from rcb_lmms.models.argument_types import parse_arguments

    own = {"model": argument("--model"), "model_args": argument("--model_args")}
    own |= {name: value for name in ("batch_size", "device") if (value := argument(f"--{name}")) is not None}
    asked = []
    for run in configured_runs() or [own]:
        run = {**run, **{name: value for name, value in own.items() if value is not None}}
        given = run.get("model_args") or {}
        if run.get("model") in PARTS and isinstance(given, (str, dict)):
            common = {name: run[name] for name in ("batch_size", "device") if name in run}
            arguments = parse_arguments(given) if isinstance(given, str) else given
            asked.append((run["model"], {**common, **arguments}))
    return asked


def asked_seed() -> int | None:
    """Torch's seed as `--seed` gives it, here or in a configuration file; `None` if nobody gave one."""
    given = {str(run["seed"]) for run in configured_runs() if run.get("seed") is not None}
    if (own := argument("--seed")) is not None:
        given = {own}
    if len(given) != 1:  # several runs with seeds of their own: each says it in its model_args
        return None
    parts = given.pop().strip("[]()").split(",")
    value = parts[TORCH_SEED] if len(parts) > TORCH_SEED else parts[0]
    return int(value) if value.strip().lstrip("-").isdigit() else None


def calm_bars() -> None:
    """Have progress bars of a process without a terminal write a line a minute; call it before tqdm is imported."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "60")
        os.environ.setdefault("TQDM_MAXINTERVAL", "60")


def warn_of_host_command() -> None:
    """Say once what lmms-eval's own command cannot do for an entry, if it is the one that runs."""
    if host_command_runs() and int(os.environ.get("RANK", 0)) == 0:
        print(
            "warning: lmms-eval's own command knows these models, but not the tasks rcb_*; it writes no record of "
            "budgets into the results, and leaves with status 0 when samples fail. The same arguments work with "
            "`lmms_eval`, and with `accelerate launch -m rcb_lmms.runs.host`, which do all three.",
            file=sys.stderr,
        )


def refuse_response_cache() -> None:
    """Refuse `--use_cache` before anything is loaded.

    Raises:
        UserError: the flag stands on the command line or in a configuration file.
    """
    if argument("--use_cache") is not None or any(run.get("use_cache") for run in configured_runs()):
        raise cache_refused()


def asked_through_cache(depth: int = 2) -> bool:
    """Whether the function that called this one was called by lmms-eval's response cache."""
    return sys._getframe(depth).f_globals.get("__name__") == "lmms_eval.caching.response_cache"


def cache_refused() -> UserError:
    """The error for lmms-eval's response cache."""
    return UserError(
        wanted="--use_cache with an entry of rcb_lmms",
        found="a cache whose key knows neither the calibrated threshold nor the codebook nor the code, and which "
        "forgets what an answer cost: answers under different thresholds would be mixed without a word",
        allowed="runs without it: with --output_path, the same command continues a run that was interrupted",
        next_step="remove --use_cache",
    )
