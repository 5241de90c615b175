"""The commands that run something on this machine, and the one that names what there is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for records, samples, table and pictures.")] = Path("quickstart"),
    images: Annotated[
        int, typer.Option(help="Images of POPE, 18 questions each, and of each MME subtask; fewer are faster.", min=1)
    ] = 60,
    methods: Annotated[
        str | None, typer.Option(help="Comma-separated, beside the unpruned model and random; by default four.")
    ] = None,
) -> None:
    """Compare methods on the laboratory model: table, plot, kept tokens, report. A minute and a half on two cores."""
    from rcb_lmms.runs.quickstart import METHODS, TASKS
    from rcb_lmms.runs.quickstart import quickstart as run
    from rcb_lmms.runs.side_by_side import processes_for_runs

    chosen = METHODS if methods is None else [name.strip() for name in methods.split(",") if name.strip()]
    run(out, sizes=dict.fromkeys(TASKS, images), methods=chosen, at_once=processes_for_runs())


@app.command()
def doctor(
    fetch_spice: Annotated[
        bool, typer.Option("--fetch-spice", help="Download the two CoreNLP jars that SPICE needs (0.5 GB).")
    ] = False,
) -> None:
    """Check this machine: what is there, what is missing, what that costs and how to mend it."""
    from rcb_lmms.runs.doctor import main as run

    if fetch_spice:
        from rcb_lmms.scoring.corenlp import fetch_corenlp

        typer.echo(f"wrote {', '.join(map(str, fetch_corenlp()))}\n")
    raise typer.Exit(run())


@app.command("list")
def list_entries() -> None:
    """Models, pruning methods, codebooks, tasks and configurations by name."""
    import re

    from rcb_lmms.codebook.cards import cards
    from rcb_lmms.models import ENTRIES
    from rcb_lmms.pruners import PRUNERS
    from rcb_lmms.resources import data_dir

    typer.echo("models for lmms_eval --model:")
    for family, methods in ENTRIES.items():
        typer.echo("  " + "  ".join(f"{family}_{method}" for method in methods))
    typer.echo("pruning methods:")
    for name, method in PRUNERS.items():
        typer.echo(f"  {name:<28} {method.summary}")
    typer.echo("codebooks for codebook=:")
    for card in cards().values():
        typer.echo(f"  {card.id:<28} {card.model}")
    typer.echo("tasks for --tasks, beside those of lmms_eval tasks list:")
    texts = [file.read_text(encoding="utf-8") for file in data_dir("tasks").rglob("*.yaml")]
    names = {name for text in texts for name in re.findall(r"^(?:task|group):\s*([\w-]+)\s*$", text, re.MULTILINE)}
    typer.echo("  " + "\n  ".join(sorted(names)))
    typer.echo("configurations for rcb eval:")
    for file in sorted(data_dir("eval_configs").glob("*.yaml")):
        typer.echo(f"  {file.stem}")


@app.command("eval")
def evaluate_configs(
    configs: Annotated[
        list[str], typer.Argument(help="lmms-eval configuration files, or their stems in eval_configs.")
    ],
    out: Annotated[Path, typer.Option(help="Results folder: OUT/NAME/TASK for each run.")] = Path("results"),
    limit: Annotated[int | None, typer.Option(help="Only the first samples; in no table.", min=1)] = None,
    pretrained: Annotated[str | None, typer.Option(help="Another checkpoint; lab scales the budgets.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "--batch_size", min=1, help="Not the files'.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include_path", help="Folder of tasks of your own, beside lmms-eval's and ours.")
    ] = None,
) -> None:
    """Run evaluations; done ones are skipped, interrupted ones continued. Exit status 1 if one failed."""
    from rcb_lmms.runs.evaluate import evaluate

    problems = evaluate(
        configs, out, limit=limit, pretrained=pretrained, batch_size=batch_size, include_path=include_path
    )
    for problem in problems:
        typer.echo(f"failed: {problem}", err=True)
    if problems:
        typer.echo("the same command runs these again and nothing else", err=True)
        raise typer.Exit(1)
    if limit is not None:
        typer.echo(f"next: the same command without --limit; the runs in {out / f'limit-{limit}'} are in no table")
        return
    names = sorted({Path(config).name.partition("_")[0].partition("-") for config in configs})
    tables = [
        f"rcb table {out} --{'figure' if kind == 'figure' else 'paper'} {number}"
        for kind, _, number in names
        if kind in ("table", "figure") and number.isdecimal()
    ]
    typer.echo("next: " + ", or ".join([f"rcb table {out}", *tables]))
