"""Calibration: budgets against brute force, what runs read instead, kills, processes, unreadable images."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_next
import tiny_onevision
import torch
import yaml

from rcb_lmms import Codebook
from rcb_lmms.budget import Budget
from rcb_lmms.calibration import Documents, Target, fit, parse_targets, score_pass
from rcb_lmms.calibration.calibrate import calibrate_images, calibrate_tasks, held_out
from rcb_lmms.calibration.scores import Store
from rcb_lmms.engine.encoding import ImageEncoder
from rcb_lmms.engine.questions import ahead
from rcb_lmms.errors import UserError
from rcb_lmms.families import load_family
from rcb_lmms.families.images import Visual
from rcb_lmms.models.benchmarks import documents_of, load_benchmarks
from rcb_lmms.models.rows import Rows
from rcb_lmms.pruners import make_pruner

# A base view and 2, 2 or 4 tiles of the tiny LLaVA-NeXT.
SIZES = ((112, 56), (56, 112), (112, 112))
# Images of each document: some stand in many questions, some twice in one.
SHOWN = [[0], [0], [1], [2, 3], [0], [4], [5], [6, 6], [7], [8, 0, 2], [9], [], [10], [11], [4]]
MATCH = "prumerge,prumerge_plus,fastv:rank=5,random:4"
TASK = """
task: {name}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visuals
doc_to_text: text
doc_to_target: text
process_results: !function utils.visuals
metric_list: []
"""


def picture(number):
    return tiny.random_image(number, *SIZES[number % 3])


def save_rows(path, rows):
    from datasets import Dataset, Features, Image, List, Value

    features = Features({"images": List(Image()), "text": Value("string")})
    Dataset.from_list(rows, features=features).to_parquet(path)


def rows_of(shown):
    return [{"images": [picture(number) for number in own], "text": f"question {n}"} for n, own in enumerate(shown)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of three tasks and two groups: `one` is alone, `both` is a benchmark of two, `paper` has all."""
    home = tmp_path_factory.mktemp("tasks")
    (home / "utils.py").write_text("def visuals(doc, *rest):\n    return doc['images']\n")
    shares = {"one": SHOWN, "left": SHOWN[:6], "right": SHOWN[6:]}
    for name, shown in shares.items():
        save_rows(home / f"{name}.parquet", rows_of(shown))
        (home / f"{name}.yaml").write_text(TASK.format(name=name, file=home / f"{name}.parquet"))
    (home / "both.yaml").write_text("group: both\ntask: [left, right]\n")
    (home / "paper.yaml").write_text("group: paper\ntask: [one, both]\n")
    return home


@pytest.fixture(scope="module")
def manager(tasks):
    from lmms_eval.tasks import TaskManager

    return TaskManager("ERROR", include_path=str(tasks), include_defaults=False)


@pytest.fixture(scope="module")
def next_checkpoint(tmp_path_factory):
    return str(tiny_next.save_next(tmp_path_factory.mktemp("next")))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RCB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def calibrated(next_checkpoint, codebook_file, manager, cache, tmp_path):
    """Run the calibration; returns what the file holds."""

    def run(names=("one",), match=MATCH, pretrained=next_checkpoint, **options):
        options = {"codebook": str(codebook_file), **options}
        benchmarks = load_benchmarks(names, manager)
        out = tmp_path / "thresholds.yaml"
        calibrate_tasks(pretrained, benchmarks, parse_targets(match), out=out, **options)
        return yaml.safe_load(out.read_text())

    return run


@pytest.fixture
def counted(monkeypatch):
    """Keys of the images that went through the tower."""
    seen = []
    views = ImageEncoder.views
    monkeypatch.setattr(
        ImageEncoder,
        "views",
        lambda self, visuals, *more: seen.extend(own.key for own in visuals) or views(self, visuals, *more),
    )
    return seen


def visuals_of(shown):
    return [Visual((picture(number),)) for number in shown]


# A whole benchmark


