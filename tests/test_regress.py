"""`rcb regress`: subsets, kept sets, golden files and what a check finds, on tiny checkpoints and made-up samples."""

from __future__ import annotations

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from datasets import Dataset
from scipy.stats import binom
from typer.testing import CliRunner

from rcb_lmms.budget import Budget
from rcb_lmms.cli import app
from rcb_lmms.engine import session
from rcb_lmms.errors import UserError
from rcb_lmms.families import load_family
from rcb_lmms.models.requests import Request
from rcb_lmms.pruners import make_pruner
from rcb_lmms.pruners.fastv import FastV
from rcb_lmms.pruners.random import RandomPruning
from rcb_lmms.pruners.rcb import RCB
from rcb_lmms.regress import command, observe, subset
from rcb_lmms.regress.compare import compare, flips_p, shift_p
from rcb_lmms.regress.declaration import Declaration, Subset, Tolerance
from rcb_lmms.regress.golden import COUNTS, Golden, Sample
from rcb_lmms.regress.kept import KeptSet, indices, near_the_cut, ranges
from rcb_lmms.resources import data_dir
from rcb_lmms.runs.tasks import make_task_manager, working_directory

ENTRIES = {
    "full": {"entry": "llava_full"},
    "rcb": {"entry": "llava_rcb", "model_args": {"keep": 5}},
    "random": {"entry": "llava_random", "model_args": {"keep": 3, "seed": 1}},
    "fastv": {"entry": "llava_fastv", "model_args": {"keep": 4, "layer": 1}},
}


@pytest.fixture(scope="module")
def manager():
    return make_task_manager()


@pytest.fixture
def declared(checkpoint, codebook_file, pope_tree, tmp_path, monkeypatch):
    """Writes a declaration of the named cases, changed as asked; commands then run in the POPE tree."""
    monkeypatch.setenv("RCB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.chdir(pope_tree)

    def write(*names, size=12, **arguments):
        cases = {name: {"model_args": {}, **ENTRIES[name]} for name in names}
        for name, case in cases.items():
            own = {"codebook": str(codebook_file)} if name == "rcb" else {}
            cases[name] = case | {"model_args": case["model_args"] | own | arguments}
        document = {
            "tasks": {"pope": {"size": size, "strata": "category"}},
            "common": {"pretrained": str(checkpoint), "dtype": "float32", "device": "cpu"},
            "cases": cases,
        }
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(document))
        return path

    return write


def check(path, manager, capsys):
    capsys.readouterr()
    return command.check(path, manager=manager), capsys.readouterr().out


# The whole of it, on a tiny random model


@pytest.fixture
def recorded(declared, manager):
    def record(*names):
        path = declared(*names)
        command.record(path, manager=manager)
        return path

    return record


def test_what_was_recorded_is_found_again(recorded, manager, capsys):
    path = recorded("full", "rcb", "random", "fastv")
    status, text = check(path, manager, capsys)
    assert status == 0
    assert text.count("12 samples, 0 findings") == 4
    assert "regressed: none; not compared: none" in text
    full, rcb, random, fastv = (Golden.read(path.with_suffix("") / f"{name}.jsonl") for name in ENTRIES)
    assert [sample.kept[0].kept for sample in full.samples] == [frozenset(range(16))] * 12
    for golden in (rcb, random, fastv):
        # The ledger of the run that answered and the sets chosen again afterwards must agree.
        assert [len(sample.kept[0].kept) for sample in golden.samples] == [
            sample.counts["visual_kept"] for sample in golden.samples
        ]
    assert rcb.calibrations["pope"]["achieved"] == pytest.approx(
        sum(sample.counts["visual_kept"] for sample in rcb.samples) / 12
    )
    assert len({sample.answer for sample in full.samples}) > 2  # constant answers would prove nothing


