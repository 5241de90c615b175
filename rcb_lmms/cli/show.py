"""`rcb show`: kept and pruned tokens on the original images, and captions side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rcb_lmms.cli.common import Device, Dtype, Preprocess, Pretrained
from rcb_lmms.errors import UserError

if TYPE_CHECKING:
    from rcb_lmms.engine.session import Session
    from rcb_lmms.pruners.base import Pruner
    from rcb_lmms.report.pictures import Shown

app = typer.Typer()

METHODS = "rcb,prumerge,prumerge_plus,random"
CAPTION = (
    "Describe the provided image in one sentence.\n"
    "Please provide detailed and specific descriptions of the key information in the picture."
)


@app.command()
def show(
    media: Annotated[list[Path], typer.Argument(help="Image and video files, or folders of a video's frames.")],
    model: Pretrained = "lab",
    keep: Annotated[int | None, typer.Option(help="Retained visual tokens of a view (image, tile, frame).")] = None,
    ratio: Annotated[float | None, typer.Option(help="Their share instead; 0.25 if neither is given.")] = None,
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = METHODS,
    codebook: Annotated[str | None, typer.Option(help="File or id; by default the model's.")] = None,
    question: Annotated[str | None, typer.Option(help="For methods that see it, and for --answers.")] = None,
    together: Annotated[bool, typer.Option(help="One question about all images, instead of one about each.")] = False,
    answers: Annotated[bool, typer.Option(help="Write each method's answer under its picture.")] = False,
    captions: Annotated[bool, typer.Option(help="HTML too: the unpruned and the first method's captions.")] = False,
    scores: Annotated[bool, typer.Option(help="Score maps under the pictures.")] = False,
    frames: Annotated[int, typer.Option(help="Of a video.", min=1)] = 16,
    split: Annotated[bool | None, typer.Option(help="Tiles, or the base view alone, in families with tiles.")] = None,
    preprocess: Preprocess = None,
    device: Device = None,
    dtype: Dtype = "auto",
    out: Annotated[Path, typer.Option(help="PNG file; SVG and PDF are written beside it.")] = Path("kept_tokens.png"),
) -> None:
    """Draw which visual tokens each method keeps, on the original images, tiles and frames."""
    from rcb_lmms.engine.session import Session
    from rcb_lmms.families import load_family
    from rcb_lmms.pruners import make_pruner
    from rcb_lmms.report.pictures import QUESTION, Shown, draw_kept
    from rcb_lmms.report.sheets import open_media

    options = {} if split is None else {"split": split}
    family = load_family(model, preprocess=preprocess, device=device, dtype=dtype, max_frames_num=frames, **options)
    pruners = _pruners(family.name, model, methods, keep, ratio, codebook)
    text = question or (CAPTION if captions else QUESTION)
    groups = [media] if together else [[path] for path in media]
    shown = []
    for group in groups:
        role = family.several if len(group) > 1 else "image"
        shown.append(Shown(text, [open_media(family, path, role) for path in group]))
    session = Session(family, make_pruner("none"))
    length = 512 if captions else 32 if answers else 0
    files = draw_kept(session, pruners, shown, out, scores=scores, max_new_tokens=0 if captions else length)
    typer.echo(f"wrote {', '.join(map(str, files))}")
    if captions:
        names = [" ".join(path.name for path in group) for group in groups]
        typer.echo(f"wrote {_write_captions(session, pruners, shown, names, length, out)}")


def _pruners(
    family: str, model: str, methods: str, keep: int | None, ratio: float | None, codebook: str | None
) -> dict[str, Pruner]:
    from rcb_lmms.budget import Budget
    from rcb_lmms.families import default_codebook
    from rcb_lmms.pruners import make_pruner

    if keep is not None and ratio is not None:
        raise UserError(
            wanted="a budget",
            found=f"--keep {keep} and --ratio {ratio:g}",
            allowed="one of the two",
            next_step="leave one out",
        )
    budget = Budget.tokens(keep) if keep is not None else Budget.ratio(0.25 if ratio is None else ratio)
    own = {"rcb": {"codebook": codebook or default_codebook(family, model)}}
    return {name: make_pruner(name, budget=budget, **own.get(name, {})) for name in methods.split(",")}


def _write_captions(
    session: Session, pruners: dict[str, Pruner], shown: list[Shown], names: list[str], length: int, out: Path
) -> Path:
    import tempfile

    from rcb_lmms.report.captions import Pair, write_captions
    from rcb_lmms.report.pictures import draw_kept

    (name, pruner), *_ = pruners.items()
    pairs: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (own, title) in enumerate(zip(shown, names, strict=True)):
            drawn = draw_kept(session, {name: pruner}, [own], Path(folder, f"{number}"), formats=("png",))
            said = [
                each.answer([own.question], max_new_tokens=length)[0] for each in (session, session.with_pruner(pruner))
            ]
            texts = [answer.error or answer.text for answer in said]
            retained = said[1].row.visual_kept if said[1].row else 0
            native = said[1].row.visual_native if said[1].row else 0
            captions = {"unpruned": texts[0], f"{name}, {retained} of {native} tokens": texts[1]}
            pairs.append(Pair(f"{title}: {own.text}", captions, drawn[0]))
        return write_captions(pairs, out.with_name(f"{out.stem}-captions.html"))
