"""`rcb regress record` and `check`: all cases of a declaration, one after the other."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rcb_lmms.errors import UserError
from rcb_lmms.regress.compare import Report, compare
from rcb_lmms.regress.declaration import Case, Declaration
from rcb_lmms.regress.golden import Golden
from rcb_lmms.regress.observe import compared_arguments, observe
from rcb_lmms.runs.tasks import make_task_manager, working_directory


def record(path: Path, names: list[str] | None = None, manager: Any = None) -> list[Path]:
    """Run the cases and write their golden files, each as soon as it is complete.

    Raises:
        UserError: a declaration that does not fit, or samples that failed; golden files written before stay.
    """
    declaration = Declaration.load(path)
    written = []
    with _data(declaration):
        for case in declaration.chosen(names):
            manager = manager or _manager(declaration)
            golden = observe(_absolute(case), manager, declaration.batch_size)
            written.append(golden.write(case.golden))
            print(f"recorded {case.name}: {len(golden.samples)} samples, {case.golden}", flush=True)
    return written


def check(path: Path, names: list[str] | None = None, manager: Any = None) -> int:
    """Hold the cases against their golden files and print what changed; writes nothing.

    Returns:
        Exit status: 0 if nothing changed beyond the tolerance, 1 for a regression, 2 if none was found but a case could
        not be compared.

    Raises:
        UserError: a declaration that does not fit.
    """
    declaration = Declaration.load(path)
    regressed, refused = [], []
    with _data(declaration):
        for case in declaration.chosen(names):
            try:
                golden = Golden.read(case.golden)
                golden.check_declared(case, compared_arguments(case.model_args))
                manager = manager or _manager(declaration)
                now = observe(_absolute(case), manager, declaration.batch_size, golden)
                report = compare(golden, now, declaration.tolerance)
            except UserError as error:
                refused.append(case.name)
                print(f"NOT COMPARED {case.name}\n{_indented(str(error))}", flush=True)
                continue
            regressed += [case.name] if report.findings else []
            print(describe(report), flush=True)
    print(f"regressed: {', '.join(regressed) or 'none'}; not compared: {', '.join(refused) or 'none'}")
    return 1 if regressed else 2 if refused else 0


def describe(report: Report) -> str:
    """A report as text: the verdict, findings, notes."""
    verdict = "REGRESSED" if report.findings else "same"
    lines = [f"{verdict} {report.case}: {report.samples} samples, {len(report.findings)} findings"]
    lines += [_indented(f"- {finding}") for finding in report.findings]
    return "\n".join(lines + [_indented(f"(note) {note}") for note in report.notes])


def _manager(declaration: Declaration) -> Any:
    return make_task_manager(tasks=[task for case in declaration.cases.values() for task in case.subsets])


def _absolute(case: Case) -> Case:
    """Runs work inside the data folder, where a relative path would mean another file."""
    paths = {
        name: str(Path(value).resolve())
        for name, value in case.model_args.items()
        if name in ("pretrained", "codebook") and Path(str(value)).exists()
    }
    return dataclasses.replace(case, model_args=case.model_args | paths, golden=case.golden.resolve())


@contextlib.contextmanager
def _data(declaration: Declaration) -> Iterator[None]:
    """Inside a folder with the laboratory's benchmarks, or where the command was given."""
    if declaration.lab is None:
        yield
        return
    from rcb_lmms.lab.data import write_data

    allowed = set(inspect.signature(write_data).parameters) - {"out"}
    if unknown := sorted(set(declaration.lab) - allowed):
        raise UserError(
            wanted=f"laboratory data with {', '.join(unknown)}",
            found=f"unknown arguments in {declaration.path}",
            allowed=", ".join(sorted(allowed)),
            next_step="correct the declaration's lab",
        )
    with tempfile.TemporaryDirectory() as folder:
        write_data(folder, **declaration.lab)
        with working_directory(Path(folder)):
            yield


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