def test_each_case_is_asked_in_its_entrys_words(declared, manager, capsys, tmp_path):
    path = declared("full")
    document = yaml.safe_load(path.read_text())
    document["tasks"] = {"rcb_pope": {"size": 6, "strata": "category"}}
    path.write_text(yaml.safe_dump(document))
    manager.model_name = "llava_next_full"  # what the case before left behind
    command.record(path, manager=manager)
    golden = Golden.read(tmp_path / "tiny" / "full.jsonl")
    assert len(golden.samples) == 6
    assert all(sample.question.endswith("Please answer this question with one word.") for sample in golden.samples)


def test_several_images_and_videos_are_held_too(manager, codebook_file, capsys, tmp_path, monkeypatch):
    import task_trees
    import tiny_onevision
    from test_entries import save_video

    monkeypatch.setenv("RCB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.chdir(task_trees.write_all(tmp_path))
    for number in range(2):
        save_video(next(tmp_path.rglob(f"state_change_{number}.mp4")), number)
    common = {"pretrained": str(tiny_onevision.save_onevision(tmp_path / "model")), "device": "cpu"}
    arguments = {"keep": 2, "codebook": str(codebook_file), "max_frames_num": 4}
    document = {
        "tasks": {"rcb_muirbench": {"size": 2, "strata": "task"}, "rcb_mvbench_state_change": {"size": 2}},
        "common": common,
        "cases": {"rcb": {"entry": "llava_onevision_rcb", "model_args": {**arguments, "preset": "paper"}}},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(document))
    command.record(path, manager=manager)
    golden = Golden.read(tmp_path / "tiny" / "rcb.jsonl")
    shown = [(sample.task, [part.native for part in sample.kept]) for sample in golden.samples]
    # Two images of 4 x 4 tokens each, and four frames of 2 x 2.
    assert sorted(shown) == [("rcb_muirbench", [16, 16])] * 2 + [("rcb_mvbench_state_change", [4] * 4)] * 2
    assert set(golden.calibrations) == {"rcb_muirbench", "rcb_mvbench_state_change"}
    assert all(sum(len(part.kept) for part in own.kept) == own.counts["visual_kept"] for own in golden.samples)
    status, text = check(path, manager, capsys)
    assert (status, "4 samples, 0 findings" in text) == (0, True)


def test_kept_sets_are_those_of_eager_attention_and_of_the_seed(recorded, family, pope_tree, checkpoint):
    path = recorded("fastv", "random")
    fastv, random = (Golden.read(path.with_suffix("") / f"{name}.jsonl") for name in ("fastv", "random"))
    eager = load_family(str(checkpoint), attn_implementation="eager")
    pruner = make_pruner("random", budget=Budget.tokens(3), seed=1)
    for sample, drawn in zip(fastv.samples[:4], random.samples[:4], strict=True):
        image = tiny.random_image(sample.question.split("\n")[0].count("?") - 1)
        (view,) = eager.encode([image])[0]
        assert drawn.kept[0].kept == set(pruner.choose(view).kept.tolist())
        prompt = eager.embed(eager.prompt(sample.question), [eager.pack_base(view.features)])
        with torch.no_grad():
            attentions = eager.model(inputs_embeds=prompt.embeds[None], output_attentions=True).attentions
        ((start, stop),) = prompt.spans
        scores = attentions[0][0, :, -1, start:stop].mean(0)
        assert sample.kept[0].kept == set(scores.topk(4).indices.tolist())


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("rcb", {"keep": 6}, "arguments.keep: 5 -> 6"),
        ("random", {"seed": 2}, "arguments.seed: 1 -> 2"),
        ("random", {"dtype": "bfloat16"}, "arguments.dtype: float32 -> bfloat16"),
    ],
)
def test_a_changed_budget_or_seed_is_refused_by_name_before_anything_runs(
    recorded, declared, manager, capsys, monkeypatch, name, arguments, words
):
    path = recorded(name)
    declared(name, **arguments)
    monkeypatch.setattr(command, "observe", None)
    status, text = check(path, manager, capsys)
    assert status == 2
    assert f"NOT COMPARED {name}" in text
    assert words in text


