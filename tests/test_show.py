"""Pictures of kept tokens, on images whose kept patches are known: those that show a white square."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import tiny
import tiny_next
import tiny_onevision
import torch
from PIL import Image
from typer.testing import CliRunner

from rcb_lmms.budget import Budget
from rcb_lmms.cli import app
from rcb_lmms.engine.session import Session
from rcb_lmms.errors import UserError
from rcb_lmms.families import load_family
from rcb_lmms.families.images import Visual
from rcb_lmms.families.places import kept_mask
from rcb_lmms.pruners import make_pruner
from rcb_lmms.pruners.base import Pruner, Selection
from rcb_lmms.report import pictures
from rcb_lmms.report.captions import Pair, marked, write_captions
from rcb_lmms.report.drawing import save_figure
from rcb_lmms.report.pictures import Shown, count_text, draw_kept, highlight
from rcb_lmms.report.sheets import kept_of, open_media, sheets_of


@pytest.fixture(scope="module")
def families(checkpoint, tmp_path_factory):
    home = tmp_path_factory.mktemp("show")
    folders = {
        "llava": checkpoint,
        "llava_next": tiny_next.save_next(home / "next"),
        "llava_onevision": tiny_onevision.save_onevision(home / "onevision"),
    }
    return {name: load_family(str(folder), max_frames_num=4) for name, folder in folders.items()}


@dataclass(frozen=True)
class Bright(Pruner):
    """Keeps, of each view by its key, the tokens in whose pixels the family sees something white."""

    kept: dict = field(default_factory=dict)
    name = "bright"
    budgets = ("adaptive",)

    def count(self, view, scores=None):
        return len(self.kept[view.key])

    def select(self, view, question=None):
        kept = self.kept[view.key]
        return Selection(torch.tensor(kept, dtype=torch.long), torch.zeros(len(view)))


def with_square(size, square):
    image = Image.new("RGB", size, (40, 40, 40))
    image.paste((255, 255, 255), square)
    return image


def bright(family, visuals):
    """For each view's key, the tokens that are brighter than the picture's grey, by the pixels of the processor."""
    processor, kept = family.processor.image_processor, {}
    deviation, mean = (torch.tensor(values)[:, None, None] for values in (processor.image_std, processor.image_mean))
    for visual, views in zip(visuals, family.encode(visuals), strict=True):
        for pixels, view in zip(family.pixels(visual), views, strict=True):
            light = torch.nn.functional.adaptive_avg_pool2d((pixels * deviation + mean)[:1], view.grid)[0].flatten()
            kept[view.key] = (light > 60 / 255).nonzero().flatten().tolist()
    return kept


SQUARE = (62, 33, 97, 71)
CASES = [
    ("llava", (200, 120), "image"),
    ("llava_next", (200, 120), "image"),
    ("llava_next", (120, 300), "image"),
    ("llava_next", (200, 120), "base"),
    ("llava_onevision", (300, 110), "image"),
    ("llava_onevision", (200, 120), "base"),
]


@pytest.mark.parametrize(("name", "size", "role"), CASES)
def test_what_is_kept_is_drawn_where_it_is_on_the_original(families, name, size, role):
    family = families[name]
    visual = Visual((with_square(size, SQUARE),), role)
    session = Session(family, Bright(Budget.adaptive(), kept=bright(family, [visual])))
    views, kept = kept_of(session, Shown("Is it red?", [[visual]]).question)
    sheets = sheets_of(family, [[visual]], views)
    assert [len(sheet.views) for sheet in sheets] == ([1] if len(views[0]) == 1 else [1, len(views[0]) - 1])
    square = np.zeros(size[::-1], bool)
    square[SQUARE[1] : SQUARE[3], SQUARE[0] : SQUARE[2]] = True
    for sheet in sheets:
        boxes = np.concatenate(sheet.boxes)
        chosen = np.concatenate([16 * place + kept[number].indices for place, number in enumerate(sheet.views)])
        stays, seen = (kept_mask(size, boxes, own) for own in (chosen, np.arange(len(boxes))))
        drawn = np.asarray(highlight(sheet.canvas, boxes, chosen))
        assert (drawn[stays] == np.asarray(sheet.canvas)[stays]).all()
        # Of the square all that the view shows stays, but for slivers that darken their patch too little.
        assert stays[square & seen].mean() > 0.9
        # And nothing that is farther from it than a patch.
        width, height = (boxes[0, 2:] - boxes[0, :2]).tolist()
        far = np.ones(size[::-1], bool)
        far[
            max(0, int(SQUARE[1] - height) - 1) : int(SQUARE[3] + height) + 2,
            max(0, int(SQUARE[0] - width) - 1) : int(SQUARE[2] + width) + 2,
        ] = False
        assert not stays[far].any()


def test_frames_lie_on_a_contact_sheet_with_their_tokens(families, tmp_path):
    squares = [(5 * number, 3 * number, 5 * number + 30, 3 * number + 30) for number in range(9)]
    for number, square in enumerate(squares, 1):
        with_square((80, 60), square).save(tmp_path / f"{number}.png")
    for name, views_of_one in (("llava_onevision", [1, 4]), ("llava", [4, 4])):
        family = families[name]
        visuals = open_media(family, tmp_path)
        session = Session(family, Bright(Budget.adaptive(), kept=bright(family, visuals)))
        views, kept = kept_of(session, Shown("Is it red?", [visuals]).question)
        (sheet,) = sheets_of(family, [visuals], views)
        assert [len(visuals), len(sheet.views)] == views_of_one
        assert sheet.canvas.size == (408, 308)  # two by two cells of 200 x 150 pixels, eight apart
        boxes = np.concatenate(sheet.boxes)
        count = len(sheet.boxes[0])
        chosen = np.concatenate([count * place + own.indices for place, own in enumerate(kept)])
        stays = kept_mask(sheet.canvas.size, boxes, chosen)
        white = (np.asarray(sheet.canvas) == 255).all(-1)
        cells = kept_mask(sheet.canvas.size, boxes, np.arange(len(boxes)))
        assert white[150:158].all()  # the gap
        assert stays[white & cells].mean() > 0.9
        assert 0 < stays[cells].mean() < 0.75


def test_several_images_have_a_sheet_each_and_padding_is_counted_apart(families):
    family = families["llava_next"]
    media = [[Visual((with_square((300, 100), SQUARE),), "image")]]
    views = family.encode(media[0])
    sheet = sheets_of(family, media, views)[1]
    everything = [pictures.Kept(np.arange(16), np.zeros(16)) for _ in views[0]]
    assert count_text(sheet, everything).startswith(f"{16 * len(sheet.views)} of {16 * len(sheet.views)}")
    down = sheet.canvas.height
    outside = sum(int(((own[:, 3] <= 0) | (own[:, 1] >= down)).sum()) for own in sheet.boxes)
    assert count_text(sheet, everything).endswith(f", {outside} on padding") == (outside > 0)
    several = [[Visual((tiny.random_image(seed),), "base")] for seed in (1, 2)]
    found = sheets_of(family, several, family.encode([own[0] for own in several]))
    assert [own.views for own in found] == [(0,), (1,)]


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision"])
def test_a_layer_method_keeps_what_the_trace_says_in_every_view(families, name):
    session = Session(families[name], make_pruner("fastv", budget=Budget.tokens(5)))
    question = Shown("Is it red?", [[Visual((tiny.random_image(1, 110, 60),), "image")]]).question
    trace = session.trace(question)
    views, kept = kept_of(session, question)
    starts = np.cumsum([0] + [len(view) for view in views[0]])
    joined = np.concatenate([start + own.indices for start, own in zip(starts, kept, strict=False)])
    assert joined.tolist() == list(trace.layer_kept.values())[-1].tolist()
    assert sum(len(own.scores) for own in kept) == starts[-1]


def test_pictures_come_in_three_formats_with_questions_answers_and_counts(families, tmp_path, monkeypatch):
    captions = []
    draw = pictures.panel_image
    monkeypatch.setattr(pictures, "panel_image", lambda *args, **own: (captions.append(args[2:]), draw(*args, **own)))
    session = Session(families["llava"], make_pruner("none"))
    pruners = {name: make_pruner(name, budget=Budget.tokens(4)) for name in ("random", "fastv")}
    shown = [Shown("Is it red?", [[Visual((tiny.random_image(1),), "image")]])]
    files = draw_kept(session, pruners, shown, tmp_path / "x.png", scores=True, max_new_tokens=3)
    assert [file.suffix for file in files] == [".png", ".svg", ".pdf"]
    assert all(file.stat().st_size > 3000 for file in files)
    answers = [
        session.with_pruner(own).answer([shown[0].question], max_new_tokens=3)[0].text for own in pruners.values()
    ]
    texts = ["\n".join(own[0].split()) for own in captions if own]
    assert texts[0].startswith("Is\nit\nred?\nunpruned:")
    for text, answer in zip(texts[1:3], answers, strict=True):
        shortened = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in answer)
        assert text == "\n".join(f"4 of 16 “{shortened}”".split())
    again = draw_kept(session, pruners, shown, tmp_path / "y.png", scores=True, max_new_tokens=3)
    assert files[1].read_bytes() == again[1].read_bytes()


# Captions


def test_words_that_differ_are_marked_on_both_sides():
    first, second = marked("A red fox, on grass.", "A blue fox on the grass")
    assert first == [("A", False), ("red", True), ("fox,", False), ("on", False), ("grass.", False)]
    assert second == [("A", False), ("blue", True), ("fox", False), ("on", False), ("the", True), ("grass", False)]


def test_captions_are_written_as_text_not_as_markup(tmp_path):
    pairs = [Pair("<image>", {"full": "a <b>cat</b>", "rcb": "a dog"})]
    page = write_captions(pairs, tmp_path / "c.html").read_text()
    assert "<mark>&lt;b&gt;cat&lt;/b&gt;</mark>" in page
    assert "<mark>dog</mark>" in page
    assert "<h2>&lt;image&gt;</h2>" in page
    assert "http" not in page


def test_show_command_draws_images_and_captions(checkpoint, codebook_file, tmp_path):
    tiny.random_image(1).save(tmp_path / "a.png")
    tiny.random_image(2).save(tmp_path / "b.png")

    def run(*arguments):
        command = ["show", tmp_path / "a.png", tmp_path / "b.png", "--model", checkpoint, "--codebook", codebook_file]
        command += ["--methods", "rcb,random", "--out", tmp_path / "out.png", *arguments]
        return CliRunner().invoke(app, list(map(str, command)))

    assert run("--keep", 4, "--captions", "--question", "Is it red?").exit_code == 0
    page = (tmp_path / "out-captions.html").read_text()
    assert page.count("<section>") == 2
    assert "rcb, 4 of 16 tokens" in page
    assert page.count("data:image/png;base64,") == 2
    assert (tmp_path / "out.pdf").exists()
    refused = run("--keep", 4, "--ratio", 0.5)
    assert isinstance(refused.exception, UserError)
    together = run("--together", "--ratio", 0.25, "--answers", "--scores")
    assert together.exit_code == 0, together.output


def test_a_name_with_dots_stays_whole(tmp_path):
    from matplotlib.figure import Figure

    assert save_figure(Figure(), tmp_path / "photo.v2", ("png",)) == [tmp_path / "photo.v2.png"]
    assert save_figure(Figure(), tmp_path / "coverage-llava-1.5-7b", ("svg",))[0].name == "coverage-llava-1.5-7b.svg"
