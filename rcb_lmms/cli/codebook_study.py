"""`rcb analyze`: what a codebook is made of, and what it covers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rcb_lmms.cli.analyze import Out, Preset, Setting, analyze_app, open_session, settings_of, write_table
from rcb_lmms.cli.common import Device, Dtype, Preprocess, Pretrained


@analyze_app.command("codebook")
def codebook(
    stats: Annotated[Path, typer.Argument(help="OUT.stats, the folder of statistics of `rcb codebook build`.")],
    model: Pretrained = "lab:llava_next",
    preset: Preset = None,
    setting: Setting = None,
    out: Out = Path("analysis"),
    size: Annotated[int | None, typer.Option(help="Images or questions of each laboratory benchmark.", min=1)] = None,
) -> None:
    """Leave out each threshold and images of a codebook, without the model; fill Table 3 on the laboratory."""
    from rcb_lmms.analysis.study import ablate, ablation_table, save_variants

    variants = ablate(stats, settings_of(model, preset, setting))
    for file in save_variants(variants, out / "codebooks" / "ablation"):
        typer.echo(f"wrote {file}")
    table = ablation_table(variants, stats)
    write_table(table, out / "ablation", {"stats": str(stats), "model": model})
    typer.echo(table.to_string(index=False, float_format="{:.3g}".format))
    if model == "lab:llava_next":
        _fill_table_3(model, out, size)
    else:
        typer.echo(f"next: cd {out} && rcb eval table-3_llava-next-8b, the paper's model and tasks")


def _fill_table_3(model: str, out: Path, size: int | None) -> None:
    from rcb_lmms.cli.results import paper_table
    from rcb_lmms.lab.data import TASKS, write_data
    from rcb_lmms.runs.configs import read_configs
    from rcb_lmms.runs.evaluate import evaluate
    from rcb_lmms.runs.tasks import working_directory

    config = "table-3_llava-next-8b"
    asked = {entry.task for entry in read_configs([config])}
    benchmarks = [name for name, task in TASKS.items() if task in asked]
    sizes = dict.fromkeys(benchmarks, size) if size else None
    write_data(out, family="llava_next", benchmarks=benchmarks, sizes=sizes)
    with working_directory(out):
        problems = evaluate([config], Path("results"), pretrained=model, batch_size=64)
        paper_table("table-3", Path("results"), Path())
    for problem in problems:
        typer.echo(f"failed: {problem}", err=True)
    if problems:
        raise typer.Exit(1)


@analyze_app.command("coverage")
def coverage(
    codebook: Annotated[str, typer.Argument(help="File or id of a codebook.")],
    images: Annotated[Path, typer.Option(help="Folder of images.")],
    gallery: Annotated[bool, typer.Option(help="The images are the codebook's: draw the patches behind it.")] = False,
    model: Pretrained = "lab",
    out: Out = Path("analysis"),
    preprocess: Preprocess = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """How much of a data set's tokens a codebook resembles; with --gallery, which patches its prototypes are."""
    from rcb_lmms.analysis import prototypes as study
    from rcb_lmms.codebook import Codebook
    from rcb_lmms.codebook.listing import find_images

    book, files = Codebook.load(codebook), find_images(images)
    session, _ = open_session(model, None, 16, preprocess, device, dtype)
    name = str(book.meta.get("id", "codebook"))
    if gallery:
        drawn = study.draw_gallery(study.gallery(session, book, files), out / f"gallery-{name}")
        typer.echo(f"wrote {', '.join(map(str, drawn))}")
    table, facts = study.coverage(session, book, files)
    write_table(table, out / f"coverage-{name}", {"codebook": codebook, "folder": str(images)} | facts)
    typer.echo(table.to_string(index=False, float_format="{:.3g}".format))
    typer.echo(
        f"{facts['tokens']} tokens of {facts['images']} images: the largest cosine is "
        f"{facts['largest_cosine']['median']:.2f} in the median; {facts['nearest']} of {facts['prototypes']} "
        "prototypes are the nearest one of some token."
    )
