"""`rcb analyze`: the paper's analyses of visual redundancy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rcb_lmms.cli.common import Batch, Device, Dtype, Preprocess, Pretrained
from rcb_lmms.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from rcb_lmms.codebook.settings import BuildSettings
    from rcb_lmms.engine.session import Session

analyze_app = typer.Typer(help="Why visual tokens are redundant: the paper's analyses.", no_args_is_help=True)

ImageFile = Annotated[Path, typer.Argument(help="An image file.")]
Tokens = Annotated[str, typer.Option(help="all, or raster indices such as 0,17,100-143.")]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="Asked about the tokens; repeatable.")]
Layers = Annotated[str | None, typer.Option(help="Decoder layers from 1; by default 2,16,30 of 32, or their share.")]
Preset = Annotated[str | None, typer.Option(help="Rules: official, paper, paper_literal or lab.")]
Setting = Annotated[list[str] | None, typer.Option(help="NAME=VALUE of a codebook's build, repeatable.")]
Out = Annotated[Path, typer.Option(help="Folder for tables and pictures.")]


def settings_of(model: str, preset: str | None, setting: list[str] | None = None) -> BuildSettings:
    """A codebook's rules: by default the laboratory's own for its models, the released ones for others."""
    from rcb_lmms.codebook.settings import parse_changes, settings_for
    from rcb_lmms.families import family_of
    from rcb_lmms.lab.checkpoint import is_lab

    own = preset or ("lab" if is_lab(model) else "official")
    return settings_for(family_of(model), own, **parse_changes(setting or []))


def open_session(
    model: str,
    preset: str | None,
    batch_size: int,
    preprocess: str | None,
    device: str | None,
    dtype: str,
    setting: list[str] | None = None,
) -> tuple[Session, BuildSettings]:
    """The unpruned model, and a codebook's rules for it."""
    from rcb_lmms.engine.session import Session
    from rcb_lmms.families import load_family
    from rcb_lmms.pruners import make_pruner

    settings = settings_of(model, preset, setting)
    family = load_family(model, preprocess=preprocess, device=device, dtype=dtype)
    return Session(family, make_pruner("none"), batch_size=batch_size), settings


