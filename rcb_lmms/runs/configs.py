"""Configuration files of lmms-eval as runs of this package: read, checked, and fitted to another checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from rcb_lmms.errors import UserError, checked
from rcb_lmms.files import no_file, read_yaml
from rcb_lmms.lab.checkpoint import is_lab
from rcb_lmms.models import PARTS
from rcb_lmms.models.argument_types import Count, parse_arguments, validated
from rcb_lmms.resources import data_dir

# Visual tokens of one view, or of one video frame, in the models of the paper: what its budgets are shares of.
NATIVE = {"llava": 576, "llava_next": 576, "llava_onevision": 729}
NATIVE_FRAME = 196


@dataclass(frozen=True)
class Entry:
    """One entry of a configuration file for one task; `name` is its folder's."""

    name: str
    model: str
    arguments: tuple[tuple[str, str], ...]
    task: str
    batch_size: int = 1
    include_path: str | None = None


def run_folder(results: Path, entry: Entry, limit: int | None = None) -> Path:
    """Where an entry's run lies: `RESULTS/NAME/TASK`; partial runs apart from whole ones."""
    return Path(results) / (f"limit-{limit}" if limit else "") / entry.name / entry.task


def for_checkpoint(entry: Entry, pretrained: str | None) -> dict[str, str]:
    """An entry's model_args for another checkpoint.

    The laboratory's models have fewer tokens and one template: budgets become the same share of a view, and the
    original code's templates are left out.
    """
    arguments = dict(entry.arguments)
    if pretrained is None:
        return arguments
    if is_lab(pretrained):
        arguments.pop("template", None)
        if "keep" in arguments:
            family = PARTS[entry.model][0]
            native = NATIVE_FRAME if family == "llava_onevision" and "mvbench" in entry.task else NATIVE[family]
            arguments["ratio"] = f"{float(arguments.pop('keep')) / native:.6g}"
    return {"pretrained": pretrained} | arguments


def read_configs(configs: Sequence[str | Path]) -> list[Entry]:
    """The runs of configuration files, each once; a file may be named by its stem in `eval_configs/`.

    Raises:
        UserError: no such file, not a configuration of entries of this package, or two entries for one folder.
    """
    known: dict[tuple[str, str], Entry] = {}
    for config in configs:
        for entry in _read_config(_find(config)):
            place = entry.name, entry.task
            if known.setdefault(place, entry) != entry:
                raise UserError(
                    wanted=f"one run in {'/'.join(place)}",
                    found=f"two: {known[place].model} {dict(known[place].arguments)}, {entry.model} "
                    f"{dict(entry.arguments)}",
                    allowed="a last part of output_path for each model and model_args",
                    next_step=f"change one of the two in {config}",
                )
    return list(known.values())


def _find(config: str | Path) -> Path:
    shipped = data_dir("eval_configs")
    own, known = Path(config), shipped / f"{config}.yaml"
    if (found := no_file(own)) is None:
        return own
    if no_file(known) is None:
        return known
    stems = sorted(path.stem for path in shipped.glob("*.yaml"))
    near = get_close_matches(str(config), stems, n=1)
    raise UserError(
        wanted=f"the configuration {config}"[:300],
        found=found,
        allowed="a YAML file of lmms-eval runs, or " + ", ".join(stems),
        next_step=f"rcb eval {near[0]}" if near else "name one of these",
    )


class _Run(BaseModel):
    """One run of a configuration file, in lmms-eval's words."""

    model_config = ConfigDict(extra="forbid")

    model: str
    tasks: str = Field(min_length=1)
    output_path: str
    model_args: str = ""
    batch_size: Count = 1
    log_samples: bool = True  # always on here; lmms-eval needs it said
    include_path: str | None = None

    @field_validator("model")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in PARTS:
            near = ", ".join(get_close_matches(name, PARTS)) or "llava_rcb"
            raise ValueError(f"one of `rcb list`, such as {near}")
        return name

    @field_validator("output_path")
    @classmethod
    def _own_folder(cls, path: str) -> str:
        # Its last part names a folder below the results, which it must not leave. pathlib drops a last "." itself.
        name = path.rstrip("/").rpartition("/")[2]
        if name in ("", ".", "..") or "\0" in name or len(name.encode()) > 200:
            raise ValueError("a path whose last part can name a folder below --out")
        return path


def _read_config(path: Path) -> list[Entry]:
    mend = "compare it with the files in eval_configs/"
    runs = read_yaml(path, "runs", mend)
    runs = runs if isinstance(runs, list) else [runs]
    if not runs or not all(isinstance(run, dict) for run in runs):
        raise UserError(
            wanted=f"runs from {path}",
            found="something else than runs with keys and values",
            allowed="one run or a list of them, each with " + ", ".join(_Run.model_fields),
            next_step=mend,
        )
    wanted = f"runs from {path}"
    # YAML's keys may be numbers; pydantic's are names.
    given = [
        checked(_Run, {str(name): own for name, own in run.items()}, wanted=wanted, next_step=mend) for run in runs
    ]
    return [entry for run in given for entry in _entries(path, run)]


def _entries(path: Path, run: _Run) -> Iterator[Entry]:
    arguments = {name.strip(): value.strip() for name, value in parse_arguments(run.model_args).items()}
    try:
        validated(*PARTS[run.model], arguments)
    except UserError as error:
        error.wanted = f"{error.wanted}, in {path}"
        raise
    for task in dict.fromkeys(task.strip() for task in run.tasks.split(",")):
        yield Entry(
            name=Path(run.output_path).name,
            model=run.model,
            arguments=tuple(arguments.items()),
            task=task,
            batch_size=run.batch_size,
            include_path=run.include_path,
        )
