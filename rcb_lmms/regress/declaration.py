"""What a regression run consists of: a YAML file that names entries, arguments, tasks, subsets and tolerances."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from rcb_lmms.errors import UserError, checked
from rcb_lmms.files import read_yaml

MEND = "mend the file; eval_configs/regressions/lab.yaml is an example"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Subset(_Part):
    """Which documents of a task are asked.

    Attributes:
        size: documents; a last unit that does not fit is taken whole.
        strata: column whose values share the subset evenly.
        together: column whose equal values are taken as one unit, such as MME's two questions about one image.
    """

    size: int
    strata: str | None = None
    together: str | None = None


class Tolerance(_Part):
    """What may change without being a regression.

    Attributes:
        alpha: level of each test.
        flips: share of answers that may change by floating-point differences alone.
    """

    alpha: float = 0.01
    flips: float = 0.01


class _Case(_Part):
    entry: str
    model_args: dict[str, Any] = {}
    tasks: list[str] | None = None


class _Document(_Part):
    tasks: dict[str, Subset]
    cases: dict[str, _Case]
    common: dict[str, Any] = {}
    tolerance: Tolerance = Tolerance()
    lab: dict[str, Any] | None = None
    batch_size: int = 8


@dataclass(frozen=True)
class Case:
    """One entry with its arguments, asked the subsets of its tasks; one golden file."""

    name: str
    entry: str
    model_args: dict[str, Any]
    subsets: dict[str, Subset]
    golden: Path


@dataclass(frozen=True)
class Declaration:
    """The cases of one file.

    Attributes:
        path: the YAML file; golden files lie in the folder of its name without ending.
        cases: by name, in the order of the file.
        lab: arguments of `write_data` if the laboratory's benchmarks are asked; `None` if lmms-eval finds the data.
        batch_size: questions per batch.
    """

    path: Path
    cases: dict[str, Case]
    tolerance: Tolerance
    lab: dict[str, Any] | None
    batch_size: int

    @classmethod
    def load(cls, path: Path) -> Declaration:
        """Read and check a declaration.

        Raises:
            UserError: no such file, no YAML, an unknown key, a case without entry or with a task that has no subset.
        """
        content = read_yaml(path, "regressions", MEND)
        document = checked(_Document, content, wanted=f"regressions from {path}", next_step=MEND)
        cases = {}
        for name, own in document.cases.items():
            tasks = list(document.tasks) if own.tasks is None else own.tasks
            if missing := [task for task in tasks if task not in document.tasks]:
                raise _unknown(path, f"case {name} with {', '.join(missing)}", document.tasks)
            subsets = {task: document.tasks[task] for task in tasks}
            golden = path.with_suffix("") / f"{name}.jsonl"
            cases[name] = Case(name, own.entry, document.common | own.model_args, subsets, golden)
        return cls(path, cases, document.tolerance, document.lab, document.batch_size)

    def chosen(self, names: list[str] | None) -> list[Case]:
        """The named cases, or all.

        Raises:
            UserError: a name that the file does not have.
        """
        if unknown := sorted(set(names or ()) - set(self.cases)):
            raise _unknown(self.path, f"case {', '.join(unknown)}", self.cases)
        return [case for case in self.cases.values() if not names or case.name in names]


def _unknown(path: Path, found: str, known: dict[str, Any]) -> UserError:
    return UserError(wanted=f"regressions from {path}", found=found, allowed=", ".join(known), next_step=MEND)
