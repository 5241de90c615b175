"""The pages that are made from the code and the README, and the methods' pictures: `python docs/pages.py`."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import tempfile
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path

import typer
from typer.core import TyperGroup

import rcb_lmms
from rcb_lmms.cli import app
from rcb_lmms.errors import BudgetError
from rcb_lmms.files import write_atomic
from rcb_lmms.models import ENTRIES, entry_id
from rcb_lmms.models.argument_types import argument_types, budget_names
from rcb_lmms.models.arguments import substitutes, supports
from rcb_lmms.pruners import PRUNERS, Pruner

DOCS = Path(__file__).parent
STAGES = {
    "pixels": "before the vision tower",
    "view": "before the language model",
    "layers": "inside the language model",
}
# Sections of a method's docstring, and their headings.
SECTIONS = {"Released code": "Paper and released code", "Ours": "Our choice", "Attributes": "Options"}
# Of the pictures, as shares of the tokens: the second is for methods that cannot keep so few.
BUDGETS = (0.25, 0.4)
# Of the laboratory models: of a view, of the decoder.
TOKENS, LAYERS = 144, 4
NAVIGATION = "      # made by: python docs/pages.py\n"


def methods_page() -> str:
    """Every method in a row."""
    rows = [
        f"| [{cls.label or name}](methods/{name}.md) | `{name}` | {STAGES[cls.stage]} | {cls.summary} "
        f"| {_linked(cls.paper)} |"
        for name, cls in PRUNERS.items()
    ]
    parts = [
        "# Methods",
        "A page for each: what it does, what it keeps of a picture, which released code it follows to the index and "
        "where that differs from the paper, and what we chose. `preset=official` is the released code, `preset=paper` "
        "the text where the two differ.",
        "\n".join(["| method | name | acts | decides | published |", "| --- | --- | --- | --- | --- |", *rows]),
        "Several beside each other on a picture of your own (`rcb quickstart --methods` has them answer questions):",
        "```sh\nrcb show photo.jpg --methods rcb,visionzip,divprune,sparsevlm --keep 36\n```",
        "[All methods at two budgets](laboratory/methods.md) has what they answer there.",
    ]
    return "\n\n".join(parts) + "\n"


def method_page(name: str) -> str:
    """One method, from the docstring and the facts of its class."""
    cls = PRUNERS[name]
    said, sections = _sections(inspect.cleandoc(cls.__doc__))
    facts = [f"`{name}`", STAGES[cls.stage], cls.summary, _linked(cls.paper)]
    if cls.sees_question is True:
        facts.append("reads the question")
    parts = [f"# {cls.label or name}", " · ".join(fact for fact in facts if fact), "## What it does", _inline(said)]
    if drawn(cls):
        parts.append(f"![tokens that {cls.label} keeps, laboratory model]({name}.png)")
        parts.append(f"*{_caption(name)}*")
    for section, heading in SECTIONS.items():
        if text := sections.get(section):
            parts += [f"## {heading}", _options(text) if section == "Attributes" else _inline(text)]
    parts += ["## Where it runs", "\n".join(_places(name, cls))]
    return "\n\n".join(parts) + "\n"


def drawn(cls: type[Pruner]) -> bool:
    """Whether there is a choice among an image's own tokens to draw."""
    return cls.stage != "pixels" and bool(cls.budgets)


def _chosen(name: str) -> tuple[Pruner, int]:
    """A method as it is drawn and tokens of a view, the first budget that it can meet in the laboratory's layers."""
    from rcb_lmms.models.arguments import resolve

    cls = PRUNERS[name]
    own = dict(cls.elsewhere) if "text_embeddings" in cls.needs else {}
    family = "llava_onevision" if cls.joins_views else "llava"
    for ratio in BUDGETS:
        pruner = resolve(family, name, {"pretrained": "lab", "ratio": ratio, **own}).pruner
        with contextlib.suppress(BudgetError):
            if cls.stage == "layers":
                pruner.schedule(TOKENS, LAYERS)
            return pruner, round(ratio * TOKENS)
    raise ValueError(f"no budget of {BUDGETS} for {name}")