@pytest.fixture
def by_hand(next_checkpoint, codebook_file):
    """Per image of the benchmark, once: float64 redundancies of its views, PruMerge's counts, how often it is shown."""
    family = load_family(next_checkpoint)
    prototypes = torch.nn.functional.normalize(Codebook.load(codebook_file).prototypes.double())
    baselines = {name: make_pruner(name, budget=Budget.adaptive()) for name in ("prumerge", "prumerge_plus")}
    weights, found = Counter(), {}
    for shown in SHOWN:
        for visual in visuals_of(shown):
            weights[visual.key] += 1
            if visual.key not in found:
                (views,) = family.encode([visual], baselines["prumerge"].needs)
                tokens = [torch.nn.functional.normalize(view.features.double()) for view in views]
                scores = [(own @ prototypes.T).amax(1).numpy() for own in tokens]
                counts = {name: sum(len(own.choose(view)) for view in views) for name, own in baselines.items()}
                found[visual.key] = (scores, counts)
    return [(scores, counts, weights[key]) for key, (scores, counts) in found.items()]


def test_every_budget_is_met_as_well_as_any_threshold_could(calibrated, by_hand):
    record = calibrated()["benchmarks"]["one"]
    shares = sum(weight * len(scores) for scores, _, weight in by_hand)
    # The least of each view stays in any case, `min_keep` being 1.
    least_first = [([-1.0, *sorted(map(float, view))[1:]], weight) for own, _, weight in by_hand for view in own]
    pooled = sorted((score, weight) for view, weight in least_first for score in view)
    kept = np.cumsum([weight for _, weight in pooled]) / shares
    assert {len(scores) for scores, _, _ in by_hand} == {3, 5}
    assert {weight for *_, weight in by_hand} == {1, 2, 4}
    measured = {
        name: sum(weight * counts[name] for _, counts, weight in by_hand) / shares
        for name in ("prumerge", "prumerge_plus")
    }
    native, layers = 16, 4
    expected = {
        "prumerge": (measured["prumerge"],) * 2,
        "prumerge_plus": (measured["prumerge_plus"],) * 2,
        "fastv:rank=5": (5, (2 * native + (layers - 2) * 5) / layers),
        "random:4": (4, 4),
    }
    assert set(record["baselines"]) == set(expected)
    for name, both in expected.items():
        for convention, target in zip(("tokens", "layer_average"), both, strict=True):
            row = record["baselines"][name][convention]
            assert row["target"] == pytest.approx(target)
            step = int(np.argmin(np.abs(kept - target)))
            # The float32 threshold lies at the last token that stays, and float64 counts agree with what it keeps.
            assert row["threshold"] == pytest.approx(pooled[step][0], abs=1e-6)
            low = [[max(1, (view <= row["threshold"] + 1e-6).sum()) for view in own] for own, _, _ in by_hand]
            mean = sum(weight * sum(own) for own, (_, _, weight) in zip(low, by_hand, strict=True)) / shares
            assert row["achieved"] == pytest.approx(mean)
            assert abs(row["achieved"] - target) <= 0.5
            counts = [count for own in low for count in own]
            assert row["quantiles"] == {q: pytest.approx(np.percentile(counts, q)) for q in (0, 5, 25, 50, 75, 95, 100)}
            repeated = [count for own, (_, _, w) in zip(low, by_hand, strict=True) for count in own for _ in range(w)]
            assert row["std"] == pytest.approx(np.std(repeated))
    assert (record["documents"], record["unreadable"], record["images"]) == (15, 0, len(by_hand))
    assert record["views"] == sum(len(scores) for scores, _, _ in by_hand)
    assert record["views_per_document"] == pytest.approx(shares / 15)


@pytest.fixture
def ask(next_checkpoint, codebook_file, manager):
    """Asks LLaVA-NeXT with RCB every question of a task; returns the record of the run, and answers with counts."""
    from rcb_lmms.models import entries

    def run(name="one", limit=None, known=0, **arguments):
        arguments = {"pretrained": next_checkpoint, "codebook": str(codebook_file), **arguments}
        model = entries.LlavaNextRcb(**arguments)
        task = manager.load_task_or_group(name, task_type="chat")[name]
        model.task_dict = {name: task.dataset}
        task.config.generation_kwargs = {"max_new_tokens": 2}
        task.build_all_requests(limit=limit)
        answers = model.generate_until(task.instances[known:])
        return model.run, [(answer.text, answer.token_counts) for answer in answers]

    return run


def mean_of(answers):
    """Retained tokens per view of the samples that did not fail."""
    counts = [own for _, own in answers if own]
    return sum(own.visual_kept for own in counts) / sum(own.visual_views for own in counts)


