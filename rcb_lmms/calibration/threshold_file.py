"""`thresholds=FILE`: what `rcb calibrate --tasks` found, instead of a calibration pass of the run's own."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StrictInt, ValidationError

from rcb_lmms.budget import Budget
from rcb_lmms.calibration.fitting import QUANTILES, Calibration
from rcb_lmms.calibration.passes import encoding
from rcb_lmms.errors import UserError
from rcb_lmms.files import sha256_of, write_atomic

if TYPE_CHECKING:
    from rcb_lmms.calibration.targets import Target
    from rcb_lmms.engine.encoding import ImageEncoder
    from rcb_lmms.pruners.rcb import RCB

# What scores depend on, besides the weights and the media; these two are named by hashes of their content.
SETTING = ("codebook_sha256", "preprocess", "dtype", "split", "per", "variant", "score_dtype", "min_keep")

Count = Annotated[StrictInt, Field(ge=0)]
Tokens = Annotated[FiniteFloat, Field(ge=0)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Row(_Record):
    """A threshold, and what it retains per view (or image), averaged over the questions."""

    target: Annotated[FiniteFloat, Field(gt=0)]
    threshold: Annotated[FiniteFloat, Field(ge=-1, le=1)]
    ties: Annotated[StrictInt, Field(ge=0, le=Budget.ALL_TIES)]
    achieved: Tokens
    std: Tokens
    quantiles: Annotated[dict[int, Tokens], Field(min_length=len(QUANTILES), max_length=len(QUANTILES))]
    held_out: dict[str, FiniteFloat] | None = None
    by_benchmark: dict[str, Tokens] | None = None

    @classmethod
    def of(cls, record: Calibration) -> Row:
        """From the record of a fit."""
        quantiles = dict(zip(QUANTILES, record.quantiles, strict=True))
        return cls(target=record.target, achieved=record.achieved, std=record.std, quantiles=quantiles, **record.fitted)


class Both(_Record):
    """A budget by the two conventions of counting a baseline's tokens."""

    tokens: Row
    layer_average: Row


class BenchmarkRecord(_Record):
    """One benchmark, of one task or several that have their thresholds together."""

    data_hash: str
    tasks: dict[str, str]
    documents: Count
    unreadable: Count
    images: Count
    views: Count
    views_per_document: Tokens
    native: Tokens
    baselines: dict[str, Both]
    held_out_images: Count | None = None