def _caption(name: str) -> str:
    cls, (pruner, keep) = PRUNERS[name], _chosen(name)
    if cls.joins_views:
        what = f"Frames of a video, {BUDGETS[0]:.0%} of its tokens"
    else:
        what = f"A scene and a photograph, {keep} of {TOKENS} tokens"
    if pruner.fits_mean:
        what += ", in the mean over the two"
    if cls.stage == "layers":
        steps = pruner.schedule(TOKENS, LAYERS)
        behind = ", ".join(f"{step.keep} behind layer {step.layer}" for step in steps)
        what += f" by its own count ({behind} of {LAYERS}); what the last layer sees is shown"
    return what + ". Laboratory model, which was taught rendered scenes alone."


def _places(name: str, cls: type[Pruner]) -> list[str]:
    where = [family for family in ENTRIES if supports(family, name)]
    lines = [f"- lmms-eval models: {', '.join(f'`{entry_id(family, name)}`' for family in where)}"]
    if len(where) < len(ENTRIES):
        lines.append("- the other families' vision towers lack what it reads")
    for family in where:
        if own := substitutes(family, name):
            lines.append(f"- on {family}, ours: {', '.join(f'`{option}={value}`' for option, value in own.items())}")
    for family, own in cls.official_options.items():
        lines.append(f"- on {family}, as released: {', '.join(f'`{option}={value}`' for option, value in own.items())}")
    budgets = ", ".join(f"`{budget}`" for budget in budget_names(name))
    met = ", met in the mean" if cls.fits_mean is not False else ""
    return [*lines, f"- budget: {budgets}{met}" if budgets else "- budget: none, all tokens stay"]


def _sections(text: str) -> tuple[str, dict[str, str]]:
    """A docstring's prose, and its sections without their indentation."""
    said, *rest = re.split(rf"\n\n({'|'.join(SECTIONS)}):\n", text)
    return said, {name: textwrap.dedent(own) for name, own in zip(rest[::2], rest[1::2], strict=True)}