def test_an_entry_meets_the_mean_again_with_the_arguments_that_are_printed(calibrated, ask):
    row = calibrated()["benchmarks"]["one"]["baselines"]["random:4"]["tokens"]
    _, answers = ask(threshold=row["threshold"], ties=row["ties"])
    kept = sum(counts.visual_kept for _, counts in answers if counts)
    assert kept / sum(counts.visual_views for _, counts in answers if counts) == pytest.approx(
        row["achieved"], abs=1e-12
    )


@pytest.mark.parametrize(
    ("per", "budget", "name", "convention"),
    [
        ("view", {"keep": 4}, "random:4", "tokens"),
        ("view", {"match": "prumerge"}, "prumerge", "tokens"),
        ("view", {"ratio": 5 / 16}, "fastv:rank=5", "tokens"),
        ("view", {"match": "fastv:rank=5"}, "fastv:rank=5", "tokens"),
        ("view", {"match": "fastv:layer_average=10.5"}, "fastv:layer_average=10.5", "layer_average"),
        ("image", {"keep": 12}, "random:12", "tokens"),
        ("image", {"match": "prumerge"}, "prumerge", "tokens"),
    ],
)
def test_a_run_fits_what_the_command_fits_and_a_file_says_the_same(
    calibrated, ask, per, budget, name, convention, counted, tmp_path, next_checkpoint
):
    row = calibrated(match=f"prumerge,{name}", per=per)["benchmarks"]["one"]["baselines"][name][convention]
    run, expected = ask(**budget, per=per)
    before = run.calibrations["one"]
    assert before["fitted"] == {"threshold": row["threshold"], "ties": row["ties"]}
    assert before["achieved"] == pytest.approx(row["achieved"])
    assert before["std"] == pytest.approx(row["std"])
    assert before["quantiles"] == list(row["quantiles"].values())
    copy = shutil.copytree(next_checkpoint, tmp_path / "copy", copy_function=shutil.copyfile)
    counted.clear()
    run, found = ask(**budget, per=per, thresholds=str(tmp_path / "thresholds.yaml"), pretrained=str(copy))
    assert found == expected
    assert run.resolved["thresholds_sha256"]
    after = run.calibrations["one"]
    assert {**after, "cached": before["cached"]} == {
        key: pytest.approx(value) if isinstance(value, float) else value for key, value in before.items()
    }


def test_a_pass_serves_every_budget_of_a_method(calibrated, ask, counted):
    run, _ = ask(keep=4)
    assert run.calibrations["one"]["cached"] is False
    assert ask(keep=5)[0].calibrations["one"]["cached"] is True
    counted.clear()
    calibrated(match="random:7,fastv:rank=2")
    assert counted == []  # the command finds what the runs have left


def test_a_budget_is_met_over_all_documents_of_the_run_though_some_answers_are_known(ask, cache, monkeypatch, tmp_path):
    """With `--use_cache` the host sends only requests whose answers it does not know."""
    whole, every = ask(keep=4)
    monkeypatch.setenv("RCB_CACHE", str(tmp_path / "another"))
    part, rest = ask(keep=4, known=9)
    assert part.calibrations["one"] == whole.calibrations["one"]
    assert rest == every[9:]
    limited, _ = ask(keep=4, limit=9)
    assert limited.calibrations["one"]["fitted"] != whole.calibrations["one"]["fitted"]
    assert limited.calibrations["one"]["questions"] < whole.calibrations["one"]["questions"]


def test_a_task_of_a_group_has_the_groups_threshold(calibrated, ask, tmp_path):
    record = calibrated(["both"])
    run, _ = ask("left", keep=4, thresholds=str(tmp_path / "thresholds.yaml"))
    row = record["benchmarks"]["both"]["baselines"]["random:4"]["tokens"]
    assert run.calibrations["left"]["fitted"] == {"threshold": row["threshold"], "ties": row["ties"]}