class ThresholdFile(_Record):
    """Thresholds with their ties, which together keep the very tokens that a calibration in the run would keep.

    A benchmark of several tasks has one threshold for all of them, where a run by itself has one for each task.
    """

    made_by: dict[str, Any]
    setting: dict[str, str | StrictInt | FiniteFloat | bool | None]
    holdout: FiniteFloat | None
    benchmarks: dict[str, BenchmarkRecord]
    everywhere: dict[str, Both] = Field(default_factory=dict, alias="global")
    path: Path = Field(default=Path(), exclude=True)
    sha256: str = Field(default="", exclude=True)

    @classmethod
    def load(cls, path: str | Path) -> ThresholdFile:
        """Read a file.

        Raises:
            UserError: there is none, or it holds something else.
        """
        import yaml

        path = Path(path)
        try:
            written = yaml.safe_load(path.read_text(encoding="utf-8"))
            return cls.model_validate({**dict(written), "path": path, "sha256": sha256_of(path)})
        except OSError as error:
            found = error.strerror or str(error)
        except ValidationError as error:
            found = "; ".join(f"{'.'.join(map(str, own['loc']))}: {own['msg']}" for own in error.errors()[:3])
        except (yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError, RecursionError) as error:
            found = "something else: " + " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise UserError(
            wanted=f"the thresholds of {path}",
            found=found,
            allowed="a YAML file that `rcb calibrate --tasks` wrote",
            next_step=f"rcb calibrate --model ... --tasks ... --match ... --out {path}",
        )

    def write(self, path: Path) -> Path:
        """Write the file, whole or not at all."""
        import yaml

        record = self.model_dump(by_alias=True, exclude_none=True) | {"holdout": self.holdout, "setting": self.setting}
        text = yaml.safe_dump(record, sort_keys=False, width=120)
        return write_atomic(path, "# Written by `rcb calibrate --tasks`.\n" + text)

    def check(self, encoder: ImageEncoder, pruner: RCB) -> None:
        """Refuse thresholds of another model, codebook or preprocessing.

        Raises:
            UserError: naming what differs.
        """
        from rcb_lmms.families.identity import weights_hash

        now = setting_of(encoder, pruner)
        differs = [f"{name}={self.setting.get(name)}" for name in SETTING if self.setting.get(name) != now[name]]
        allowed = [f"{name}={now[name]}" for name in SETTING]
        if self.setting.get("fingerprint") != now["fingerprint"]:  # a copy has other times, and only its bytes tell
            weights = weights_hash(encoder.family)
            differs += [f"weights={self.setting.get('weights')}"] if self.setting.get("weights") != weights else []
            allowed.append(f"weights={weights}")
        if differs:
            raise self._refused("for this model", ", ".join(differs), ", ".join(allowed))

    def row(self, task: str, target: Target) -> tuple[BenchmarkRecord, Row]:
        """The benchmark that has the task, and its record of the budget.

        Raises:
            UserError: the file does not have the one or the other.
        """
        holding = [own for name, own in self.benchmarks.items() if name == task and task in own.tasks]
        holding += [own for own in self.benchmarks.values() if task in own.tasks]
        if not holding:
            known = (name for own in self.benchmarks.values() for name in own.tasks)
            raise self._refused(f"for task {task}", "no such task in the file", ", ".join(dict.fromkeys(known)))
        rows = holding[0].baselines
        if target.text in rows:
            return holding[0], getattr(rows[target.text], target.convention)
        tokens = target.ratio * holding[0].native if target.ratio is not None else target.count
        every: Iterable[Row] = (row for both in rows.values() for row in (both.tokens, both.layer_average))
        for row in every:
            if tokens is not None and math.isclose(row.target, tokens):
                return holding[0], row
        allowed = (f"{name} ({both.tokens.target:g} tokens)" for name, both in rows.items())
        raise self._refused(f"for {target} on {task}", "no such budget in the file", ", ".join(allowed))

    def calibration(self, task: str, target: Target, data: str, questions: float, unreadable: int) -> Calibration:
        """The record of a task's budget, as a calibration in the run would have made it.

        Args:
            task: of lmms-eval.
            target: the budget.
            data: hash of the images that are asked about.
            questions: about each of them, added up.
            unreadable: documents that cannot be read.

        Raises:
            UserError: other images than the thresholds were fitted to.
        """
        benchmark, row = self.row(task, target)
        if benchmark.tasks[task] != data:
            found = f"other images, or asked about another number of times: {benchmark.tasks[task][:12]}"
            raise self._refused(f"for the data of {task}", found, f"{data[:12]}, the whole task without --limit")
        return Calibration(
            method="rcb",
            target=row.target,
            achieved=row.achieved,
            fitted={"threshold": row.threshold, "ties": row.ties},
            std=row.std,
            quantiles=list(row.quantiles.values()),
            native=benchmark.native,
            views=benchmark.views,
            questions=questions,
            data_hash=data,
            per=str(self.setting["per"]),
            unreadable=unreadable,
        )

    def _refused(self, what: str, found: str, allowed: str) -> UserError:
        return UserError(
            wanted=f"a threshold {what} from {self.path}",
            found=found,
            allowed=allowed,
            next_step="rcb calibrate --tasks with this setting, or leave thresholds out to calibrate in the run",
        )


def setting_of(encoder: ImageEncoder, pruner: RCB) -> dict[str, Any]:
    """What thresholds hold for, as a file tells it, the hash of the weights aside."""
    return {
        "family": encoder.family.name,
        **encoding(encoder),
        "codebook_sha256": pruner.codebook.sha256,
        "variant": pruner.variant,
        "score_dtype": pruner.score_dtype,
        "pack": getattr(encoder.family, "packing", None),
        "codebook": pruner.codebook.meta.get("id"),
        "layers": encoder.family.layers,
        "min_keep": pruner.min_keep,
    }
