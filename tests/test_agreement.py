"""How often runs answer alike, what they lose and gain, and the samples on which downsampling fails."""

from __future__ import annotations

import numpy as np
import pytest
from stored import save_run

from rcb_lmms.report import statistics
from rcb_lmms.report.agreement import agreement
from rcb_lmms.report.collect import collect
from rcb_lmms.report.summary import summary_table
from rcb_lmms.report.tables import readable, write_tables

COUNT = 40


@pytest.fixture
def answered(tmp_path, monkeypatch):
    """Answers and targets by name of the run; the folder holds the runs."""
    monkeypatch.setattr(statistics, "RESAMPLES", 99)
    random = np.random.default_rng(0)
    targets = random.choice(["yes", "no"], COUNT).tolist()
    names = {"none": (None, None), "rcb": (8, None), "downsample": (8, None), "random1": (8, 1), "random2": (8, 2)}
    found = {"targets": targets}
    for name, (keep, seed) in names.items():
        wrong = random.random(COUNT) < (0.1 if name == "none" else 0.4)
        answers = [
            ("no" if target == "yes" else "yes") if bad else target for bad, target in zip(wrong, targets, strict=True)
        ]
        found[name] = [f" {answer.upper()} " if name == "rcb" else answer for answer in answers]
        save_run(tmp_path / name, name.rstrip("12"), found[name], targets, keep=keep, seed=seed)
    return tmp_path, found


def count(found, one: str, two: str) -> tuple[float, float, float]:
    """Same, lost and gained answers, sample by sample, as shares."""
    same = lost = gained = 0
    for target, before, after in zip(found["targets"], found[one], found[two], strict=True):
        before, after = before.strip().lower(), after.strip().lower()
        same += before == after
        lost += before == target != after
        gained += before != target == after
    return same / COUNT, lost / COUNT, gained / COUNT


def test_flips_are_those_counted_by_hand(answered):
    folder, found = answered
    table = summary_table(collect(folder)[0]).set_index("method")
    names = ["agreement", "right_to_wrong", "wrong_to_right"]
    expected = count(found, "none", "rcb")
    assert 0 < expected[2] < expected[1] < expected[0] < 1
    assert table.loc["rcb", names].tolist() == pytest.approx(expected)
    seeds = [count(found, "none", name) for name in ("random1", "random2")]
    assert table.loc["random", names].tolist() == pytest.approx(np.mean(seeds, axis=0).tolist())
    assert table.loc["rcb", "rcb_pope_agreement"] == pytest.approx(expected[0])
    assert table.loc["none", names].isna().all()
    difference = table.loc["rcb", "rcb_pope_accuracy"] - table.loc["none", "rcb_pope_accuracy"]
    assert difference == pytest.approx(expected[2] - expected[1])


def test_hard_samples_are_right_unpruned_and_wrong_downsampled(answered):
    folder, found = answered
    table = summary_table(collect(folder)[0]).set_index("method")
    is_right = {
        name: [answer.strip().lower() == target for answer, target in zip(found[name], found["targets"], strict=True)]
        for name in found
    }
    hard = [number for number in range(COUNT) if is_right["none"][number] and not is_right["downsample"][number]]
    assert len(hard) > 5
    assert table.loc["rcb", "hard_samples"] == len(hard)
    assert table.loc["rcb", "hard_accuracy"] == pytest.approx(np.mean([is_right["rcb"][number] for number in hard]))
    seeds = [np.mean([is_right[name][number] for number in hard]) for name in ("random1", "random2")]
    assert table.loc["random", "hard_accuracy"] == pytest.approx(np.mean(seeds))
    assert table.loc[["downsample", "none"], "hard_accuracy"].isna().all()


def test_the_written_table_has_them_and_says_what_they_are(answered):
    folder, found = answered
    table = write_tables(*collect(folder), folder)
    row = readable(table).set_index("method").loc["rcb"]
    same, lost, gained = count(found, "none", "rcb")
    assert (row["same answer, %"], row["right to wrong, %"]) == (f"{100 * same:.1f}", f"{100 * lost:.1f}")
    assert row["wrong to right, %"] == f"{100 * gained:.1f}"
    text = (folder / "table.md").read_text()
    assert "hard samples, %" in text.splitlines()[0]
    assert "case and spaces apart" in text


def test_without_the_unpruned_run_nothing_is_said(answered):
    folder, _ = answered
    (folder / "none" / "run.json").unlink()
    assert not {"agreement", "hard_accuracy"} & {*summary_table(collect(folder)[0]).columns}


def test_answers_that_are_more_or_less_good_agree_but_do_not_flip(tmp_path):
    for name, scored in (("none", [0.5, 1.0]), ("rcb", [0.25, 1.0])):
        folder = save_run(tmp_path / name, name, ["a dog", "a cat"], ["yes", "no"], keep=8 if name == "rcb" else None)
        path = folder / "samples_rcb_pope.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        changed = [line.replace('"score": 0.0', f'"score": {value}') for line, value in zip(lines, scored, strict=True)]
        path.write_text("".join(changed))
    one, two = (run.scores["rcb_pope"] for run in collect(tmp_path)[0])
    found = agreement(one, two)
    assert (found.samples, found.same, found.judged) == (2, 2, 0)
    table = summary_table(collect(tmp_path)[0]).set_index("method")
    assert table.loc["rcb", "agreement"] == 1
    assert table["right_to_wrong"].isna().all()


def test_runs_over_other_samples_are_not_compared(tmp_path):
    save_run(tmp_path / "one", "none", ["yes"] * 2, ["yes", "no"])
    save_run(tmp_path / "two", "rcb", ["yes"] * 2, ["no", "no"], keep=8)
    one, two = (run.scores["rcb_pope"] for run in collect(tmp_path)[0])
    with pytest.raises(ValueError, match="different samples"):
        agreement(one, two)