def test_thresholds_that_do_not_fit_are_refused(calibrated, ask, tmp_path, monkeypatch, codebook_file):
    calibrated(["left"], match="random:4")
    file = str(tmp_path / "thresholds.yaml")
    other = tiny.save_codebook(tmp_path / "other.safetensors", rows=7)
    (tmp_path / "foreign.yaml").write_text("benchmarks: {}\n")
    opened = []
    monkeypatch.setattr(Documents, "open", lambda *_: opened.append(1))
    for arguments, words in [
        ({"thresholds": str(tmp_path / "none.yaml")}, "No such file"),
        ({"thresholds": str(tmp_path / "foreign.yaml")}, "setting: Field required"),
        ({"keep": None, "threshold": 0.4}, "a budget that is no mean"),
        ({"variant": "double_softmax"}, "a budget that is no mean"),
        ({"codebook": str(other)}, "codebook_sha256="),
        ({"split": False}, "split=True"),
        ({"per": "image"}, "per=view"),
        ({"dtype": "bfloat16"}, "dtype=torch.float32"),
        ({"name": "one"}, r"for task one(.|\n)*allowed: left"),
        ({"keep": 5}, r"for 5 on left(.|\n)*allowed: random:4 \(4 tokens\)"),
        ({"keep": None, "match": "prumerge"}, "for prumerge on left"),
    ]:
        given = {"name": "left", "keep": 4, "thresholds": file, **arguments}
        with pytest.raises(UserError, match=words):
            ask(**given)
    assert not opened
    monkeypatch.undo()
    monkeypatch.setenv("RCB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="without --limit"):
        ask("left", limit=3, keep=4, thresholds=file)


def test_thresholds_of_other_weights_are_refused(calibrated, ask, tmp_path, next_checkpoint):
    from safetensors.torch import load_file, save_file

    calibrated(match="random:4")
    changed = shutil.copytree(next_checkpoint, tmp_path / "changed")
    weights = load_file(changed / "model.safetensors")
    weights = {name: own * 1.5 if "projector" in name else own for name, own in weights.items()}
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="weights="):
        ask(keep=4, thresholds=str(tmp_path / "thresholds.yaml"), pretrained=str(changed))


def test_benchmarks_of_several_tasks_are_one_and_one_threshold_serves_all(calibrated):
    record = calibrated(["paper"])
    one, both = record["benchmarks"]["one"], record["benchmarks"]["both"]
    assert list(record["benchmarks"]) == ["one", "both"]
    assert list(both["tasks"]) == ["left", "right"]
    # The two tasks together show the same images as often as the one task does.
    assert both["data_hash"] == one["data_hash"]
    assert both["baselines"]["random:4"]["tokens"]["threshold"] == one["baselines"]["random:4"]["tokens"]["threshold"]
    row = record["global"]["random:4"]["tokens"]
    assert row["by_benchmark"] == {"one": pytest.approx(row["achieved"]), "both": pytest.approx(row["achieved"])}
    apart = calibrated(["one", "left"])
    row = apart["global"]["random:4"]["tokens"]
    assert row["achieved"] == pytest.approx(np.mean(list(row["by_benchmark"].values())))  # each counts the same
    assert abs(row["achieved"] - 4) <= 0.5
    assert "both" not in apart["benchmarks"]


def test_videos_and_several_images_on_a_tower_without_cls_token(tmp_path, cache, codebook_file):
    import av

    checkpoint = tiny_onevision.save_onevision(tmp_path / "onevision")
    path = str(tmp_path / "a.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(9):
            container.mux(stream.encode(av.VideoFrame.from_image(tiny.random_image(number, 64, 48))))
        container.mux(stream.encode())
    items = [[path], [picture(0)], [path], [picture(1), picture(2)]]
    scores = run_pass(load_family(str(checkpoint), max_frames_num=4), codebook_file, items)
    assert sorted(image.views for image in scores.images) == [1, 1, 3, 4]
    assert sorted(scores.weights) == [1, 1, 1, 2]
    _, record = fit(make_pruner("rcb", codebook=codebook_file), scores, 2.0)
    assert abs(record.achieved - 2) <= 0.5
    with pytest.raises(UserError, match="without CLS token"):
        calibrate_tasks(str(checkpoint), {}, parse_targets("prumerge"), codebook=str(codebook_file))


class InMemory(list):
    """Documents in memory; a data set has a name."""

    _fingerprint = "rows"


def messages(items):
    from lmms_eval.api.task import ConfigurableMessagesTask

    return ConfigurableMessagesTask._build_user_turn(items, "What?")


def run_pass(family, codebook_file, items, **options):
    documents = documents_of("mixed", Rows(InMemory(items)), messages, range(len(items)))
    encoder = ImageEncoder(family, frozenset(), store_bytes=0)
    return score_pass(encoder, make_pruner("rcb", codebook=codebook_file), {}, documents, **options)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("benchmarks", "left", "baselines", "random:4", "tokens", "ties"), -5),
        (("benchmarks", "left", "baselines", "random:4", "tokens", "ties"), 1.5),
        (("benchmarks", "left", "baselines", "random:4", "tokens", "threshold"), 1.01),
        (("benchmarks", "left", "baselines", "random:4", "tokens", "threshold"), float("nan")),
        (("benchmarks", "left", "baselines", "random:4", "layer_average", "target"), float("inf")),
        (("benchmarks", "left", "baselines", "random:4"), [1, 2]),
        (("benchmarks", "left", "baselines", "random:4", "tokens", "quantiles"), {0: 1.0}),
        (("benchmarks", "left", "baselines", "random:4", "tokens", "surplus"), 1),
        (("benchmarks", "left", "tasks"), "left"),
        (("benchmarks",), []),
        (("setting",), None),
    ],
)
def test_a_damaged_file_of_thresholds_is_refused_by_name(calibrated, ask, tmp_path, place, value):
    record = calibrated(["left"], match="random:4")
    inner = record
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    path = tmp_path / "damaged.yaml"
    path.write_text(yaml.safe_dump(record))
    with pytest.raises(UserError, match=place[-1]) as refusal:
        ask("left", keep=4, thresholds=str(path))
    assert str(path) in refusal.value.wanted
    path.write_text("[" * 5000)
    with pytest.raises(UserError, match="something else"):
        ask("left", keep=4, thresholds=str(path))


