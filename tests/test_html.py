"""`rcb report`: the page's numbers, texts, pictures and bounds, read without a browser."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_next
import tiny_onevision
from datasets import load_dataset
from PIL import Image
from stored import NATIVE, save_run

from rcb_lmms.engine.clock import STAGES
from rcb_lmms.engine.ledger import pack_kept
from rcb_lmms.errors import UserError
from rcb_lmms.families import load_family
from rcb_lmms.families.images import Visual
from rcb_lmms.families.places import split_region
from rcb_lmms.report import charts, gallery, html, statistics
from rcb_lmms.report.collect import collect
from rcb_lmms.report.sheets import Sheet
from rcb_lmms.runs.folder import run_evaluation

COUNT = 12
HOSTILE = '</script><script>alert("x")</script><b onclick=x>&amp;\x00'


class Page(HTMLParser):
    """Elements with their attributes and texts; tables as rows of cells."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts, self.rows, self._open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        self.texts.append((self._open[-1] if self._open else "", data))
        if self.rows and {"td", "th"} & {*self._open}:
            self.rows[-1][-1] += data.strip()

    def data(self) -> dict:
        """What the page's script reads."""
        return json.loads(next(text for tag, text in self.texts if tag == "script" and text.startswith("{")))


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch, tmp_path):
    monkeypatch.setattr(statistics, "RESAMPLES", 99)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def results(tmp_path):
    """Unpruned all right but the last; RCB with two flips, another answer, and kept tokens that are known."""
    targets = ["yes", "no"] * (COUNT // 2)
    unpruned = [*targets[:-1], "yes"]
    rcb = ["no", *targets[1:3], "maybe", *targets[4:]]
    kept = [[pack_kept([number], NATIVE)] for number in range(COUNT)]
    questions = [HOSTILE if number == 0 else f"Is there object {number}?" for number in range(COUNT)]
    common = {"questions": questions, "categories": ["random", "popular"] * (COUNT // 2)}
    save_run(tmp_path / "results" / "full", "none", unpruned, targets, **common)
    save_run(tmp_path / "results" / "rcb", "rcb", rcb, targets, keep=1, kept=kept, **common)
    return tmp_path / "results"


def written(results: Path, *folders: Path) -> Page:
    return Page(html.write_report(results, results / "report.html", folders).read_text(encoding="utf-8"))


def test_the_summary_has_the_numbers_of_the_runs(results):
    page = written(results)
    heading = next(row for row in page.rows if row[:2] == ["method", "budget"])
    rcb = dict(zip(heading, next(row for row in page.rows if row[0] == "rcb"), strict=True))
    assert rcb["POPE (paper) accuracy, %"].startswith("83.3 [")
    assert (rcb["same answer, %"], rcb["right to wrong, %"], rcb["wrong to right, %"]) == ("75.0", "16.7", "8.3")
    ledger = next(row for row in page.rows if row[:2] == ["rcb, keep=1", "POPE (paper)"])
    assert ledger[2:8] == ["1.0", "1.00", "1", "1", "1", "16.0"]


def test_the_data_has_every_answer_and_the_samples_that_differ(results):
    data = written(results).data()
    (own,) = data["benchmarks"]
    assert data["runs"] == ["unpruned", "rcb, keep=1"]
    full, rcb = own["runs"]
    assert (full["reference"], rcb["reference"]) == (None, 0)
    assert full["marks"] == [1] * 11 + [0]
    assert rcb["marks"] == [0, 1, 1, 0] + [1] * 8
    assert sorted(map(int, own["samples"])) == [0, 3, 11]
    sample = own["samples"]["3"]
    assert (sample["texts"], sample["target"], sample["category"]) == (["no", "maybe"], "no", "popular")
    assert [sample["texts"][run["answers"][3]] for run in own["runs"]] == ["no", "maybe"]
    native, kept, which = sample["tokens"]["1"]
    assert (native, kept, data["kept"][which]) == (NATIVE, 1, pack_kept([3], NATIVE))


def test_hostile_texts_stay_texts(results):
    page = written(results)
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert not [attributes for _, attributes in page.elements if "onclick" in attributes]
    assert page.data()["benchmarks"][0]["samples"]["0"]["question"] == HOSTILE


def test_the_page_asks_nobody_for_anything(results):
    page = written(results)
    addresses = [
        value for _, own in page.elements for name, value in own.items() if name in ("src", "href", "action", "data")
    ]
    assert all(value.startswith("#") for value in addresses)
    policy = next(own["content"] for tag, own in page.elements if tag == "meta" and "http-equiv" in own)
    assert policy.startswith("default-src 'none'")


def test_without_the_data_set_the_report_is_written_and_says_so(results):
    data = written(results).data()
    assert data["images"] == []
    assert len(data["notes"]) == 1
    assert data["notes"][0].startswith("3 samples without images: ")
    with pytest.raises(UserError, match="no such folder"):
        written(results, results / "absent")


def test_what_finds_no_room_is_said(results, monkeypatch):
    monkeypatch.setattr(html, "MOST_SAMPLES", 1)
    page = written(results)
    assert len(page.data()["benchmarks"][0]["samples"]) == 1
    assert page.data()["benchmarks"][0]["hidden"] == 2
    assert any("2 of the 3 samples on which runs differ are not listed" in text for _, text in page.texts)
    assert page.data()["benchmarks"][0]["runs"][1]["marks"] == [0, 1, 1, 0] + [1] * 8


def test_models_stand_apart(results):
    other = {"family": "llava_next", "pruner": {"budget": "None"}, "split": "True"}
    save_run(results / "next", "none", ["yes"] * 4, ["yes"] * 4, resolved=other, model="llava_next_full")
    page = written(results)
    labels = [own["label"] for own in page.data()["benchmarks"]]
    assert labels == ["POPE (paper), llava lab", "POPE (paper), llava_next lab tiles"]
    assert [own["runs"][0]["reference"] for own in page.data()["benchmarks"]] == [None, None]
    assert len([row for row in page.rows if row[0] == "none"]) == 2


# Pictures


def test_a_sample_shows_its_image_with_the_places_of_its_tokens(checkpoint, pope_tree, tmp_path, monkeypatch):
    monkeypatch.setenv("RCB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(pope_tree)
    for entry, own in (("llava_full", {}), ("llava_random", {"keep": 1})):
        run_evaluation(entry, {"pretrained": str(checkpoint), **own}, ["pope"], tmp_path / "runs" / entry)
    monkeypatch.chdir(tmp_path)  # the record knows where the data set is
    data = written(tmp_path / "runs").data()
    (own,) = data["benchmarks"]
    assert own["samples"], "one token of 16 changes no answer of the random model: choose another seed"
    assert data["notes"] == []
    for sample in own["samples"].values():
        (number,) = sample["pictures"]["1"]
        picture = data["pictures"][number]
        image = _image(data["images"][picture["image"]])
        assert image.size == (picture["width"], picture["height"])
        original = _original(pope_tree, sample["id"])
        assert np.abs(np.asarray(image, float) - np.asarray(original, float)).mean() < 12
    # Four questions about each image; each image once.
    assert len(data["images"]) == len({int(key) // 4 for key in own["samples"]})
    questions = {key: sample["question"] for key, sample in own["samples"].items()}
    for path in tmp_path.glob("runs/*/samples_pope.jsonl"):  # as lmms_eval logs them
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        bare = [{name: value for name, value in row.items() if name not in ("doc", "arguments")} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in bare))
    page = written(tmp_path / "runs")
    found = page.data()["benchmarks"][0]["samples"]
    assert {key: sample["question"].partition("\n")[0] for key, sample in found.items()} == questions
    record = json.loads((tmp_path / "runs" / "llava_random" / "run.json").read_text())
    assert record["directory"] == str(pope_tree)
    stages = [record["totals"][f"seconds_{stage}"] for stage in STAGES]
    assert min(stages) > 0
    assert sum(stages) <= record["totals"]["seconds"]
    cost = next(row for row in page.rows if row[0].startswith("random, ") and len(row) == 11)
    assert [float(cell) for cell in cost[1:7]] == pytest.approx([1000 * own / 24 for own in stages], abs=0.006)


def _image(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")


def _original(tree: Path, document: int) -> Image.Image:
    return load_dataset(str(tree / "lmms-lab-encoder" / "POPE"), split="test")[document]["image"].convert("RGB")


@pytest.mark.parametrize("save", [tiny.save_llava, tiny_next.save_next, tiny_onevision.save_onevision])
def test_a_family_without_weights_knows_the_same_places(save, tmp_path):
    folder = str(save(tmp_path / "checkpoint"))
    whole, empty = load_family(folder), load_family(folder, weights=False)
    visual = Visual((Image.new("RGB", (90, 40)),))
    assert empty.places(visual) == whole.places(visual)
    assert np.array_equal(empty.pixels(visual), whole.pixels(visual))
    assert next(empty.model.parameters()).device.type == "meta"


def test_edges_are_those_of_the_boxes():
    boxes = split_region((-10, 4, 50, 28), (2, 3))
    picture = gallery.picture_of(Sheet("x", Image.new("RGB", (40, 30)), (0,), (boxes,), ((2, 3),)))
    (view,) = picture["views"]
    for token, (left, top, right, bottom) in enumerate(boxes):
        row, column = divmod(token, 3)
        assert view["x"][column : column + 2] == [left, right]
        assert view["y"][row : row + 2] == [top, bottom]


def test_images_beyond_the_bound_are_counted(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    first, second = (Image.fromarray(pixels) for pixels in noise)
    own = gallery.Gallery([], [], len(gallery.data_uri(first)) + 10)
    boxes, grids = (split_region((0, 0, 64, 64), (2, 2)),), ((2, 2),)
    assert own._picture(Sheet("x", first, (0,), boxes, grids)) == 0
    assert own._picture(Sheet("x", first, (0,), boxes, grids)) == 0
    for _ in range(2):
        with pytest.raises(gallery.NoPictures, match="no room"):
            own._picture(Sheet("x", second, (0,), boxes, grids))
    assert (len(own.images), own.left_out) == (1, 1)


def test_large_images_are_made_small_and_flat_ones_stay_sharp():
    wide = _image(gallery.data_uri(Image.new("RGB", (3000, 1000), "red")))
    assert wide.size == (gallery.LONG_SIDE_PX, gallery.LONG_SIDE_PX // 3)
    flat = Image.new("RGB", (32, 32), "white")
    flat.putpixel((3, 4), (255, 0, 0))
    assert gallery.data_uri(flat).startswith("data:image/png")
    assert np.array_equal(np.asarray(_image(gallery.data_uri(flat))), np.asarray(flat))


# Charts


def test_points_lie_where_their_numbers_are():
    points = [charts.Point(x, y, y - 1, y + 1, f"{x}") for x, y in ((10, 50), (100, 90), (1000, 70))]
    svg = charts.scatter("t", [charts.Series("a", points)], "x", "y")
    found = [tuple(map(float, pair.split(","))) for pair in re.search(r'polyline points="([^"]*)"', svg)[1].split()]
    xs, ys = zip(*found, strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)  # logarithmic
    assert (ys[0] - ys[1]) / (ys[0] - ys[2]) == pytest.approx(40 / 20, abs=0.02)
    assert charts.scatter("t", [charts.Series("a", [])], "x", "y") == ""


def test_ticks_are_round_and_few():
    assert charts.y_ticks(81, 99) == [85, 90, 95]
    assert charts.x_ticks(15, 110) == [20, 50, 100]
    assert 1 <= len(charts.x_ticks(0.003, 0.02)) <= 6


def test_a_histogram_counts_every_value():
    svg = charts.histogram([0, 0, 0, 8, 16], (0, 16), bins=4)
    heights = [float(height) for height in re.findall(r'height="([\d.]+)"', svg)]
    assert heights == [24, 8, 8]


def test_stages_of_runs_that_were_joined_are_those_of_all(tmp_path):
    totals = {"questions": 2, "seconds": 4.0, "questions_per_second": 0.5, "resumed_questions": 0}
    stages = {"seconds_open": 0.5, "seconds_encode": 1.0, "seconds_generate": 2.0}
    for name, task in (("one", "rcb_pope"), ("two", "rcb_seed_image")):
        metric = {"rcb_pope": "rcb_pope_accuracy", "rcb_seed_image": "rcb_seed_accuracy"}[task]
        own = {"task": task, "metric": metric, "totals": totals | stages}
        save_run(tmp_path / "full" / name, "none", ["yes", "no"], ["yes", "yes"], **own)
    (run,), _ = collect(tmp_path)
    assert run.record["totals"] | {} == {
        "questions": 4,
        "seconds": 8.0,
        "questions_per_second": 0.5,
        "resumed_questions": 0,
        "seconds_open": 1.0,
        "seconds_encode": 2.0,
        "seconds_generate": 4.0,
    }
    page = written(tmp_path)  # records of before the stages were told further apart
    cost = next(row for row in page.rows if row[0] == "unpruned" and len(row) == 8)
    assert cost[1:6] == ["250.00", "500.00", "1000.00", "250.00", "2000.00"]


def test_a_run_whose_answers_were_all_there_before_has_no_speed(results):
    record = json.loads((results / "rcb" / "run.json").read_text())
    record["totals"] |= {"questions_per_second": 0.0, "resumed_questions": COUNT}
    (results / "rcb" / "run.json").write_text(json.dumps(record))
    page = written(results)
    (heading,) = (row for row in page.rows if "questions/s" in row)
    unpruned, rcb = (dict(zip(heading, row, strict=True)) for row in page.rows if row[0] in ("none", "rcb"))
    assert (unpruned["questions/s"], rcb["questions/s"]) == ("6.2", "")


def test_texts_and_kept_tokens_are_bounded_too(results, monkeypatch):
    monkeypatch.setattr(html, "MOST_LETTERS", 150)
    (own,) = written(results).data()["benchmarks"]
    assert 1 <= len(own["samples"]) < 3
    assert own["hidden"] == 3 - len(own["samples"])
