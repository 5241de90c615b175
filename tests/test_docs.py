"""Pages made from the code are current, and Python that the documentation shows runs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from rcb_lmms.pruners import PRUNERS

ROOT = Path(__file__).parents[1]


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