# Kills, processes, documents that cannot be read


@pytest.mark.parametrize("batches", [0, 1])
def test_a_killed_pass_continues_to_the_same_thresholds(calibrated, cache, counted, monkeypatch, tmp_path, batches):
    keep, done = Store.keep_batch, []

    def stop(self, *given):
        if len(done) == batches:
            raise KeyboardInterrupt
        keep(self, *given)
        done.append(1)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "keep_batch", stop)
        with pytest.raises(KeyboardInterrupt):
            calibrated()
    before = len(counted)
    resumed = calibrated()
    again = len(counted) - before
    monkeypatch.setenv("RCB_CACHE", str(tmp_path / "another"))
    counted.clear()
    assert calibrated() == resumed
    assert (again, len(counted)) == (len(counted) - 8 * batches, 12)  # batches of eight


def work(arguments):
    """What each of two processes does."""
    from lmms_eval.tasks import TaskManager

    given = json.loads(arguments)
    manager = TaskManager("ERROR", include_path=given.pop("tasks"), include_defaults=False)
    benchmarks = load_benchmarks(["paper"], manager)
    out = Path(given.pop("out"))
    calibrate_tasks(given.pop("pretrained"), benchmarks, parse_targets(MATCH), out=out, **given)


def test_two_processes_give_the_file_of_one(calibrated, tasks, next_checkpoint, codebook_file, tmp_path):
    one = calibrated(["paper"])
    arguments = {"pretrained": next_checkpoint, "codebook": str(codebook_file), "tasks": str(tasks)}
    arguments["out"] = str(tmp_path / "two.yaml")
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": tiny.free_port(), "OMP_NUM_THREADS": "1"}
    shared["PYTHONPATH"] = str(Path(__file__).parent)
    code = "import sys, test_calibrate; test_calibrate.work(sys.argv[1])"
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    caches = [tmp_path / str(rank) for rank in (0, 1)]  # as on machines that share no disk
    running = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank), "RCB_CACHE": str(folder)})
        for rank, folder in enumerate(caches)
    ]
    assert [process.wait(500) for process in running] == [0, 0]
    assert yaml.safe_load((tmp_path / "two.yaml").read_text()) == one
    assert all(len(list(folder.rglob("*.npz"))) for folder in caches)  # they did share the work


@pytest.fixture
def failing(monkeypatch):
    """Lets the first `times` attempts to read each of some documents fail."""

    def make(numbers, times):
        attempts, media = Counter(), Documents.open

        def open_(self, family, number):
            def unstable(family, number):
                attempts[number] += 1
                if number in numbers and attempts[number] <= times:
                    raise OSError("the network is gone")
                return self.media(family, number)

            return media(Documents(self.name, self.numbers, unstable, self.data), family, number)

        monkeypatch.setattr(Documents, "open", open_)

    return make


