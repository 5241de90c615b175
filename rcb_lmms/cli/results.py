"""The commands that read finished runs: tables, plots, pictures, caption scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


Results = Annotated[Path, typer.Argument(help="Folder of run folders, such as results or quickstart/runs.")]


@app.command()
def table(
    results: Results,
    paper: Annotated[int | None, typer.Option(help="Fill the paper's table 1, 2 or 3.")] = None,
    figure: Annotated[int | None, typer.Option(help="Fill the paper's figure 9.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for what is written; by default RESULTS.")] = None,
) -> None:
    """Make the table of finished runs: accuracy with intervals, achieved tokens, relative performance, speed."""
    if paper is not None or figure is not None:
        for key in [f"table-{paper}"] * (paper is not None) + [f"figure-{figure}"] * (figure is not None):
            paper_table(key, results, out or results)
        return
    from rcb_lmms.report.collect import collect
    from rcb_lmms.report.summary import version_notes
    from rcb_lmms.report.tables import for_terminal, write_tables

    runs, excluded = collect(results)
    typer.echo(for_terminal(write_tables(runs, excluded, out or results)))
    for line in version_notes((run.path, run.record) for run in runs):
        typer.echo(f"note: {line}", err=True)
    typer.echo(f"wrote {(out or results) / 'table.md'}")


def paper_table(key: str, results: Path, out: Path) -> None:
    """Fill one of the paper's tables, print it and what was left out."""
    from rcb_lmms.report.paper_text import write_paper_table
    from rcb_lmms.report.published import layout

    text, blanks = write_paper_table(layout(key), results, out)
    typer.echo(text)
    for line in blanks:
        typer.echo(f"left out: {line}", err=True)
    typer.echo(f"wrote {out / key}.md and its other forms")


@app.command()
def plot(
    results: Results,
    out: Annotated[Path | None, typer.Option(help="PNG and SVG file without its ending.")] = None,
) -> None:
    """Plot accuracy over retained visual tokens for finished runs."""
    from rcb_lmms.report.collect import collect
    from rcb_lmms.report.plots import accuracy_plot
    from rcb_lmms.report.summary import summary_table

    for file in accuracy_plot(summary_table(collect(results)[0]), out or results / "accuracy"):
        typer.echo(f"wrote {file}")


@app.command()
def report(
    results: Results,
    out: Annotated[Path | None, typer.Option(help="HTML file; by default RESULTS/report.html.")] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Folder in which the runs' data sets lie, if not where they were made; repeatable."),
    ] = None,
) -> None:
    """Write one HTML file: tables, charts, costs, budgets, and the samples on which runs differ, with kept tokens."""
    from rcb_lmms.report.html import write_report

    typer.echo(f"reading the runs below {results}", err=True)
    file = write_report(results, out or results / "report.html", data or ())
    typer.echo(f"wrote {file}, {file.stat().st_size / 1e6:.1f} MB; open it in a browser")


@app.command()
def captions(
    samples: Annotated[list[Path], typer.Argument(help="Samples files (.jsonl) of caption tasks.")],
) -> None:
    """Compute CIDEr and SPICE of finished caption runs and write them into their samples and results files."""
    from rcb_lmms.scoring.rescore import add_scores

    for run in add_scores(samples):
        for metric, value in sorted(run.scores.items()):
            typer.echo(f"{metric:<24} {value:.4f}")
        typer.echo(f"wrote {run.path}" + (f" and {run.results}" if run.results else "; no results file beside it"))
