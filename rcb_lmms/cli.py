"""The `rcb` command. Thin: every command imports what it needs, so that `rcb --help` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rcb_lmms.artefact_cli import checkpoint_app, codebook_app
from rcb_lmms.errors import UserError, exit_on_user_error
from rcb_lmms.files import find_images
from rcb_lmms.lab.cli import lab_app
from rcb_lmms.options import Device, Dtype, Preprocess, Pretrained
from rcb_lmms.regress.cli import regress_app

app = typer.Typer(
    help="Evaluate visual token pruning on the LLaVA family, through stock lmms-eval, at matched budgets.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(codebook_app, name="codebook")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(lab_app, name="lab")
app.add_typer(regress_app, name="regress")


def main() -> None:
    """Entry point: errors in the input end in four lines and status 2."""
    with exit_on_user_error():
        app()


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for records, samples, table and pictures.")] = Path("quickstart"),
) -> None:
    """Compare all methods on the laboratory model: one table, one plot, pictures of kept tokens. About five minutes."""
    from rcb_lmms.quickstart import quickstart as run

    run(out)


@app.command()
def doctor(
    fetch_spice: Annotated[
        bool, typer.Option("--fetch-spice", help="Download the two CoreNLP jars that SPICE needs (0.5 GB).")
    ] = False,
) -> None:
    """Check this machine: what is there, what is missing, what that costs and how to mend it."""
    from rcb_lmms.doctor import main as run

    if fetch_spice:
        from rcb_lmms.scoring.corenlp import fetch_corenlp

        typer.echo(f"wrote {', '.join(map(str, fetch_corenlp()))}\n")
    raise typer.Exit(run())


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


@app.command("list")
def list_entries() -> None:
    """Models, pruning methods and codebooks by name."""
    from rcb_lmms.codebook.cards import cards
    from rcb_lmms.models import ENTRIES

    typer.echo("models for lmms_eval --model:")
    for family, methods in ENTRIES.items():
        typer.echo("  " + "  ".join(f"{family}_{method}" for method in methods))
    typer.echo("codebooks for codebook=:")
    for card in cards().values():
        typer.echo(f"  {card.id:<28} {card.model}")


@app.command()
def calibrate(
    model: Pretrained,
    images: Annotated[Path | None, typer.Option(help="Folder of images by which the budget is met.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Benchmarks instead: rcb_paper, or pope,mme,...")] = None,
    keep: Annotated[float | None, typer.Option(help="Mean retained visual tokens per view.")] = None,
    match: Annotated[
        str | None,
        typer.Option(help="Baselines to match: prumerge,prumerge_plus,fastv:rank=144,random:64; with --images, one."),
    ] = None,
    codebook: Annotated[str | None, typer.Option(help="File or id; by default the model's.")] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include_path", help="Folder of tasks of your own, beside lmms-eval's and ours.")
    ] = None,
    holdout: Annotated[float | None, typer.Option(help="With --tasks: share of images held out.")] = None,
    per: Annotated[str, typer.Option(help="view or image, what budgets are spent on.")] = "view",
    allow_unreadable: Annotated[
        bool, typer.Option("--allow-unreadable", help="Calibrate on what can be read where something cannot.")
    ] = False,
    preprocess: Preprocess = None,
    split: Annotated[bool | None, typer.Option(help="Tiles, or the base view alone, in families with tiles.")] = None,
    pack: Annotated[str | None, typer.Option(help="Packing of tiles, as in model_args; changes no threshold.")] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    out: Annotated[Path | None, typer.Option(help="With --images a JSON file, with --tasks a YAML file.")] = None,
) -> None:
    """Find RCB's thresholds for budgets on images or on benchmarks: one vision-only pass, no language model."""
    if (images is None) == (tasks is None):
        raise UserError(
            wanted="data to calibrate on",
            found="both --images and --tasks" if images else "neither --images nor --tasks",
            allowed="one of the two",
            next_step="--images FOLDER, or --tasks pope,mme --match prumerge",
        )
    from rcb_lmms.local_videos import use_local_videos

    use_local_videos()  # before lmms-eval is imported
    from rcb_lmms.calibration.command import over_images, over_tasks
    from rcb_lmms.families import family_of
    from rcb_lmms.models import entry_id

    own = {name: value for name, value in (("split", split), ("pack", pack)) if value is not None}
    loading = {"codebook": codebook, "preprocess": preprocess, "device": device, "dtype": dtype, "per": per, **own}
    loading["allow_unreadable"] = allow_unreadable
    if images is not None:
        lines = over_images(model, find_images(images), keep, match, out, **loading)
    else:
        from rcb_lmms.models.documents import load_benchmarks
        from rcb_lmms.runs import make_task_manager

        def benchmarks():
            manager = make_task_manager(entry_id(family_of(model), "rcb"), include_path)
            return load_benchmarks(tasks.split(","), manager)

        lines = over_tasks(model, benchmarks, keep, match, out, holdout=holdout, **loading)
    for line in lines:
        typer.echo(line)