def test_transient_read_errors_change_nothing(calibrated, ask, failing, monkeypatch, tmp_path):
    expected, (run, answers) = calibrated(), ask(keep=4)
    monkeypatch.setenv("RCB_CACHE", str(tmp_path / "another"))
    failing(range(1, 15, 2), times=1)
    assert calibrated() == expected
    monkeypatch.setenv("RCB_CACHE", str(tmp_path / "third"))
    again, same = ask(keep=4)
    assert (again.calibrations, same, again.failures) == (run.calibrations, answers, [])


def test_errors_that_stay_end_the_command_and_fail_the_samples_of_a_run(
    calibrated, ask, failing, counted, tmp_path, caplog
):
    failing([3, 5], times=2)
    run, answers = ask(keep=4)
    # Both can be read by now, yet the mean was taken without them.
    assert [failure["doc_id"] for failure in run.failures] == [3, 5]
    assert all("the network is gone" in failure["error"] for failure in run.failures)
    record = run.calibrations["one"]
    assert record["unreadable"] == 2
    assert mean_of(answers) == pytest.approx(record["achieved"], abs=1e-12)
    assert "2 of 15 documents cannot be read" in caplog.text
    failing([3, 5], times=2)
    with pytest.raises(UserError, match=r"2 of 15 documents(.|\n)*document 3: OSError: the network is gone"):
        calibrated(match="random:4")
    assert not (tmp_path / "thresholds.yaml").exists()
    assert calibrated(match="random:4")["benchmarks"]["one"]["unreadable"] == 0  # they can be read now
    failing([3, 5], times=100)
    counted.clear()
    allowed = calibrated(["left"], match="random:4", allow_unreadable=True)["benchmarks"]["left"]
    assert (allowed["documents"], allowed["unreadable"]) == (6, 2)


def test_images_that_cannot_be_encoded_or_scored_fail_alone(next_checkpoint, codebook_file, cache, monkeypatch):
    family = load_family(next_checkpoint)
    items = [[picture(0)], [picture(1)], [picture(2), picture(3)], [picture(4)]]
    whole = run_pass(family, codebook_file, items)
    bad = [own.key for own in visuals_of([1, 3])]
    encode = family.encode

    def broken(visuals, *more):
        if any(visual.key == bad[0] for visual in visuals):
            raise ValueError("a malformed tile")
        views = encode(visuals, *more)
        for visual, own in zip(visuals, views, strict=True):
            if visual.key == bad[1]:
                own[0] = replace(own[0], features=own[0].features * float("nan"))
        return views

    monkeypatch.setattr(family, "encode", broken)
    monkeypatch.setenv("RCB_CACHE", str(cache / "other"))
    scores = run_pass(family, codebook_file, items)
    assert list(scores.errors) == [1, 2]
    assert ("a malformed tile" in scores.errors[1], "not finite" in scores.errors[2]) == (True, True)
    assert [image.key for image in scores.images] == [whole.images[0].key, whole.images[4].key]
    monkeypatch.setattr(family, "encode", encode)
    again = run_pass(family, codebook_file, items)  # what failed is tried again
    assert (again.errors, again.data_hash) == ({}, whole.data_hash)
    with pytest.raises(UserError, match=r"(?i)no such file"):
        run_pass(family, codebook_file, [["/nowhere/a.mp4"]])


# Held-out images


def test_the_gap_on_held_out_images(calibrated, by_hand, counted):
    record = calibrated(holdout=0.4)["benchmarks"]["one"]
    weights = Counter(visual.key for own in SHOWN for visual in visuals_of(own))
    apart = held_out(set(weights), 0.4)
    assert (record["held_out_images"], len(apart), record["images"]) == (5, 5, 12)
    rows = dict(zip(weights, by_hand, strict=True))  # both in the order of first appearance
    for part, chosen in (("fitted", set(weights) - apart), ("held", apart)):
        shares = sum(weight * len(scores) for key, (scores, _, weight) in rows.items() if key in chosen)
        for name in ("prumerge", "random:4"):
            row = record["baselines"][name]["tokens"]
            kept = sum(
                weight * sum(max(1, (view <= row["threshold"] + 1e-6).sum()) for view in scores)
                for key, (scores, _, weight) in rows.items()
                if key in chosen
            )
            counts = sum(w * c.get(name, 4 * len(s)) for key, (s, c, w) in rows.items() if key in chosen)
            if part == "fitted":
                assert row["target"] == pytest.approx(counts / shares)
                assert row["achieved"] == pytest.approx(kept / shares)
            else:
                assert row["held_out"] == {
                    "baseline": pytest.approx(counts / shares),
                    "achieved": pytest.approx(kept / shares),
                    "gap": pytest.approx(kept / shares - row["achieved"]),
                    "gap_to_baseline": pytest.approx((kept - counts) / shares),
                }
    assert len(counted) == 12  # both parts come from one pass


