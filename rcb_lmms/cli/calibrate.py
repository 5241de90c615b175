"""`rcb calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rcb_lmms.cli.common import Device, Dtype, Preprocess, Pretrained
from rcb_lmms.errors import UserError

app = typer.Typer()


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
    from rcb_lmms.runs.local_videos import use_local_videos

    use_local_videos()  # before lmms-eval is imported
    from rcb_lmms.calibration.printing import over_images, over_tasks
    from rcb_lmms.codebook.listing import find_images
    from rcb_lmms.families import family_of
    from rcb_lmms.models import entry_id

    own = {name: value for name, value in (("split", split), ("pack", pack)) if value is not None}
    loading = {"codebook": codebook, "preprocess": preprocess, "device": device, "dtype": dtype, "per": per, **own}
    loading["allow_unreadable"] = allow_unreadable
    if images is not None:
        lines = over_images(model, find_images(images), keep, match, out, **loading)
    else:
        from rcb_lmms.models.benchmarks import load_benchmarks
        from rcb_lmms.runs.tasks import make_task_manager

        def benchmarks():
            names = tasks.split(",")
            manager = make_task_manager(entry_id(family_of(model), "rcb"), include_path, names)
            return load_benchmarks(names, manager)

        lines = over_tasks(model, benchmarks, keep, match, out, holdout=holdout, **loading)
    for line in lines:
        typer.echo(line)
