"""What a regression run consists of: a YAML file that names entries, arguments, tasks, subsets and tolerances."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rcb_lmms.errors import UserError

Part = TypeVar("Part")


@dataclass(frozen=True)
class Subset:
    """Which documents of a task are asked.

    Attributes:
        size: documents; a last unit that does not fit is taken whole.
        strata: column whose values share the subset evenly.
        together: column whose equal values are taken as one unit, such as MME's two questions about one image.
    """

    size: int
    strata: str | None = None
    together: str | None = None


@dataclass(frozen=True)
class Tolerance:
    """What may change without being a regression.

    Attributes:
        alpha: level of each test.
        flips: share of answers that may change by floating-point differences alone.
    """

    alpha: float = 0.01
    flips: float = 0.01


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
        document = _Document(**_known(_Document, _read(path), path))
        subsets = {task: Subset(**_known(Subset, own, path)) for task, own in document.tasks.items()}
        cases = {}
        for name, own in document.cases.items():
            plan = _Case(**_known(_Case, own, path))
            tasks = list(subsets) if plan.tasks is None else plan.tasks
            if missing := [task for task in tasks if task not in subsets]:
                raise _bad(path, f"case {name} with {', '.join(missing)}", f"tasks: {', '.join(subsets)}")
            arguments = document.common | plan.model_args
            golden = path.with_suffix("") / f"{name}.jsonl"
            cases[name] = Case(name, plan.entry, arguments, {task: subsets[task] for task in tasks}, golden)
        tolerance = Tolerance(**_known(Tolerance, document.tolerance, path))
        return cls(path, cases, tolerance, document.lab, document.batch_size)

    def chosen(self, names: list[str] | None) -> list[Case]:
        """The named cases, or all.

        Raises:
            UserError: a name that the file does not have.
        """
        if unknown := sorted(set(names or ()) - set(self.cases)):
            raise _bad(self.path, f"case {', '.join(unknown)}", ", ".join(self.cases))
        return [case for case in self.cases.values() if not names or case.name in names]


@dataclass(frozen=True)
class _Document:
    tasks: dict[str, dict[str, Any]]
    cases: dict[str, dict[str, Any]]
    common: dict[str, Any] = field(default_factory=dict)
    tolerance: dict[str, float] = field(default_factory=dict)
    lab: dict[str, Any] | None = None
    batch_size: int = 8


@dataclass(frozen=True)
class _Case:
    entry: str
    model_args: dict[str, Any] = field(default_factory=dict)
    tasks: list[str] | None = None


def _read(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _bad(path, error.strerror or str(error), "a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _bad(path, " ".join(str(error).split()), "a YAML file") from error


def _known(part: type[Part], given: Any, path: Path) -> dict[str, Any]:
    """`given`, if it has the fields of a part and no others."""
    names = {item.name: item.default is item.default_factory for item in dataclasses.fields(part)}
    if not isinstance(given, dict) or set(given) - set(names):
        found = ", ".join(map(str, sorted(set(given) - set(names)))) if isinstance(given, dict) else repr(given)
        raise _bad(path, found, ", ".join(names))
    if missing := [name for name, required in names.items() if required and name not in given]:
        raise _bad(path, f"no {', '.join(missing)}", ", ".join(names))
    return given


def _bad(path: Path, found: str, allowed: str) -> UserError:
    return UserError(
        wanted=f"the declaration of regressions {path}",
        found=found,
        allowed=allowed,
        next_step="mend the file; eval_configs/regressions/lab.yaml is an example",
    )
