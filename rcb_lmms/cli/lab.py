"""`rcb lab`: the laboratory's data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rcb_lmms.errors import UserError

lab_app = typer.Typer(help="Data of the embedded laboratory: benchmarks and scenes.", no_args_is_help=True)

LabFamily = Annotated[str, typer.Option(help="llava, llava_next or llava_onevision.")]


@lab_app.command("data")
def lab_data(
    out: Annotated[Path, typer.Option(help="Folder in which lmms_eval then finds its data sets.")],
    family: LabFamily = "llava",
    benchmark: Annotated[list[str] | None, typer.Option(help="One of the ten; repeatable. All by default.")] = None,
    size: Annotated[
        list[str] | None, typer.Option(metavar="NAME=N", help="A benchmark's images or questions; repeatable.")
    ] = None,
) -> None:
    """Write the ten benchmarks in the schemas of the true ones, about scenes such as the models are taught."""
    from datasets import disable_progress_bars

    from rcb_lmms.lab.data import family_tasks, write_data

    disable_progress_bars()  # a line for each of thirty files
    typer.echo(f"wrote {write_data(out, family=family, benchmarks=benchmark or None, sizes=_sizes(size or []))}")
    arguments = f"pretrained=lab,{'ratio=0.25,max_frames_num=8' if family == 'llava_onevision' else 'keep=36'}"
    if tasks := family_tasks(family, *([benchmark] if benchmark else [])):
        command = f"lmms_eval --model {family}_rcb --model_args {arguments} --tasks {','.join(tasks)}"
        typer.echo(f"next: cd {out} && {command}")


def _sizes(given: list[str]) -> dict[str, int]:
    sizes = {}
    for item in given:
        name, _, number = item.partition("=")
        if not number.isdecimal():
            raise UserError(
                wanted="a benchmark's size",
                found=f"--size {item}",
                allowed="NAME=N, N a whole number",
                next_step="--size pope=40, for one",
            )
        sizes[name] = int(number)
    return sizes


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


@lab_app.command("pairs")
def lab_pairs(
    out: Annotated[Path, typer.Option(help="Folder in which lmms_eval then finds the pairs.")],
    count: Annotated[int, typer.Option(help="Pairs of scenes.", min=1)] = 60,
) -> None:
    """Write pairs of scenes with known differences, for the task rcb_spot_the_difference."""
    from rcb_lmms.lab.pairs import write_pairs

    typer.echo(f"wrote {count} pairs to {write_pairs(out, count)}")
    arguments = "--model llava_onevision_rcb --model_args pretrained=lab,split=false,ratio=0.25"
    typer.echo(f"next: cd {out} && lmms_eval {arguments} --tasks rcb_spot_the_difference")