def test_another_subset_codebook_or_checkpoint_is_refused_by_name(recorded, declared, manager, capsys, tmp_path):
    path = recorded("rcb")
    declared("rcb", size=9)
    assert "subsets.pope.size: 12 -> 9" in check(path, manager, capsys)[1]
    other = tiny.save_codebook(tmp_path / "other.safetensors", rows=11)
    declared("rcb", codebook=str(other))
    status, text = check(path, manager, capsys)
    assert (status, "codebook: " in text, "weights: " in text) == (2, True, False)
    heavier = shutil.copytree(yaml.safe_load(path.read_text())["common"]["pretrained"], tmp_path / "heavier")
    (heavier / "generation_config.json").write_text((heavier / "generation_config.json").read_text() + "\n")
    declared("rcb", pretrained=str(heavier))
    status, text = check(path, manager, capsys)
    assert (status, "codebook: " in text, "weights: " in text) == (2, False, True)


def test_behaviour_that_changed_behind_the_same_arguments_is_a_regression(recorded, manager, capsys, monkeypatch):
    path = recorded("random")
    select = RandomPruning.select
    monkeypatch.setattr(RandomPruning, "select", lambda self, *given: select(dataclasses.replace(self, seed=2), *given))
    status, text = check(path, manager, capsys)
    assert status == 1
    assert "REGRESSED random" in text
    assert "kept sets of 12 samples changed" in text
    assert "3 -> 3 kept, no longer kept" in text
    assert "token counts" not in text
    assert "regressed: random" in text


def test_a_changed_default_is_named(recorded, manager, capsys, monkeypatch):
    path = recorded("fastv")
    defaults = tuple("mask" if value == "drop" else value for value in FastV.__init__.__defaults__)
    monkeypatch.setattr(FastV.__init__, "__defaults__", defaults)
    status, text = check(path, manager, capsys)
    assert (status, "resolved argument pruner.mode: drop -> mask" in text) == (1, True)
    assert "kept sets" not in text


def test_no_stored_calibration_hides_a_changed_calibrator(recorded, manager, capsys, monkeypatch):
    path = recorded("rcb")
    fit = RCB.fit
    monkeypatch.setattr(RCB, "fit", lambda self, evidence, weights, target: fit(self, evidence, weights, target + 1))
    status, text = check(path, manager, capsys)
    assert (status, "calibration of pope: threshold" in text, "token counts of" in text) == (1, True, True)


def test_a_mutated_scorer_is_found_though_no_answer_changed(recorded, manager, capsys, monkeypatch):
    path = recorded("full")
    load = observe.load_task

    def mutated(name, manager):
        task = load(name, manager)
        score = task.config.process_results
        task.config.process_results = lambda doc, results: {
            metric: {**value, "score": 1.0 - value["score"]} for metric, value in score(doc, results).items()
        }
        return task

    monkeypatch.setattr(observe, "load_task", mutated)
    status, text = check(path, manager, capsys)
    assert status == 1
    assert "scores of 12 unchanged answers changed" in text
    assert "pope_accuracy: 0.0 -> 1.0" in text
    assert "pope pope_accuracy,none: 0.0 -> 1.0" in text
    assert "answers changed" not in text.replace("unchanged answers changed", "")


def test_changed_data_are_told_apart_from_changed_results(recorded, manager, capsys, tmp_path):
    path = recorded("random")

    def status_in(name, change):
        with working_directory(tiny.save_pope(tmp_path / name, change=change)):
            return check(path, manager, capsys)

    status, text = status_in("reversed", lambda rows: rows[::-1])
    assert (status, "same random" in text) == (0, True)
    status, text = status_in("reworded", lambda rows: [{**row, "question": row["question"] + "!"} for row in rows])
    assert (status, "the data changed: 12 of them are not among 24 documents" in text) == (2, True)
    status, text = status_in("repainted", lambda rows: [{**row, "image": rows[0]["image"]} for row in rows])
    assert (status, "documents have other pixels" in text) == (2, True)