@app.command()
def show(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    model: Pretrained = "lab",
    keep: Annotated[int, typer.Option(help="Retained visual tokens per image.")] = 36,
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = "rcb,prumerge,prumerge_plus,random",
    codebook: Annotated[str | None, typer.Option(help="File or id; by default the model's.")] = None,
    preprocess: Preprocess = None,
    out: Annotated[Path, typer.Option(help="PNG file.")] = Path("kept_tokens.png"),
) -> None:
    """Draw which visual tokens each method keeps, on the original images."""
    from rcb_lmms.budget import Budget
    from rcb_lmms.families import default_codebook, load_family
    from rcb_lmms.pruners import make_pruner
    from rcb_lmms.report.pictures import kept_tokens_picture

    family = load_family(model, preprocess=preprocess)
    own = {"rcb": {"codebook": codebook or default_codebook(family.name, model)}}
    pruners = {name: make_pruner(name, budget=Budget.tokens(keep), **own.get(name, {})) for name in methods.split(",")}
    kept_tokens_picture(family, pruners, [family.open(image).image for image in images], out)
    typer.echo(f"wrote {out}")


@app.command("eval")
def evaluate_configs(
    configs: Annotated[
        list[str], typer.Argument(help="lmms-eval configuration files, or their stems in eval_configs.")
    ],
    out: Annotated[Path, typer.Option(help="Results folder: OUT/NAME/TASK for each run.")] = Path("results"),
    limit: Annotated[int | None, typer.Option(help="Only the first samples; in no table.", min=1)] = None,
    pretrained: Annotated[str | None, typer.Option(help="Another checkpoint; lab scales the budgets.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Instead of the files'.", min=1)] = None,
) -> None:
    """Run evaluations; done ones are skipped, interrupted ones continued. Exit status 1 if one failed."""
    from rcb_lmms.evaluate import evaluate

    problems = evaluate(configs, out, limit=limit, pretrained=pretrained, batch_size=batch_size)
    for problem in problems:
        typer.echo(f"failed: {problem}", err=True)
    if problems:
        typer.echo("the same command runs these again and nothing else", err=True)
        raise typer.Exit(1)
    typer.echo(f"next: rcb table {out}, or rcb table {out} --paper 1")


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
    from rcb_lmms.report.tables import for_terminal, write_tables

    typer.echo(for_terminal(write_tables(*collect(results), out or results)))
    typer.echo(f"wrote {(out or results) / 'table.md'}")


def paper_table(key: str, results: Path, out: Path) -> None:
    """Fill one of the paper's tables, print it and what was left out."""
    from rcb_lmms.report.paper_text import left_out, write_paper_table
    from rcb_lmms.report.published import layout

    text, excluded = write_paper_table(layout(key), results, out)
    typer.echo(text)
    for line in left_out(excluded):
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
