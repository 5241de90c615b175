"""The pages that are made from the code and the README, and the methods' picture: `python docs/pages.py`."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from pathlib import Path

import typer
from typer.core import TyperGroup

import rcb_lmms
from rcb_lmms.cli import app
from rcb_lmms.files import write_atomic
from rcb_lmms.models import ENTRIES
from rcb_lmms.models.argument_types import argument_types
from rcb_lmms.models.arguments import substitutes, supports
from rcb_lmms.pruners import PRUNERS, Pruner

DOCS = Path(__file__).parent
STAGES = {
    "pixels": "before the vision tower",
    "view": "before the language model",
    "layers": "inside the language model",
}


def methods_page() -> str:
    """What every method does, from its class."""
    parts = [
        "# Methods",
        "Every method stands here as its class says it: what it does, which released code it follows to the index, and "
        "where it differs. `preset=official` is that code, `preset=paper` the text where the two differ. Where a "
        "family's tower lacks what a method reads, an option that is ours serves it, or it is refused.",
        "![kept tokens of methods, laboratory model](kept_tokens_methods_1.png)",
        "![kept tokens of the other methods, laboratory model](kept_tokens_methods_2.png)",
        "The pictures show what methods keep of two laboratory scenes and a photograph, 36 of 144 tokens (laboratory "
        "model of LLaVA-1.5; RCB and PruMerge keep 36 in the mean over the pictures). PyramidDrop and V2Drop keep 58 "
        "in the mean over four layers, of which the picture shows what the last one sees.",
    ]
    return "\n\n".join([*parts, *(_method(name, cls) for name, cls in PRUNERS.items())]) + "\n"


def _method(name: str, cls: type[Pruner]) -> str:
    text = inspect.cleandoc(cls.__doc__)
    said, _, attributes = text.partition("\nAttributes:\n")
    options = _attributes(attributes)
    facts = [f"`{name}`", STAGES[cls.stage], cls.summary, cls.paper]
    if cls.sees_question is True:
        facts.append("reads the question")
    lines = [f"## {cls.label or name}", " · ".join(fact for fact in facts if fact), _inline(said)]
    if options:
        lines.append("\n".join(f"- `{option}`: {_inline(meaning)}" for option, meaning in options.items()))
    where = [family for family in ENTRIES if supports(family, name)]
    if len(where) < len(ENTRIES):
        lines.append(f"Families: {', '.join(where)}; the others lack what it reads.")
    ours = {family: own for family in where if (own := substitutes(family, name))}
    for family, own in ours.items():
        lines.append(f"On {family}, ours: " + ", ".join(f"`{option}={value}`" for option, value in own.items()) + ".")
    return "\n\n".join(lines)


def _attributes(text: str) -> dict[str, str]:
    """`name: meaning` of a docstring's attributes, continued on deeper lines."""
    found: dict[str, str] = {}
    for line in textwrap.dedent(text).splitlines():
        if match := re.match(r"(\w+): (.*)", line):
            name, found[match[1]] = match[1], match[2]
        elif line.strip() and found:
            found[name] += " " + line.strip()
    return found


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


PAGES = {"index.md": index_page, "methods.md": methods_page, "reference.md": reference_page}


def pictures() -> list[Path]:
    """What methods keep, on the laboratory model, nine methods a picture."""
    from rcb_lmms.families import load_family
    from rcb_lmms.families.images import Visual
    from rcb_lmms.models.arguments import resolve
    from rcb_lmms.report.pictures import kept_tokens_picture
    from rcb_lmms.runs.quickstart import example_images

    family = load_family("lab")
    images = [family.open(image).image for image in example_images()[1:4]]
    chosen = {}
    for name, cls in PRUNERS.items():
        if cls.stage == "pixels" or not cls.budgets or cls.joins_views or name == "prumerge_plus":
            continue
        keep = 58 if name in ("pyramiddrop", "v2drop") else 36
        own = dict(cls.elsewhere) if "text_embeddings" in cls.needs else {}
        pruner = resolve("llava", name, {"pretrained": "lab", "keep": keep, **own}).pruner
        if pruner.fits_mean:
            shown = family.encode([Visual((image,), "base") for image in images], pruner.needs)
            pruner = pruner.fit([pruner.evidence(view) for (view,) in shown], [1.0] * len(shown), keep)
        chosen[name] = pruner
    names, files = list(chosen), []
    for number, begin in enumerate(range(0, len(names), 9), 1):
        some = {name: chosen[name] for name in names[begin : begin + 9]}
        files.append(kept_tokens_picture(family, some, images, DOCS / f"kept_tokens_methods_{number}.png"))
    return files


if __name__ == "__main__":
    for page, made in PAGES.items():
        print(f"wrote {write_atomic(DOCS / page, made())}")
    print(f"wrote {', '.join(map(str, pictures()))}")