def test_a_killed_check_goes_on_and_leaves_nothing_half(recorded, manager, capsys, monkeypatch, tmp_path):
    path = recorded("random")
    golden = path.with_suffix("") / "random.jsonl"
    before, generate, calls = golden.read_bytes(), session.generate, []

    def killed(*arguments):
        calls.append(len(arguments[1]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*arguments)

    monkeypatch.setattr(session, "generate", killed)
    for run in (command.check, command.record):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            run(path, manager=manager)
        assert golden.read_bytes() == before
        status, _ = check(path, manager, capsys)
        # The second batch was asked again, the first was not; the last is of images that one question asks about.
        assert (status, calls) == (0, [8, 2, 2, 2])
        assert [file.name for file in golden.parent.iterdir()] == ["random.jsonl"]
        assert not list((tmp_path / "cache").rglob("*.jsonl"))


def test_samples_that_fail_or_benchmarks_that_are_not_there_are_no_regression(recorded, manager, capsys, monkeypatch):
    path = recorded("random")

    def unreadable(self, family):
        raise UserError(wanted="read an image", found="noise", allowed="an image", next_step="mend it")

    with monkeypatch.context() as patch:
        patch.setattr(Request, "load", unreadable)
        status, text = check(path, manager, capsys)
    assert (status, "every one failed" in text) == (2, True)

    def absent(*arguments):
        raise FileNotFoundError("no POPE here")

    monkeypatch.setattr("lmms_eval.tasks.get_task_dict", absent)
    status, text = check(path, manager, capsys)
    assert (status, "no POPE here" in text) == (2, True)


# Golden files


def made_up(samples=40, wrong=0, **header):
    """A golden of random questions, of which the first `wrong` were answered wrongly."""
    kept = (KeptSet(8, frozenset({1, 2, 5}), frozenset({5, 6})),)
    counts = dict(zip(COUNTS, (13, 8, 3, 0, 1, 3.0), strict=True))
    rows = [
        Sample(
            task="pope",
            name=f"{number:016x}",
            data="d",
            question=f"Is there a thing {number}?\u2028\x85",
            prompt="p",
            target="yes",
            answer="no" if number < wrong else "yes",
            scores={"accuracy": float(number >= wrong), "f1": float(number >= wrong)},
            counts=counts,
            kept=kept,
        )
        for number in range(samples)
    ]
    accuracy = {"accuracy,none": 1 - wrong / samples}
    own = {"arguments": {"keep": "3"}, "subsets": {}, "made_of": {}, "resolved": {"seed": "0"}, "versions": {}}
    own |= {"calibrations": {"pope": {"target": 3.0, "achieved": 3.0, "threshold": 0.5, "ties": 4}}}
    own |= {"metrics": {"pope": accuracy}}
    return Golden(case="made_up", entry="llava_random", samples=rows, **(own | header))


def changed(golden, number, **values):
    rows = list(golden.samples)
    rows[number] = dataclasses.replace(rows[number], **values)
    return dataclasses.replace(golden, samples=rows)


def test_a_golden_file_is_read_as_it_was_written(tmp_path):
    golden = made_up()
    assert Golden.read(golden.write(tmp_path / "g.jsonl")) == golden


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[: len(text) // 2], "damaged"),
        (lambda text: text.replace('"yes"', '"no"', 1), "digest"),
        (lambda text: text.replace('"keep": "3"', '"keep": "4"'), "digest"),
        (lambda text: "\n".join(text.split("\n")[:-2]), "digest"),
        (lambda text: "", "damaged"),
        (lambda text: '{"doc_id": 1}\n', "another kind"),
        (lambda text: "[1, 2]\n", "another kind"),
        (lambda text: text.replace("regression 1", "regression 2"), "another kind or format"),
        (None, "No such file"),
    ],
)
def test_a_damaged_or_foreign_golden_file_is_refused(tmp_path, damage, words):
    file = made_up().write(tmp_path / "g.jsonl")
    if damage is None:
        file.unlink()
    else:
        file.write_text(damage(file.read_text()))
    with pytest.raises(UserError, match=words):
        Golden.read(file)


