"""`rcb codebook` and `rcb checkpoint`: making, converting and inspecting what a run loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rcb_lmms.cli.analyze import settings_of
from rcb_lmms.cli.common import Batch, Device, Dtype, Preprocess, Pretrained

codebook_app = typer.Typer(help="Make, import and inspect redundancy codebooks.", no_args_is_help=True)
checkpoint_app = typer.Typer(help="Checkpoints of the original LLaVA code.", no_args_is_help=True)


@codebook_app.command("build")
def codebook_build(
    model: Pretrained,
    out: Annotated[Path, typer.Option(help="The .safetensors to write; statistics go to OUT.stats.")],
    images: Annotated[Path | None, typer.Option(help="Folder of images, taken in the order of their names.")] = None,
    listing: Annotated[
        Path | None, typer.Option("--list", help="Their order: names, one a line, or Karpathy's dataset_coco.json.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="official, paper, paper_literal or lab.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first images.")] = None,
    setting: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, e.g. tau_prob=0.1; repeatable.")] = None,
    rethreshold: Annotated[bool, typer.Option(help="Only choose again from stored statistics; no model.")] = False,
    extend: Annotated[str | None, typer.Option(help="File or id of a codebook that the new prototypes join.")] = None,
    batch_size: Batch = 32,
    preprocess: Preprocess = None,
    template: Annotated[str | None, typer.Option(help="checkpoint, or vicuna, llama_3, qwen: the paper's.")] = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Make a codebook from images. Killed at any moment, the same command continues; torchrun's processes share it."""
    from rcb_lmms.codebook import Codebook, build
    from rcb_lmms.codebook.listing import images_of
    from rcb_lmms.engine.processes import own_device, rank_and_size
    from rcb_lmms.families import load_family

    settings = settings_of(model, preset, setting)
    base = None if extend is None else Codebook.load(extend)
    if rethreshold:
        made = build.threshold(Path(f"{out}.stats"), settings, name=out.stem)
        made = made if base is None else base.merge([made], name=out.stem)
        made.save(out)
    else:
        paths = images_of(images, listing, limit)
        own = device or own_device()
        family = load_family(model, preprocess=preprocess, template=template, device=own, dtype=dtype)
        made = build.build(family, paths, out, settings, batch_size=batch_size, extend=base)
    if rank_and_size()[0] == 0:
        typer.echo(f"wrote {out}: {len(made)} prototypes, sha256 {made.sha256[:12]}")
        typer.echo(f"next: rcb codebook show {out}")


@codebook_app.command("merge")
def codebook_merge(
    codebooks: Annotated[list[str], typer.Argument(help="Files or ids, made with one checkpoint.")],
    out: Annotated[Path, typer.Option(help="The .safetensors to write.")],
) -> None:
    """Join codebooks: the prototypes of all, each once."""
    from rcb_lmms.codebook import Codebook

    first, *others = map(Codebook.load, codebooks)
    made = first.merge(others, name=out.stem)
    made.save(out)
    typer.echo(f"wrote {out}: {len(made)} prototypes, sha256 {made.sha256[:12]}")
    typer.echo(f"next: rcb codebook show {out}")


@codebook_app.command("import")
def codebook_import(
    file: Annotated[Path, typer.Argument(help="A .pt file of the released codebooks.")],
    out: Annotated[Path | None, typer.Option(help="The .safetensors; by default where its id finds it.")] = None,
) -> None:
    """Convert a released tensor file, verified by its git blob id."""
    from rcb_lmms.codebook.artefact import import_upstream

    typer.echo(f"wrote {import_upstream(file, out)}")


@codebook_app.command("show")
def codebook_show(codebook: Annotated[str, typer.Argument(help="File or id.")]) -> None:
    """Print a codebook's card, norms, duplicates, cosines and clusters."""
    from rcb_lmms.codebook import Codebook
    from rcb_lmms.codebook.show import show as describe

    typer.echo(describe(Codebook.load(codebook)))


@checkpoint_app.command("convert")
def checkpoint_convert(
    source: Annotated[str, typer.Argument(help="Folder or Hugging Face id in the original layout.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, float16 or bfloat16.")] = "auto",
) -> None:
    """Write an original checkpoint in Hugging Face's layout, shard by shard. Entries load the original as well."""
    from rcb_lmms.families.original import convert, open_original

    original = open_original(source)
    for file in convert(original, out, dtype):
        typer.echo(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB)")
    typer.echo(f"next: lmms_eval --model {original.family}_rcb --model_args pretrained={out} --tasks pope")
