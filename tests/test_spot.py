"""Spot the difference: pairs with known differences, the picture that joins them, and what answers are worth."""

from __future__ import annotations

import json

import numpy as np
import pytest
import task_trees
import tiny
from lmms_eval.evaluator import simple_evaluate
from PIL import Image

from rcb_lmms.lab.pairs import make_pair, write_pairs
from rcb_lmms.runs.tasks import make_task_manager, working_directory
from rcb_lmms.scoring import spot_the_difference as spot


def differing(pair):
    """Phrases that one scene has and the other lacks, counted."""
    first, second = ([item.phrase for item in scene.objects] for scene in (pair.first, pair.second))
    gone = list(first)
    for phrase in second:
        if phrase in gone:
            gone.remove(phrase)
    return sorted(gone)


def test_the_known_differences_of_a_pair_are_those_of_its_scenes():
    pairs = [make_pair("test", index) for index in range(80)]
    for pair in pairs:
        assert 1 <= len(pair.differences) <= 2
        assert differing(pair) == sorted(difference.partition("|")[0] for difference in pair.differences)
        assert len(pair.second.objects) >= 1
    assert {len(pair.differences) for pair in pairs} == {1, 2}
    assert any("|" not in difference for pair in pairs for difference in pair.differences)
    assert make_pair("test", 3) == make_pair("test", 3) != make_pair("train", 3)


@pytest.mark.parametrize(
    ("first", "second", "size", "corner"),
    [
        ((40, 60), (40, 60), (88, 60), (48, 0)),  # side by side
        ((40, 60), (20, 30), (88, 60), (48, 0)),  # brought to the height of the first
        ((60, 40), (60, 40), (60, 88), (0, 48)),  # one below the other
        ((60, 40), (30, 20), (60, 88), (0, 48)),
    ],
)
def test_both_pictures_stand_on_white_with_a_gap(first, second, size, corner):
    both = np.array(spot.joined(Image.new("RGB", first, "red"), Image.new("RGB", second, "blue")))
    assert both.shape == (size[1], size[0], 3)
    x, y = corner
    assert (both[: first[1], : first[0]] == (255, 0, 0)).all()
    assert (both[y:, x:] == (0, 0, 255)).all()
    gap = both[:, first[0] : x] if y == 0 else both[first[1] : y]
    assert (gap == 255).all()
    assert spot.GAP_PX in gap.shape


DOC = {"differences": ["red circle|blue circle", "turtle"]}


@pytest.mark.parametrize(
    ("answer", "found", "points", "right"),
    [
        (
            "- The circle is red in one and blue in the other: a red circle, a blue circle.\n- The turtle is gone.",
            2,
            2,
            2,
        ),
        ("* A blue circle.\n* The sky.\n1. Nothing else.", 1, 3, 1),
        ("The turtle moved. The sky is darker.", 1, 2, 1),  # sentences where there is no list
        ("- A red square and a green circle.", 1, 1, 1),  # words in any order, so that "the circle is red" counts
        ("- circle\n- red", 0, 2, 0),
        ("", 0, 0, 0),
    ],
)
def test_a_difference_is_found_where_one_point_has_all_its_words(answer, found, points, right):
    row = spot.process(DOC, [answer])["rcb_spot_found"]
    assert (row["known"], row["found"], row["points"], row["right"]) == (2, found, points, right)


def test_scores_are_shares_of_all_differences_and_of_all_points():
    answers = ["- A blue circle.\n- The sky.", "- The turtle.\n- A red circle."]
    rows = [spot.process(DOC, [answer])["rcb_spot_found"] for answer in answers]
    rows.append(spot.process({}, ["- Whatever."])["rcb_spot_found"])  # nothing is known of this pair
    assert spot.found(rows) == 3 / 4
    assert spot.right(rows) == 3 / 4
    assert spot.found(rows[2:]) == "N/A"


class Says(task_trees.Scripted):
    """Answers every pair with its own target, a line each, but for the first."""

    def said(self, doc, number):
        return "- nothing" if number == 0 else "\n\n".join(f"- {own}" for own in spot.target(doc).split("\n"))


def evaluated(folder):
    model = Says()
    with working_directory(folder):
        results = simple_evaluate(
            model=model, tasks=["rcb_spot_the_difference"], task_manager=make_task_manager(), bootstrap_iters=0
        )
    return model, results["results"]["rcb_spot_the_difference"]


def test_laboratory_pairs_are_asked_with_the_papers_prompt_and_scored(tmp_path):
    write_pairs(tmp_path, 4)
    model, scores = evaluated(tmp_path)
    content, arguments = model.asked["rcb_spot_the_difference", 1]
    assert [part["type"] for part in content] == ["image", "text"]
    pair = make_pair("test", 1)
    assert content[0]["url"].size == (2 * pair.first.image().width + spot.GAP_PX, pair.first.image().height)
    assert content[1]["text"].startswith("The user is playing a spot-the-difference game. The provided image displays")
    assert arguments["until"] == []
    known = [len(make_pair("test", index).differences) for index in range(4)]
    assert scores["rcb_spot_found,none"] == pytest.approx(sum(known[1:]) / sum(known))
    assert scores["rcb_spot_right,none"] == pytest.approx(sum(known[1:]) / (sum(known[1:]) + 1))


def test_ones_own_pairs_need_no_known_differences(tmp_path):
    folder = tmp_path / "spot_the_difference" / "test"
    folder.mkdir(parents=True)
    names = [f"{number}.png" for number in range(4)]
    for number, name in enumerate(names):
        tiny.random_image(number, 40, 30).save(folder / name)
    rows = [{"first_file_name": names[n], "second_file_name": names[n + 1]} for n in (0, 2)]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    model, scores = evaluated(tmp_path)
    assert len(model.asked) == 2
    assert scores["rcb_spot_found,none"] == "N/A"