@pytest.mark.parametrize(
    ("name", "cases", "sizes"),
    [
        ("lab", 8, {"pope": 24, "mme": 16, "rcb_seed_image": 16}),
        ("lab_next", 4, {"pope": 18, "rcb_nocaps_val": 8}),
        ("lab_onevision", 4, {"rcb_muirbench": 18, "rcb_mvbench_moving_direction": 2, "rcb_mvbench_moving_count": 2}),
    ],
)
def test_the_shipped_golden_files_fit_their_declaration(name, cases, sizes):
    declaration = Declaration.load(data_dir("eval_configs") / "regressions" / f"{name}.yaml")
    assert len(declaration.cases) == cases
    for case in declaration.cases.values():
        golden = Golden.read(case.golden)
        golden.check_declared(case, observe.compared_arguments(case.model_args))
        assert {task: len(golden.names(task)) for task in sizes} == sizes
        assert len(golden.samples) == sum(sizes.values())
        assert case.golden.stat().st_size < 60_000


# Tolerances


def test_flips_within_the_tolerance_pass_and_beyond_fail():
    # At a rate of 1% and 40 questions, three changed answers or more have p = 0.0075; two have 0.0607.
    assert flips_p(3, 40, 0.01) == pytest.approx(binom.sf(2, 40, 0.01)) == pytest.approx(0.00750, abs=1e-5)
    assert flips_p(2, 40, 0.01) == pytest.approx(0.06074, abs=1e-5)
    golden = now = made_up()
    for count in range(1, 4):
        now = changed(now, count, answer="no", scores={"accuracy": 0.0, "f1": 0.0})
        now = dataclasses.replace(now, metrics={"pope": {"accuracy,none": 1 - count / 40}})
        report = compare(golden, now, Tolerance())
        assert bool(report.findings) == (count == 3)
    assert report.findings[0].startswith("3 of 40 answers changed (beyond tolerance: p = 0.0075 at a rate of 0.01")
    assert "wanted 'yes', golden 'yes', now 'no'; the same tokens kept" in report.findings[0]
    assert "Is there a thing 3?" in report.findings[0]
    assert report.notes == ["pope accuracy,none: 1.0 -> 0.925"]
    assert compare(golden, now, Tolerance(flips=0.05)).findings == []


def test_a_shift_of_scores_is_mcnemars_test():
    # Seven losses without a gain: p = 2 / 2^7 = 0.0156; eight: 0.0078. Gains count against losses.
    assert shift_p((1,) * 9, (0,) * 7 + (1, 1)) == pytest.approx(2 / 2**7)
    golden = made_up(wrong=3)
    tolerance = Tolerance(flips=0.9)
    for losses, gains, found in ((7, 0, False), (8, 0, True), (8, 1, False), (11, 1, True)):
        now = golden
        for number in range(losses):
            now = changed(now, 39 - number, answer="no", scores={"accuracy": 0.0, "f1": 0.0})
        for number in range(gains):
            now = changed(now, number, answer="yes", scores={"accuracy": 1.0, "f1": 1.0})
        report = compare(golden, now, tolerance)
        # Both metrics carry the same scores and are tested once.
        assert len(report.findings) == int(found), (losses, gains)
    assert report.findings[0].startswith("pope accuracy: mean 0.9250 -> 0.6750 over 40 samples (p = 0.0063")


def test_graded_scores_are_tested_by_permutation():
    # All six differences have one sign: of 64 ways to sign them the two extreme ones, p = 2 / 64.
    before = (0.5, 0.25, 0.75, 1.0, 0.5, 0.5)
    assert shift_p(before, tuple(score - 0.125 for score in before)) == pytest.approx(2 / 64)