def _numbers(layers: str | None) -> list[int]:
    parts = [part.strip() for part in (layers or "").split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise UserError(
            wanted="decoder layers",
            found=f"--layers {layers}",
            allowed="whole numbers from 1, separated by commas",
            next_step="--layers 2,16,30",
        )
    return [int(part) for part in parts]


def write_table(table: pd.DataFrame, out: Path, facts: dict[str, Any]) -> None:
    """A table as TSV and, with what it was made from, as JSON."""
    from rcb_lmms.files import write_atomic

    write_atomic(out.with_name(f"{out.name}.tsv"), table.to_csv(sep="\t", index=False, float_format="%.6g"))
    whole = facts | {"rows": json.loads(table.to_json(orient="records", double_precision=12))}
    write_atomic(out.with_name(f"{out.name}.json"), json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    typer.echo(f"wrote {out}.tsv and .json")


@analyze_app.command("tokens")
def tokens(
    image: ImageFile,
    model: Pretrained = "lab",
    tokens: Tokens = "all",
    prompt: Prompts = None,
    layers: Layers = None,
    preset: Preset = None,
    out: Out = Path("analysis"),
    batch_size: Batch = 32,
    preprocess: Preprocess = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Show single visual tokens to the model and read what it says (paper 3.1.1, Figure 1)."""
    from dataclasses import replace

    import pandas as pd

    from rcb_lmms.analysis.images import open_shown, parse_tokens
    from rcb_lmms.analysis.tokens import decoder_layers, read_tokens, token_maps
    from rcb_lmms.report.drawing import draw_maps

    session, settings = open_session(model, preset, batch_size, preprocess, device, dtype)
    shown = open_shown(session, image)
    chosen = parse_tokens(tokens, len(shown.view))
    wanted = decoder_layers(session.family.layers, _numbers(layers))
    readings = []
    for number, text in enumerate(prompt or [settings.prompt], 1):
        changed = replace(settings, prompt=text)
        own, attention = read_tokens(session, shown, chosen, changed, wanted, number)
        readings += own
        picture = out / f"tokens-{shown.name}{f'-prompt{number}' if prompt and len(prompt) > 1 else ''}"
        labels = {row.token: row.word for row in own} if len(own) <= 24 else {}
        files = draw_maps(shown.image, shown.boxes, token_maps(shown, own, attention), picture, labels)
        typer.echo(f"wrote {', '.join(map(str, files))}")
    table = pd.DataFrame([row.cells() for row in readings])
    typer.echo(table.nlargest(12, "probability").to_string(index=False, float_format="{:.3g}".format))
    facts = {"model": model, "image": str(image), "prompts": prompt or [settings.prompt], "layers": wanted}
    write_table(table, out / f"tokens-{shown.name}", facts)


@analyze_app.command("influence")
def influence(
    image: ImageFile,
    model: Pretrained = "lab",
    tokens: Tokens = "all",
    candidates: Annotated[int, typer.Option(help="Tokens whose candidates are shown, the weightiest.", min=1)] = 4,
    prompt: Annotated[str | None, typer.Option(help="Asked about the image; by default the codebook's.")] = None,
    preset: Preset = None,
    out: Out = Path("analysis"),
    batch_size: Batch = 32,
    preprocess: Preprocess = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Leave tokens out, one by one and in the paper's cascade, and see what the answer loses (Figures 2, 3, 6)."""
    from dataclasses import replace

    from rcb_lmms.analysis import influence as study
    from rcb_lmms.analysis.images import open_shown, parse_tokens
    from rcb_lmms.report.drawing import draw_maps

    session, settings = open_session(model, preset, batch_size, preprocess, device, dtype)
    settings = settings if prompt is None else replace(settings, prompt=prompt)
    shown = open_shown(session, image)
    found = study.influence(session, shown, parse_tokens(tokens, len(shown.view)), settings)
    rows = found.combined.argsort(descending=True, stable=True)[:candidates].tolist()
    changes = study.candidate_changes(session, found, rows)
    stem = out / f"influence-{shown.name}"
    files = draw_maps(shown.image, shown.boxes, study.influence_maps(shown, found), stem)
    files += study.draw_candidates(changes, stem.with_name(f"{stem.name}-candidates"))
    typer.echo(f"wrote {', '.join(map(str, files))}")
    facts, told = study.explain_cascade(found)
    table = study.influence_table(shown, found)
    given = {"model": model, "image": str(image), "prompt": settings.prompt, "preset": settings.preset}
    write_table(table, stem, given | {"cascade": facts, "candidates": changes.to_dict("records")})
    typer.echo(table.nlargest(8, "jsd_combined").to_string(index=False, float_format="{:.3g}".format))
    typer.echo(told)


@analyze_app.command("curves")
def curves(
    images: Annotated[Path, typer.Option(help="Folder of images.")],
    model: Pretrained = "lab",
    limit: Annotated[int, typer.Option(help="Images, the first by name.", min=2)] = 100,
    patches: Annotated[int, typer.Option(help="Per image, an even grid; the root is rounded.", min=4)] = 64,
    layers: Layers = None,
    preset: Preset = None,
    out: Out = Path("analysis"),
    batch_size: Batch = 32,
    preprocess: Preprocess = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Do tokens of low CLS similarity or attention say less and change less? Curves over a data set (Figure 4)."""
    from rcb_lmms.analysis import curves as study
    from rcb_lmms.analysis.tokens import decoder_layers
    from rcb_lmms.codebook.listing import find_images

    files = find_images(images)[:limit]
    session, settings = open_session(model, preset, batch_size, preprocess, device, dtype)
    wanted = decoder_layers(session.family.layers, _numbers(layers))
    table = study.measure_images(session, files, settings, wanted, patches)
    found = study.curves(table)
    told = study.explain_curves(found, table)
    typer.echo(f"wrote {', '.join(map(str, study.draw_curves(found, out / 'curves')))}")
    facts = {"model": model, "images": len(files), "layers": wanted, "preset": settings.preset, "finding": told}
    write_table(table, out / "curves", facts | {"curves": [study.curve_facts(curve) for curve in found]})
    typer.echo(told)


@analyze_app.command("features")
def features(
    image: Annotated[Path | None, typer.Argument(help="An image file, whose tokens are shown.")] = None,
    stats: Annotated[Path | None, typer.Option(help="OUT.stats of a codebook's build, whose candidates are.")] = None,
    method: Annotated[str, typer.Option(help="tsne or pca.")] = "tsne",
    model: Pretrained = "lab",
    preset: Preset = None,
    setting: Setting = None,
    out: Out = Path("analysis"),
    batch_size: Batch = 32,
    preprocess: Preprocess = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Where in feature space the tokens lie that say nothing: of an image, or candidates of many (Figures 7, 8)."""
    from rcb_lmms.analysis import features as study
    from rcb_lmms.analysis.images import open_shown

    if (image is None) == (stats is None):
        raise UserError(
            wanted="what is to be analysed",
            found="both IMAGE and --stats" if image else "nothing",
            allowed="one of the two",
            next_step="name IMAGE or --stats",
        )
    if image is not None:
        session, settings = open_session(model, preset, batch_size, preprocess, device, dtype, setting)
        shown = open_shown(session, image)
        table = study.image_features(session, shown, settings, method)
        files = study.draw_features(table, out / f"features-{shown.name}")
        told = study.explain_outliers(table, settings.tau_prob)
        write_table(table, out / f"features-{shown.name}", {"model": model, "image": str(image), "finding": told})
    else:
        table, told = study.candidate_map(stats, settings_of(model, preset, setting), method)
        files = study.draw_candidate_map(table, out / "candidates")
        write_table(table, out / "candidates", {"stats": str(stats), "finding": told})
    typer.echo(f"wrote {', '.join(map(str, files))}")
    typer.echo(told)
