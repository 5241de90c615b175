"""What `rcb calibrate` does and prints: tables whose numbers are named, and a command that meets the mean again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcb_lmms.calibration.calibrate import Tasks, calibrate_images, calibrate_tasks, check_tower
from rcb_lmms.calibration.fitting import QUANTILES, Calibration
from rcb_lmms.calibration.targets import CONVENTIONS, Target, parse_targets
from rcb_lmms.engine.processes import rank_and_size
from rcb_lmms.errors import UserError
from rcb_lmms.families import family_of
from rcb_lmms.files import write_atomic

if TYPE_CHECKING:
    from rcb_lmms.calibration.threshold_file import ThresholdFile

SHOWN = (5, 50, 95)  # percentiles of retained tokens, in the table of many budgets


def over_images(
    pretrained: str, paths: Sequence[Path], keep: float | None, match: str | None, out: Path | None, **options: Any
) -> Iterator[str]:
    """Calibrate on image files for one budget; yields what is to be printed.

    Raises:
        UserError: several budgets, or what `calibrate_images` refuses.
    """
    targets = targets_of(keep, match, "64")
    if len(targets) > 1:
        raise UserError(
            wanted="one budget for a folder of images",
            found=", ".join(map(str, targets)),
            allowed="--keep N, or --match with one baseline",
            next_step="repeat the command for each",
        )
    record = calibrate_images(pretrained, paths, targets[0], **options)
    yield for_one(record)
    if out is not None:
        yield f"wrote {write_atomic(out, json.dumps(asdict(record), indent=1))}"
    fitted = {name: repr(value) for name, value in record.fitted.items()}
    yield "next: " + command(pretrained, options, fitted, "pope")


def over_tasks(
    pretrained: str,
    benchmarks: Callable[[], Mapping[str, Tasks]],
    keep: float | None,
    match: str | None,
    out: Path | None,
    **options: Any,
) -> Iterator[str]:
    """Calibrate on benchmarks, which are loaded when everything else has been checked; yields what is to be printed.

    Raises:
        UserError: what `calibrate_tasks` refuses.
    """
    targets = targets_of(keep, match, "prumerge")
    check_tower(family_of(pretrained), targets)
    path, file = calibrate_tasks(pretrained, benchmarks(), targets, out=out, **options)
    if rank_and_size()[0] == 0:
        yield for_many(file)
        yield f"wrote {path}"
        task = next(iter(next(iter(file.benchmarks.values())).tasks))
        yield "next: " + command(pretrained, options, {**targets[0].argument, "thresholds": str(path)}, task)


def targets_of(keep: float | None, match: str | None, default: str) -> list[Target]:
    """What `--keep` and `--match` ask for, or the default."""
    asked = [f"{keep:g}"] if keep is not None else []
    return parse_targets(",".join([*asked, *([match] if match else [])]) or default)


def command(pretrained: str, options: Mapping[str, Any], budget: Mapping[str, str], task: str) -> str:
    """The run that meets a mean which was calibrated with these options."""
    given = {name: options.get(name) for name in ("codebook", "preprocess", "split", "pack", "dtype", "per")}
    usual = {None, "auto", "view"}
    own = {name: str(value).lower() if isinstance(value, bool) else value for name, value in given.items()}
    own = {name: value for name, value in own.items() if value not in usual}
    arguments = ",".join(f"{name}={value}" for name, value in {"pretrained": pretrained, **own, **budget}.items())
    return f"lmms_eval --model {family_of(pretrained)}_rcb --model_args {arguments} --tasks {task}"


def for_one(record: Calibration) -> str:
    """One calibration as a table; tokens per view (or image)."""
    from tabulate import tabulate

    unit = f"tokens per {record.per}"
    rows = [
        ("target", f"{record.target:.2f} {unit}"),
        ("achieved", f"{record.achieved:.2f}, standard deviation {record.std:.2f}"),
        ("native", f"{record.native:.2f} {unit} before pruning, of {record.views} views"),
        *[(f"{part}th percentile", f"{own:g}") for part, own in zip(QUANTILES, record.quantiles, strict=True)],
        *[(name, repr(value)) for name, value in record.fitted.items()],
        ("unreadable", record.unreadable),
    ]
    return tabulate(rows, tablefmt="plain", disable_numparse=True)


def for_many(file: ThresholdFile) -> str:
    """All thresholds as a table; tokens per view (or image)."""
    from tabulate import tabulate

    rows = []
    every = [(name, own.baselines) for name, own in file.benchmarks.items()]
    for name, baselines in [*every, *([("all", file.everywhere)] if len(every) > 1 else [])]:
        for text, both in baselines.items():
            conventions = CONVENTIONS if both.tokens.target != both.layer_average.target else CONVENTIONS[:1]
            for convention in conventions:
                row = getattr(both, convention)
                spread = [row.std, *(row.quantiles[part] for part in SHOWN)]
                gap = (row.held_out or {}).get("gap")
                rows.append([name, text, convention, row.target, row.achieved, *spread, row.threshold, row.ties, gap])
    heads = ["benchmark", "budget", "counted", "target", "achieved", "std", *(f"p{part}" for part in SHOWN)]
    heads += ["threshold", "ties", "gap"]
    formats = (*[""] * 3, *[".2f"] * 3, *["g"] * len(SHOWN), ".6f", "", "+.2f")
    return tabulate(rows, heads, floatfmt=formats)
