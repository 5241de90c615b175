"""The `rcb` command. Thin: every command imports what it needs, so that `rcb --help` answers at once."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from rcb_lmms.cli import bench, calibrate, results, run, show
from rcb_lmms.cli.artefacts import checkpoint_app, codebook_app
from rcb_lmms.cli.codebook_study import analyze_app
from rcb_lmms.cli.lab import lab_app
from rcb_lmms.cli.regress import regress_app
from rcb_lmms.errors import exit_on_user_error

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for group in (run, bench, calibrate, results, show):
    app.add_typer(group.app)
app.add_typer(analyze_app, name="analyze")
app.add_typer(codebook_app, name="codebook")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(lab_app, name="lab")
app.add_typer(regress_app, name="regress")


def _print_version(asked: bool) -> None:
    if asked:
        from rcb_lmms.resources import source_version

        made = source_version()
        typer.echo(f"rcb_lmms {made['version']}" + (f", commit {made['commit']}" if made["commit"] else ""))
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Evaluate visual token pruning on the LLaVA family, through stock lmms-eval, at matched budgets."""


def _quieten() -> None:
    """Keep from the terminal what lmms-eval notes for its developers, and bars for files of a few kilobytes."""
    from loguru import logger

    from rcb_lmms.models.invocation import calm_bars

    calm_bars()
    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="<level>{level}</level> {name}: {message}")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def main() -> None:
    """Entry point: errors in the input end in four lines and status 2."""
    _quieten()
    with exit_on_user_error():
        app()
