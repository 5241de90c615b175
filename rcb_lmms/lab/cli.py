"""`rcb lab`: training, data and checks of the laboratory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

lab_app = typer.Typer(help="The embedded laboratory: train it, write its data, check it.", no_args_is_help=True)

LabFamily = Annotated[str, typer.Option(help="llava, llava_next or llava_onevision.")]


@lab_app.command("train")
def lab_train(
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint, the log and the state of a resumed run.")],
    family: LabFamily = "llava",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: int = 0,
) -> None:
    """Train a family's laboratory model. Killed at any moment, the same command continues to the same weights."""
    from rcb_lmms.lab.train import train

    typer.echo(f"wrote {train(out, family=family, device=device, seed=seed)}")
    typer.echo(f"next: rcb lab check --model {out}")


@lab_app.command("data")
def lab_data(
    out: Annotated[Path, typer.Option(help="Folder in which lmms_eval then finds its data sets.")],
    family: LabFamily = "llava",
    pope_images: Annotated[int, typer.Option(help="Images of POPE, 18 questions each.", min=1)] = 40,
    mme_images: Annotated[int, typer.Option(help="Images per MME subtask, two questions each.", min=1)] = 40,
    muirbench_items: Annotated[int, typer.Option(help="Questions per MuirBench task.", min=1)] = 40,
    mvbench_videos: Annotated[int, typer.Option(help="Videos per MVBench subtask.", min=1)] = 40,
) -> None:
    """Write the benchmarks that a family's laboratory model answers, in the schemas of the true ones."""
    from rcb_lmms.lab.data import write_data

    sizes = {"pope_images": pope_images, "mme_images": mme_images}
    sizes |= {"muirbench_items": muirbench_items, "mvbench_videos": mvbench_videos}
    typer.echo(f"wrote {write_data(out, family=family, **sizes)}")
    arguments, tasks = "pretrained=lab,keep=36", "pope,mme"
    if family == "llava_onevision":
        arguments, tasks = "pretrained=lab,keep=9,max_frames_num=8", "muirbench,mvbench_moving_direction"
    typer.echo(f"next: cd {out} && lmms_eval --model {family}_rcb --model_args {arguments} --tasks {tasks}")


@lab_app.command("images")
def lab_images(
    out: Annotated[Path, typer.Option(help="Folder for the PNG files.")],
    count: Annotated[int, typer.Option(help="Scenes.", min=1)] = 200,
    family: LabFamily = "llava",
) -> None:
    """Write scenes for building a codebook; no test scene is among them."""
    from rcb_lmms.lab.data import codebook_images

    typer.echo(f"wrote {len(codebook_images(out, count, family))} scenes to {out}")
    typer.echo(f"next: rcb codebook build --model lab:{family} --images {out} --out lab.safetensors")


@lab_app.command("check")
def lab_check(
    model: Annotated[str, typer.Option(help="lab, or the folder of a laboratory checkpoint.")] = "lab",
    scenes: Annotated[int, typer.Option(help="Held-out scenes.", min=1)] = 100,
) -> None:
    """Print the controls: unpruned, blank image, background alone, objects alone, random tokens."""
    from rcb_lmms.lab.check import check
    from rcb_lmms.lab.checkpoint import lab_checkpoint

    check(lab_checkpoint("llava") if model == "lab" else model, scenes=scenes)