def test_held_out_images_depend_on_their_content_alone():
    keys = {f"image {n}" for n in range(50)}
    assert held_out(keys, 0.3) == held_out(set(sorted(keys, reverse=True)), 0.3)
    assert len(held_out(keys, 0.3)) == 15
    assert held_out(keys, 0.1) < held_out(keys, 0.3)
    with pytest.raises(UserError, match="50 different images"):
        held_out(keys, 0.001)


# Targets and errors


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("64", (None, 64, None, None, "tokens")),
        ("10.5", (None, 10.5, None, None, "tokens")),
        ("ratio=0.25", (None, None, 0.25, None, "tokens")),
        ("prumerge", ("prumerge", None, None, None, "tokens")),
        ("prumerge_plus:12.5", ("prumerge_plus", 12.5, None, None, "tokens")),
        ("fastv:rank=144", ("fastv", 144, None, 2, "tokens")),
        ("fastv:144:layer=3", ("fastv", 144, None, 3, "tokens")),
        ("fastv:layer_average=171", ("fastv", 171, None, 2, "layer_average")),
        ("random:64", ("random", 64, None, None, "tokens")),
        ("stride:rank=9", ("stride", 9, None, None, "tokens")),
    ],
)
def test_targets_as_they_are_written(text, expected):
    own = Target.parse(text)
    assert (own.baseline, own.tokens, own.ratio, own.layer, own.convention) == expected
    assert (own.measured is not None) == (text == "prumerge")


@pytest.mark.parametrize(
    "text",
    "sparsevlm random fastv rcb none none:4 random:layer=2 fastv:rank=1:layer_average=2 random:many random:0 "
    "random:2.5 fastv:rank= prumerge:inf nan -3 64:2 ratio=0 ratio=2 ratio=x".split(" "),
)
def test_what_is_no_target_is_refused(text):
    with pytest.raises(UserError):
        Target.parse(text)


def test_fastv_by_either_convention_is_one_budget(calibrated):
    rows = calibrated(match="fastv:rank=5,fastv:layer_average=10.5,fastv:rank=5:layer=1")["benchmarks"]["one"]
    by_rank, by_average, at_one = rows["baselines"].values()
    assert by_rank == by_average
    assert by_rank["tokens"]["target"] == 5
    assert by_rank["layer_average"]["target"] == 10.5
    assert at_one["layer_average"]["target"] == (16 + 3 * 5) / 4


def test_a_baseline_of_several_steps_is_matched_by_name_and_by_what_layers_process():
    class Whole:
        native = 576.0

    both = Target.parse("sparsevlm:64").by_convention(Whole, 32)
    assert both == {"tokens": 64, "layer_average": pytest.approx(82.25)}
    assert Target.parse("visionzip:64").by_convention(Whole, 32) == {"tokens": 64, "layer_average": 64}
    with pytest.raises(UserError, match="no such target"):
        Target.parse("sparsevlm:layer=3:rank=64")


def test_a_floor_above_the_target_is_refused(ask, calibrated, codebook_file, next_checkpoint):
    with pytest.raises(UserError, match=r"a mean of 4 retained tokens(.|\n)*min_keep=9"):
        ask(keep=4, min_keep=9)  # before a model is loaded
    with pytest.raises(UserError, match="min_keep=9"):
        ask(ratio=0.25, min_keep=9)  # four of sixteen, which only the images tell
    run, _ = ask(keep=4, min_keep=4)
    assert run.calibrations["one"]["achieved"] == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"match": "random:17"}, "17 retained tokens"),
        ({"match": "fastv:layer_average=5"}, "needs rank"),
        ({"match": "fastv:rank=5:layer=4"}, "layer 4 of 4"),
        ({"match": "sparsevlm"}, "METHOD:TOKENS"),
        ({"codebook": "nowhere.safetensors"}, "nowhere"),
        ({"names": ("oen",)}, "near: one"),
        ({"holdout": 1.0}, "leave images in both parts"),
        ({"per": "tile"}, "view, image"),
        ({"pack": "loose"}, "flat"),
    ],
)
def test_mistakes_are_told_in_four_lines(calibrated, options, words):
    with pytest.raises(UserError, match=words):
        calibrated(**options)


