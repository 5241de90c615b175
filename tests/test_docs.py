"""Pages made from the code are current, and every command that the documentation shows is one."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import click
import pytest
import typer

from rcb_lmms.cli import app
from rcb_lmms.models import PARTS
from rcb_lmms.models.argument_types import parse_arguments, validated
from rcb_lmms.pruners import PRUNERS

ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def load_pages():
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGES = load_pages()


@pytest.mark.parametrize("name", PAGES.PAGES)
def test_pages_made_from_the_code_are_current(name):
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == PAGES.PAGES[name](), "python docs/pages.py"


def test_methods_have_a_picture_where_there_is_a_choice_to_draw():
    pictures = {path.stem: path.stat().st_size for path in (ROOT / "docs" / "methods").glob("*.png")}
    assert set(pictures) == {name for name, cls in PRUNERS.items() if PAGES.drawn(cls)}, "python docs/pages.py"
    assert max(pictures.values()) < 60_000


def test_every_page_is_in_the_navigation():
    import yaml

    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert set(re.findall(r"[\w/.-]+\.md", str(yaml.safe_load(text)["nav"]))) == pages


def commands():
    """Command lines in fenced blocks of shell, comments and continuations resolved."""
    for path in TEXTS:
        for block in re.findall(r"```sh\n(.*?)```", path.read_text(encoding="utf-8"), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.split(r"&&|\|\|", line.split("  #")[0].strip().strip("()")):
                    words = shlex.split(part, comments=True)
                    if words and words[0] in ("rcb", "lmms_eval"):
                        yield pytest.param(words, id=f"{path.name}: {part.strip()}"[:90])


@pytest.mark.parametrize("words", list(commands()))
def test_commands_that_the_documentation_shows_are_understood(words):
    if words[0] == "rcb":
        command, rest = typer.main.get_command(app), words[1:]
        context = click.Context(command)
        while isinstance(command, click.Group):
            name, command, rest = command.resolve_command(context, rest)
            context = click.Context(command, info_name=name, parent=context)
        command.make_context(words[0], list(rest))
        return
    given = dict(zip(words[1::2], words[2::2], strict=False))
    assert given["--model"] in PARTS
    validated(*PARTS[given["--model"]], parse_arguments(given.get("--model_args", "")))


def test_the_session_of_the_tutorial_runs(tmp_path, monkeypatch):
    from PIL import Image
    from sklearn.datasets import load_sample_image

    monkeypatch.chdir(tmp_path)
    Image.fromarray(load_sample_image("china.jpg")).save("photo.jpg")
    (block, *_) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(), re.S)
    names: dict = {}
    exec(block, names)
    assert names["answer"].error is None
    assert names["answer"].row.visual_kept == 36
    assert [len(own) for own in names["trace"].selections[0]] == [36]