def _options(text: str) -> str:
    """`name: meaning` of a docstring's attributes, continued on deeper lines."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        if match := re.match(r"(\w+): (.*)", line):
            name, found[match[1]] = match[1], match[2]
        elif line.strip() and found:
            found[name] += " " + line.strip()
    return "\n".join(f"- `{option}`: {_inline(meaning)}" for option, meaning in found.items())


def _linked(paper: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{5})(v\d)?", r"[arXiv \1\2](https://arxiv.org/abs/\1\2)", paper)


def _inline(text: str) -> str:
    """Docstring prose as Markdown, paragraphs kept."""
    return "\n\n".join(" ".join(part.split()) for part in text.strip().split("\n\n"))


def reference_page() -> str:
    """Commands, model_args and Python names."""
    group = typer.main.get_command(app)
    commands = ["# Reference", "## Commands"]
    for path, command in _commands(group, "rcb"):
        rows = [
            f"| `{'`, `'.join(own.opts)}` | {_inline(getattr(own, 'help', None) or 'an argument').replace('|', '/')} |"
            for own in command.params
            if own.name != "help"
        ]
        table = "\n".join(["| option | meaning |", "| --- | --- |", *rows]) if rows else ""
        commands.append("\n\n".join(filter(None, [f"### {path}", _inline(command.help or ""), table])))
    arguments = ["## model_args", "As LLaVA-NeXT has them; [Evaluate](evaluate.md) says what they mean."]
    types = {name: list(argument_types("llava_next", name)) for name in PRUNERS}
    common = [name for name in types["none"] if all(name in own for own in types.values())]
    arguments.append("All entries: " + ", ".join(f"`{name}`" for name in common) + ".")
    rows = [
        f"| `{name}` | {', '.join(f'`{argument}`' for argument in own if argument not in common)} |"
        for name, own in types.items()
    ]
    arguments.append("\n".join(["| method | its own arguments |", "| --- | --- |", *rows]))
    names = ["## Python"]
    for name in rcb_lmms.__all__:
        own = getattr(rcb_lmms, name)
        first = inspect.cleandoc(own.__doc__ or "").split("\n")[0] if not isinstance(own, dict) else "Methods by name."
        fields = [f"`{field.name}`" for field in dataclasses.fields(own)] if dataclasses.is_dataclass(own) else []
        names.append(f"- `rcb_lmms.{name}`: {first}" + (f" Fields: {', '.join(fields)}." if fields else ""))
    return "\n\n".join([*commands, *arguments, names[0], "\n".join(names[1:])]) + "\n"


def _commands(command: object, path: str) -> list[tuple[str, object]]:
    if not isinstance(command, TyperGroup):
        return [(path, command)]
    return [found for name in sorted(command.commands) for found in _commands(command.commands[name], f"{path} {name}")]


def index_page() -> str:
    """The README, with links as they are from here."""
    return (DOCS.parent / "README.md").read_text(encoding="utf-8").replace("(docs/", "(")


def navigation() -> str:
    """`mkdocs.yml` with a page for each method."""
    text = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    before, _, after = text.partition(NAVIGATION)
    after = re.sub(r"^(      - methods/.*\n)*", "", after)
    return before + NAVIGATION + "".join(f"      - methods/{name}.md\n" for name in PRUNERS) + after


# Files below docs/, and what is in them.
PAGES: dict[str, Callable[[], str]] = {
    "index.md": index_page,
    "methods.md": methods_page,
    "reference.md": reference_page,
    "../mkdocs.yml": navigation,
    **{f"methods/{name}.md": partial(method_page, name) for name in PRUNERS},
}


def pictures() -> list[Path]:
    """What each method keeps of a laboratory scene and a photograph, or of a moving scene."""
    from PIL import Image

    from rcb_lmms.engine.session import Session
    from rcb_lmms.families import load_family
    from rcb_lmms.families.images import Visual
    from rcb_lmms.pruners import make_pruner
    from rcb_lmms.report.pictures import QUESTION, Shown, draw_kept, fitted
    from rcb_lmms.report.sheets import open_media
    from rcb_lmms.runs.quickstart import example_images

    still, moving = load_family("lab"), load_family("lab:llava_onevision", max_frames_num=8)
    images = [still.open(image).image for image in example_images()[1::2]]
    shown = {still: [Shown(QUESTION, [[Visual((image,), "base")]]) for image in images]}
    with tempfile.TemporaryDirectory() as folder:
        shown[moving] = [Shown(QUESTION, [open_media(moving, _frames(Path(folder)))])]
    files = []
    for name in filter(lambda name: drawn(PRUNERS[name]), PRUNERS):
        cls, (pruner, keep) = PRUNERS[name], _chosen(name)
        family, out = moving if cls.joins_views else still, DOCS / "methods" / f"{name}.png"
        chosen, session = {cls.label: fitted(family, pruner, images, keep)}, Session(family, make_pruner("none"))
        files += draw_kept(session, chosen, shown[family], out, formats=("png",), asked=False)
        picture = Image.open(files[-1]).convert("RGB")
        small = picture.resize([round(0.7 * side) for side in picture.size])
        small.quantize(64, dither=Image.Dither.NONE).save(files[-1], optimize=True)
    return files


def _frames(folder: Path) -> Path:
    """The frames of a laboratory video."""
    from rcb_lmms.lab.moving import make_moving_scene

    moving = make_moving_scene("test", 0)
    for number in range(8):
        moving.frame(number, 8).image().save(folder / f"{number}.png")
    return folder


if __name__ == "__main__":
    for page, made in PAGES.items():
        print(f"wrote {write_atomic(DOCS / page, made())}")
    print(f"wrote {', '.join(map(str, pictures()))}")