def test_tokens_near_the_cut_may_flip_and_no_others():
    golden = made_up()
    counts = golden.samples[0].counts

    def report(kept, **moved):
        # A run in which everything is near the cut (scores that became constant, say) excuses nothing by that.
        own = (KeptSet(8, frozenset(kept), frozenset(range(8))),)
        return compare(golden, changed(golden, 0, kept=own, counts=counts | moved), Tolerance())

    near = report({1, 2, 6})
    assert near.findings == []
    assert near.notes == ["2 tokens within rounding of the cut were decided the other way"]
    fewer = report({1, 2}, visual_kept=2, input_tokens=12, visual_layer_average=2.0)
    assert fewer.findings == []
    (found,) = report({1, 3, 5}).findings
    assert "no longer kept 2, newly kept 3" in found
    (found,) = report({1, 2}, visual_kept=2, input_tokens=11).findings
    assert "input_tokens 13 -> 11" in found
    (found,) = report({1, 2, 5}, visual_kept=4).findings
    assert "visual_kept 3 -> 4" in found
    (found,) = report({1, 2, 5}, visual_views=2).findings
    assert "visual_views 1 -> 2" in found


def test_thresholds_metrics_and_prompts_are_held():
    golden = made_up()
    calibration = golden.calibrations["pope"]

    def findings(**values):
        return compare(golden, dataclasses.replace(golden, **values), Tolerance()).findings

    assert findings(calibrations={"pope": calibration | {"threshold": 0.500009}}) == []
    assert findings(calibrations={"pope": calibration | {"threshold": 0.50002}}) == [
        "calibration of pope: threshold 0.5 -> 0.50002"
    ]
    assert findings(calibrations={}) != []
    assert findings(metrics={"pope": {"accuracy,none": 0.999}}) == ["pope accuracy,none: 1.0 -> 0.999"]
    assert findings(resolved={"seed": "1"}) == ["resolved argument seed: 0 -> 1"]
    assert findings(resolved={"seed": "0", "new": "x"}) == []
    (found,) = compare(golden, changed(golden, 3, prompt="q", question="What?"), Tolerance()).findings
    assert "now 'What?'" in found


# Parts


@pytest.mark.parametrize(("numbers", "text"), [(set(), ""), ({4}, "4"), ({0, 1, 2, 5, 9, 8}, "0-2 5 8-9")])
def test_ranges_are_read_as_they_were_written(numbers, text):
    assert ranges(numbers) == text
    assert indices(text) == numbers


def test_near_the_cut_by_hand():
    scores = torch.tensor([0.9, 0.5, 0.49995, 0.4, 0.49991, 0.3])
    # Kept down to 0.5; the highest dropped is 0.49995, and 2e-4 of these is 1e-4: both, and 0.49991, are near.
    assert near_the_cut(scores, torch.tensor([0, 1])) == {1, 2, 4}
    # Far from each other: none.
    assert near_the_cut(scores, torch.tensor([0])) == frozenset()
    # A threshold on a cosine counts absolutely, and whatever was kept.
    cosines = -torch.tensor([0.5, 0.500009, 0.50002, 0.499992, 0.1])
    assert near_the_cut(cosines, torch.tensor([0, 3, 4]), threshold=-0.5) == {0, 1, 3}
    # What the scores do not decide has no cut.
    assert near_the_cut(scores, torch.tensor([0, 3])) == frozenset()
    assert near_the_cut(torch.ones(4), torch.tensor([0, 2])) == frozenset()
    assert near_the_cut(scores, torch.arange(6)) == frozenset()


