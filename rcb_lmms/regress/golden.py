"""Golden files: one case's samples as JSON lines behind a header that says what they are comparable with."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcb_lmms.errors import UserError
from rcb_lmms.files import write_atomic
from rcb_lmms.regress.declaration import Case
from rcb_lmms.regress.kept import KeptSet

FORMAT = "rcb_lmms regression 1"
COUNTS = (
    "input_tokens",
    "visual_native",
    "visual_kept",
    "visual_newlines",
    "visual_views",
    "visual_layer_average",
)


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        task, name: of the document (`subset.documents`).
        data: hash of its media's pixels; its name is one of its other columns.
        question: text of the prompt; `prompt` is a hash of its token ids.
        target: the benchmark's answer; `answer` is the model's.
        scores: by metric, those that are numbers.
        counts: `COUNTS` as the run's ledger has them.
        kept: one set per view, or per prompt for FastV.
    """

    task: str
    name: str
    data: str
    question: str
    prompt: str
    target: str
    answer: str
    scores: dict[str, float]
    counts: dict[str, float]
    kept: tuple[KeptSet, ...]

    def to_json(self) -> dict[str, Any]:
        """As a line of the file."""
        return vars(self) | {"kept": [part.to_json() for part in self.kept]}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Sample:
        """The inverse of `to_json`."""
        return cls(**{**row, "kept": tuple(map(KeptSet.from_json, row["kept"]))})


@dataclass(frozen=True)
class Golden:
    """What a case did, now or when it was recorded.

    Attributes:
        arguments: as declared; `resolved` as used.
        subsets: per task, as declared.
        made_of: hashes of weights and codebook, precision and kind of device.
        calibrations: per task, target, achieved mean and fitted parameters.
        metrics: per task, aggregated.
    """

    case: str
    entry: str
    arguments: dict[str, str]
    subsets: dict[str, dict[str, Any]]
    made_of: dict[str, str | None]
    resolved: dict[str, str]
    versions: dict[str, str | None]
    calibrations: dict[str, dict[str, float]]
    metrics: dict[str, dict[str, float]]
    samples: list[Sample]

    def names(self, task: str) -> list[str]:
        """Names of a task's documents."""
        return [sample.name for sample in self.samples if sample.task == task]

    def write(self, path: Path) -> Path:
        """One line for the header, then one per sample."""
        header = {name: value for name, value in vars(self).items() if name != "samples"}
        rows = [json.dumps(sample.to_json(), ensure_ascii=False) for sample in self.samples]
        first = {"format": FORMAT, "digest": _digest(header, rows), **header}
        return write_atomic(path, "\n".join([json.dumps(first, ensure_ascii=False), *rows]) + "\n")

    @classmethod
    def read(cls, path: Path) -> Golden:
        """Read what `write` wrote.

        Raises:
            UserError: no such file, one of another kind or format, or one that was cut off or changed by hand.
        """
        try:
            # Not splitlines: answers may hold any of the characters that it takes for line ends.
            first, *rows = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
            header = json.loads(first)
            if not isinstance(header, dict) or header.pop("format", None) != FORMAT:
                raise _refused(path, "a file of another kind or format", FORMAT)
            if header.pop("digest", None) != _digest(header, rows):
                raise ValueError("its digest does not fit its lines")
            return cls(**header, samples=[Sample.from_json(json.loads(row)) for row in rows])
        except OSError as error:
            raise _refused(path, error.strerror or str(error), "a file that rcb regress record wrote") from error
        except (ValueError, TypeError, KeyError) as error:
            raise _refused(path, f"a damaged file ({error})", "the file as rcb regress record wrote it") from error

    def check_declared(self, case: Case, arguments: dict[str, str]) -> None:
        """Refuse a golden file of another declaration, before anything runs.

        Raises:
            UserError: naming what differs.
        """
        declared = {
            "entry": case.entry,
            "arguments": arguments,
            "subsets": {task: subset.model_dump() for task, subset in case.subsets.items()},
        }
        recorded = {"entry": self.entry, "arguments": self.arguments, "subsets": self.subsets}
        self._check(differences(recorded, declared))

    def check_made_of(self, now: dict[str, str | None]) -> None:
        """Refuse to compare results of another model, codebook, precision or kind of device.

        Raises:
            UserError: naming what differs.
        """
        self._check(differences(self.made_of, now))

    def check_data(self, now: Golden) -> None:
        """Refuse to take changed documents for changed results.

        Raises:
            UserError: counting and showing them.
        """
        before = {(sample.task, sample.name): sample.data for sample in self.samples}
        changed = [sample for sample in now.samples if before[sample.task, sample.name] != sample.data]
        if changed:
            found = f"the data changed: {len(changed)} of {len(before)} documents have other pixels"
            self._check([f"{found}, the first: {changed[0].task} {changed[0].question!r}"])

    def _check(self, found: list[str]) -> None:
        if found:
            raise UserError(
                wanted=f"compare case {self.case} with its golden file",
                found="; ".join(found),
                allowed="the entry, arguments, subset, weights, codebook, precision and data it was recorded with",
                next_step=f"undo the change, or record anew: rcb regress record --case {self.case}",
            )


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """`name: before -> now` for every leaf of two nested dicts that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        return [
            line
            for key in keys
            for line in differences(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [] if before == now else [f"{name}: {before} -> {now}"]


def _digest(header: dict[str, Any], rows: list[str]) -> str:
    text = "\n".join([json.dumps(header, sort_keys=True, ensure_ascii=False), *rows])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _refused(path: Path, found: str, allowed: str) -> UserError:
    return UserError(
        wanted=f"the golden file {path}",
        found=found,
        allowed=allowed,
        next_step="restore it from version control, or make it anew: rcb regress record",
    )