def test_data_that_is_not_there(tasks):
    from lmms_eval.tasks import TaskManager

    (tasks / "gone.yaml").write_text(TASK.format(name="gone", file=tasks / "gone.parquet"))
    with pytest.raises(UserError, match="the data of task gone"):
        load_benchmarks(["gone"], TaskManager("ERROR", include_path=str(tasks), include_defaults=False))


# The command


@pytest.fixture
def command(monkeypatch, cache, tmp_path):
    from typer.testing import CliRunner

    from rcb_lmms.cli import app

    monkeypatch.chdir(tmp_path)
    return lambda *given: CliRunner().invoke(app, ["calibrate", *map(str, given)])


def test_the_command_needs_images_or_tasks(command, tmp_path):
    for given in ([], ["--images", tmp_path, "--tasks", "pope"]):
        assert isinstance(command("--model", "lab", *given).exception, UserError)


def test_a_task_of_ones_own_is_calibrated_and_the_line_to_copy_is_right(
    command, tasks, next_checkpoint, codebook_file, tmp_path, ask
):
    given = ["--model", next_checkpoint, "--codebook", codebook_file, "--include_path", tasks, "--out", "own.yaml"]
    result = command("--tasks", "one", "--match", "random:4", *given)
    assert result.exit_code == 0, result.exception
    heads = next(line for line in result.stdout.splitlines() if "achieved" in line).split()
    assert heads[-8:] == ["achieved", "std", "p5", "p50", "p95", "threshold", "ties", "gap"]
    line = result.stdout.splitlines()[-1]
    assert line.startswith("next: lmms_eval --model llava_next_rcb --model_args ")
    assert line.endswith(" --tasks one")
    arguments = dict(part.split("=", 1) for part in line.split()[5].split(","))
    assert arguments.pop("pretrained") == next_checkpoint
    run, answers = ask(**arguments)
    row = yaml.safe_load((tmp_path / "own.yaml").read_text())["benchmarks"]["one"]["baselines"]["random:4"]["tokens"]
    assert mean_of(answers) == pytest.approx(row["achieved"], abs=1e-12)
    assert run.calibrations["one"]["achieved"] == row["achieved"]


def test_a_threshold_for_a_folder_of_images_meets_its_mean_exactly(command, next_checkpoint, codebook_file, tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number in range(5):
        picture(number).save(folder / f"{number}.png")
    result = command("--model", next_checkpoint, "--codebook", codebook_file, "--images", folder, "--keep", 5)
    assert result.exit_code == 0, result.exception
    told = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if "percentile" not in line)
    assert told["target"] == "5.00 tokens per view"
    arguments = dict(part.split("=", 1) for part in result.stdout.splitlines()[-1].split()[5].split(","))
    budget = Budget.threshold(float(arguments["threshold"]), int(arguments["ties"]))
    pruner, family = make_pruner("rcb", codebook=codebook_file, budget=budget), load_family(next_checkpoint)
    views = [view for file in sorted(folder.iterdir()) for view in family.encode([family.open(file)])[0]]
    record = calibrate_images(next_checkpoint, sorted(folder.iterdir()), Target.number(5), codebook=str(codebook_file))
    assert sum(len(pruner.choose(view)) for view in views) / len(views) == pytest.approx(record.achieved, abs=1e-12)
    (folder / "5.png").write_bytes(b"no image")
    result = command("--model", next_checkpoint, "--codebook", codebook_file, "--images", folder, "--keep", 5)
    assert "1 of 6 documents" in str(result.exception)


def test_reading_ahead_keeps_the_order_and_a_bound():
    started = []
    results = ahead(lambda item: started.append(item) or item * 2, range(20), 2)
    assert [next(results) for _ in range(3)] == [0, 2, 4]
    assert len(started) <= 7
    assert list(results) == [2 * item for item in range(3, 20)]
    assert list(ahead(str, [], 2)) == []
