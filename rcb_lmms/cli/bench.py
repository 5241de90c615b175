"""`rcb bench`: what an answer costs on this machine, told apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rcb_lmms.cli.common import Device, Dtype, Pretrained

if TYPE_CHECKING:
    from rcb_lmms.families.base import Family
    from rcb_lmms.pruners.base import Pruner

app = typer.Typer()

CONTROLS = ("none", "random", "stride", "downsample")
SECONDS = ("method", "budget", "batch", "open_ms", "tower_ms", "choose_ms", "pack_ms", "prefill_ms", "decode_ms",
           "total_ms", "cpu_ms", "spread", "first_token_ms", "questions_per_second")  # fmt: skip
COSTS = ("method", "budget", "batch", "kept", "layer_average", "tower_gflops", "method_gflops", "prefill_gflops",
         "decode_gflops", "total_gflops", "prefill_of_matmul", "total_of_matmul", "kv_mb", "peak_mb")  # fmt: skip


@app.command()
def bench(
    shape: Annotated[
        str | None, typer.Option(help="Random weights at a public checkpoint's full size, such as llava-1.5-7b.")
    ] = None,
    pretrained: Pretrained = "lab",
    methods: Annotated[
        str, typer.Option(help="Beside none, random, stride, downsample: NAME or NAME:PRESET, with commas; or all.")
    ] = "rcb,visionzip,divprune,fastv,fastv:paper",
    keep: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens kept of a view, repeatable; by default a ninth and a third.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of images; by default laboratory scenes.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Length of every answer.", min=1)] = 16,
    batch_size: Annotated[
        int | None, typer.Option(help="The larger batch; by default grown by fours until that no longer pays.", min=1)
    ] = None,
    repeats: Annotated[int, typer.Option(help="That count, after one that warms up.", min=1)] = 5,
    layers: Annotated[int | None, typer.Option(help="Of the shape's decoder, if not all.", min=1)] = None,
    attn_implementation: Annotated[str, typer.Option(help="sdpa, eager, flash_attention_2 and others.")] = "sdpa",
    device: Device = None,
    dtype: Dtype = "auto",
    out: Annotated[Path, typer.Option(help="Table and JSON: OUT.tsv, OUT.json.")] = Path("bench"),
) -> None:
    """Seconds by stage, FLOPs, bytes and speed of every method and budget, in batch 1 and in a saturated batch."""
    from rcb_lmms.analysis.bench import MOST
    from rcb_lmms.analysis.bench import bench as measure
    from rcb_lmms.cli.analyze import write_table
    from rcb_lmms.families import load_family
    from rcb_lmms.families.shapes import SHAPES, random_family
    from rcb_lmms.resources import machine, source_version

    loading = {"device": device, "dtype": dtype, "attn_implementation": attn_implementation}
    family = random_family(shape, layers=layers, **loading) if shape else load_family(pretrained, **loading)
    chosen = _pruners(family, methods, keep, SHAPES[shape].prototypes if shape else None)
    shown, lengths = _images(images, batch_size or MOST), {"new_tokens": new_tokens, "batch_size": batch_size}
    table, facts = measure(family, chosen, shown, repeats=repeats, **lengths)
    made = {"model": family.pretrained, "images": str(images or "laboratory scenes"), "machine": machine(family.device)}
    write_table(table, out, made | {"made_by": source_version()} | facts)
    for columns in (SECONDS, COSTS):
        typer.echo(table[list(columns)].to_string(index=False, float_format="{:.3g}".format) + "\n")
    for own in facts["left_out"]:
        typer.echo(f"left out: {own['method']}: {own['reason']}")
    typer.echo(
        f"{family.pretrained}, {facts['dtype']} on {family.device}, attention {facts['attention']['language model']}; "
        f"answers of {new_tokens} tokens; medians of {repeats}, spread is the middle half; a large matmul reaches "
        f"{facts['matmul_tflops_per_second']:.3g} TFLOPs a second."
    )


def _images(folder: Path | None, count: int) -> list:
    from rcb_lmms.codebook.listing import find_images
    from rcb_lmms.lab.scenes import make_scene

    if folder is None:
        return [make_scene("test", number).image() for number in range(count)]
    return find_images(folder)[:count]


def _pruners(family: Family, methods: str, keep: list[int] | None, prototypes: int | None) -> list[tuple[str, Pruner]]:
    """The unpruned model, then controls and methods, budget by budget."""
    from rcb_lmms.budget import Budget
    from rcb_lmms.models.arguments import supports
    from rcb_lmms.pruners import PRUNERS, make_pruner

    named = [name.strip() for name in methods.split(",") if name.strip()]
    if named == ["all"]:
        named = [name for name, cls in PRUNERS.items() if supports(family.name, name) and not cls.joins_views]
    native = family.grid[0] * family.grid[1]
    counts = keep or [round(native / 9), round(native / 3)]
    names = [name for name in dict.fromkeys([*CONTROLS, *named]) if name != "none"]
    own = {name: _options(family, name, prototypes) for name in names}
    made = [("none", make_pruner("none"))]
    for count in counts:
        for label in names:
            name, _, preset = label.partition(":")
            options = {"budget": Budget.tokens(count), "preset": preset or "official"}
            made.append((label, make_pruner(name, **options, **own[label])))
    return made


def _options(family: Family, label: str, prototypes: int | None) -> dict[str, Any]:
    """What the official preset sets for a family; ours where the tower lacks something, or another model were needed.

    Args:
        family: the loaded model.
        label: the method's name, and a preset behind a colon.
        prototypes: of a random codebook, where the model is random too.
    """
    import torch

    from rcb_lmms.codebook import Codebook
    from rcb_lmms.errors import choose
    from rcb_lmms.families import default_codebook
    from rcb_lmms.models.argument_types import field_names
    from rcb_lmms.models.arguments import substitutes
    from rcb_lmms.pruners import PRUNERS

    name, _, preset = label.partition(":")
    cls = PRUNERS[choose("method", name, PRUNERS)]
    own = {**({} if preset else cls.official_options.get(family.name, {})), **(substitutes(family.name, name) or {})}
    if "text_embeddings" in cls.needs:
        own |= cls.elsewhere
    if "codebook" in field_names(name):
        own["codebook"] = (
            Codebook(torch.randn(prototypes, family.width), {"id": "random", "model": family.pretrained})
            if prototypes
            else default_codebook(family.name, family.pretrained)
        )
    return own
