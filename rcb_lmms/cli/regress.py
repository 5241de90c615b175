"""`rcb regress`: the two commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

regress_app = typer.Typer(help="Hold results against golden files, for CI.", no_args_is_help=True)

Declared = Annotated[Path | None, typer.Argument(help="YAML declaration; by default the laboratory's.")]
Cases = Annotated[list[str] | None, typer.Option("--case", help="Only this case; repeatable.")]


@regress_app.command("record")
def regress_record(declaration: Declared = None, case: Cases = None) -> None:
    """Run the declared cases and write their golden files beside the declaration."""
    from rcb_lmms.regress.command import record

    record(_path(declaration), case)
    typer.echo("next: review the difference and commit the golden files")


@regress_app.command("check")
def regress_check(declaration: Declared = None, case: Cases = None) -> None:
    """Run the declared cases and print what changed. Exit status 1: a regression; 2: a case could not be compared."""
    from rcb_lmms.regress.command import check

    raise typer.Exit(check(_path(declaration), case))


def _path(declaration: Path | None) -> Path:
    from rcb_lmms.resources import data_dir

    return (declaration or data_dir("eval_configs") / "regressions" / "lab.yaml").resolve()