def rows(count=12):
    kinds = ("a", "a", "a", "b")
    return {
        f"{(number * 7919) % 9973:04d}": {"category": kinds[number % 4], "pair": number // 2} for number in range(count)
    }


def test_a_subset_is_even_over_strata_and_ignores_the_order():
    docs = rows(40)
    chosen = subset.choose(docs, Subset(size=12, strata="category"))
    assert sorted(docs[name]["category"] for name in chosen) == ["a"] * 6 + ["b"] * 6
    backwards = dict(reversed(docs.items()))
    assert subset.choose(backwards, Subset(size=12, strata="category")) == chosen
    assert subset.choose(docs, Subset(size=8, strata="category")) == chosen[:8]
    # Without what one stratum lacks, the others fill up.
    assert len(subset.choose(docs, Subset(size=25, strata="category"))) == 25
    assert sorted(subset.choose(docs, Subset(size=5))) == sorted(docs)[:5]


def test_documents_that_belong_together_are_chosen_together():
    docs = {name: doc | {"category": "x"} for name, doc in rows(40).items()}
    chosen = subset.choose(docs, Subset(size=10, together="pair"))
    pairs = [docs[name]["pair"] for name in chosen]
    assert len(chosen) == 10
    assert pairs[::2] == pairs[1::2]
    for wrong, words in ((Subset(size=41), "40 documents"), (Subset(size=2, strata="colour"), "no column colour")):
        with pytest.raises(UserError, match=words):
            subset.choose(docs, wrong)


def test_equal_documents_have_names_of_their_own():
    docs = Dataset.from_list([{"q": "a", "n": [1]}, {"q": "b", "n": []}, {"q": "a", "n": [1]}])
    task = SimpleNamespace(dataset_no_image={"test": docs}, config=SimpleNamespace(test_split="test"))
    names = list(subset.documents(task))
    assert len(set(names)) == 3
    assert names[2] == f"{names[0]}+1"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"case": {}}, "case"),
        ({"cases": {"a": {"entry": "llava_full", "task": ["pope"]}}}, "task"),
        ({"cases": {"a": {"entry": "llava_full", "tasks": ["mme"]}}}, "case a with mme"),
        ({"cases": {"a": {}}}, "no cases.a.entry"),
        ({"tasks": {"pope": 12}}, "12"),
        ({"tolerance": {"beta": 1}}, "beta"),
    ],
)
def test_a_declaration_with_mistakes_is_refused_by_name(tmp_path, change, words):
    path = tmp_path / "d.yaml"
    document = {"tasks": {"pope": {"size": 3}}, "cases": {"a": {"entry": "llava_full"}}}
    path.write_text(json.dumps(document))
    declaration = Declaration.load(path)
    assert declaration.cases["a"].golden == tmp_path / "d" / "a.jsonl"
    with pytest.raises(UserError, match="case b"):
        declaration.chosen(["b"])
    path.write_text(json.dumps(document | change))
    with pytest.raises(UserError, match=words):
        Declaration.load(path)
    path.write_text("{")
    with pytest.raises(UserError, match="flow"):
        Declaration.load(path)
    with pytest.raises(UserError, match="no such file"):
        Declaration.load(tmp_path / "none.yaml")


def test_entries_and_tasks_that_do_not_exist_are_refused(manager, declared, capsys):
    path = declared("full")
    document = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(document | {"cases": {"a": {"entry": "llava_fulll"}}}))
    with pytest.raises(UserError, match="llava_full, llava"):
        command.record(path, manager=manager)
    for task, words in (("popee", "no such task"), ("pope_full", "a group")):
        with pytest.raises(UserError, match=words):
            subset.load_task(task, manager)


@pytest.mark.parametrize("status", [0, 1, 2])
def test_the_command_leaves_with_the_status_of_the_check(monkeypatch, status):
    asked = []
    monkeypatch.setattr(command, "check", lambda path, names: asked.append((path, names)) or status)
    done = CliRunner().invoke(app, ["regress", "check", "--case", "a", "--case", "b"])
    assert done.exit_code == status
    assert asked == [((data_dir("eval_configs") / "regressions" / "lab.yaml").resolve(), ["a", "b"])]
