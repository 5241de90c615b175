"""Calibration on benchmarks: scores on disk against those in memory, brute force, kills, processes, held-out images."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
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
from rcb_lmms.calibration import fitting, matching, passes, score_files
from rcb_lmms.calibration.cuts import Chunk, Cut, find_cuts
from rcb_lmms.calibration.matching import Baseline, fit_many, held_out
from rcb_lmms.calibration.passes import Documents, score_documents
from rcb_lmms.calibration.score_files import ImageScores, ScoredImages, ScoreFiles
from rcb_lmms.calibration.tasks import calibrate_tasks
from rcb_lmms.engine.encoding import ImageEncoder
from rcb_lmms.errors import UserError
from rcb_lmms.families import load_family
from rcb_lmms.families.images import Visual
from rcb_lmms.models.questions import Request
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
        out, record = calibrate_tasks(
            pretrained, names, match, out=tmp_path / "thresholds.yaml", task_manager=manager, **options
        )
        written = yaml.safe_load(out.read_text())
        assert written == record
        return written

    return run


@pytest.fixture
def counted(monkeypatch):
    """Keys of the images that went through the tower."""
    seen = []
    views = ImageEncoder.views
    monkeypatch.setattr(
        ImageEncoder, "views", lambda self, visuals: seen.extend(own.key for own in visuals) or views(self, visuals)
    )
    return seen


def visuals_of(shown):
    return [Visual((picture(number),)) for number in shown]


def codebook_for(rows=6, width=8):
    return Codebook(torch.randn(rows, width, generator=torch.Generator().manual_seed(1)), {"id": "x", "model": "x"})


# Order statistics


def random_case(generator):
    """Views with many equal scores, a weight for each image, and the images as chunks of any size."""
    images = generator.integers(1, 9)
    parts = [list(generator.integers(1, 12, generator.integers(1, 4))) for _ in range(images)]
    weights = generator.integers(1, 6, images).astype(float)
    levels = np.array([-0.75, -0.0, 0.0, 1e-30, 0.25, 0.25000003, 0.5, 1.0], dtype=np.float32)
    views = [[generator.choice(levels[: generator.integers(1, 9)], size) for size in own] for own in parts]
    chunks, begin = [], 0
    while begin < images:
        end = begin + generator.integers(1, 4)
        inside = [view for own in views[begin:end] for view in own]
        repeated = np.repeat(weights[begin:end], [len(own) for own in views[begin:end]])
        chunks.append(Chunk(np.concatenate(inside), np.array([len(view) for view in inside]), repeated))
        begin = end
    return [view for own in views for view in own], np.repeat(weights, [len(own) for own in views]), chunks


def test_cuts_found_on_disk_are_those_found_in_memory():
    generator, different = np.random.default_rng(0), set()
    pruner = make_pruner("rcb", codebook=codebook_for())
    for _ in range(60):
        views, weights, chunks = random_case(generator)
        native = float(weights @ [len(view) for view in views] / weights.sum())
        means = [native * share for share in (1e-3, *generator.uniform(0, 1, 3), 1.0)]
        cuts = find_cuts(lambda chunks=chunks: iter(chunks), [mean * weights.sum() for mean in means], 1)
        for mean, cut in zip(means, cuts, strict=True):
            fitted = pruner.fit(views, weights.tolist(), mean)
            assert cut == Cut(fitted.budget.value, fitted.budget.ties)
            counts = np.concatenate([chunk.retained(cut, 1) for chunk in chunks])
            assert counts.tolist() == [fitted.retained(view) for view in views]
            different.add(cut)
    assert len(different) > 50


def test_the_smaller_of_two_equally_near_means_is_taken():
    chunk = Chunk(np.array([0.1, 0.2, 0.3, 0.4], dtype=np.float32), np.array([4]), np.array([1.0]))
    cuts = find_cuts(lambda: iter([chunk]), [2.5, 0.4, 4.0])
    assert [chunk.retained(cut, 0).item() for cut in cuts] == [2, 1, 4]


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


@pytest.mark.parametrize("per", ["view", "image"])
@pytest.mark.parametrize("chunk_tokens", [1 << 20, 40])
def test_scores_on_disk_give_what_scores_in_memory_give(
    calibrated, next_checkpoint, codebook_file, per, chunk_tokens, monkeypatch
):
    monkeypatch.setattr(score_files, "CHUNK_TOKENS", chunk_tokens)
    setting = calibrated(per=per)
    method = make_pruner("rcb", codebook=codebook_file)
    baselines = {name: make_pruner(name, budget=Budget.adaptive()) for name in ("prumerge", "prumerge_plus")}
    shown = {visual.key: visual for own in SHOWN for visual in visuals_of(own)}
    weights = Counter(visual.key for own in SHOWN for visual in visuals_of(own))
    encoder = ImageEncoder(load_family(next_checkpoint), baselines["prumerge"].needs, per=per)
    scores = fitting.score_pass(encoder, {"rcb": method}, baselines, shown.values(), weights)
    data = fitting.data_hash(weights)
    assert setting["benchmarks"]["one"]["data_hash"] == data
    for name, row in setting["benchmarks"]["one"]["baselines"].items():
        if name in baselines:
            assert row["tokens"]["target"] == pytest.approx(scores.baseline(name))
        _, truth = fitting.fit(method, scores, "rcb", row["tokens"]["target"], data)
        assert truth.fitted == {"threshold": row["tokens"]["threshold"], "ties": row["tokens"]["ties"]}
        assert truth.achieved == pytest.approx(row["tokens"]["achieved"])
        assert truth.std == pytest.approx(row["tokens"]["std"])
        assert list(row["tokens"]["quantiles"].values()) == pytest.approx(truth.quantiles)
        assert setting["benchmarks"]["one"]["native"] == pytest.approx(truth.native)


@pytest.fixture
def ask(next_checkpoint, codebook_file, manager):
    """Asks LLaVA-NeXT with RCB every question of a task; returns the record of the fit, and answers with counts."""
    from lmms_eval.api.instance import Instance

    from rcb_lmms.models import entries

    def run(name="one", limit=None, **arguments):
        arguments = {"pretrained": next_checkpoint, "codebook": str(codebook_file), **arguments}
        model = entries.LlavaNextRcb(**arguments)
        task = manager.load_task_or_group(name, task_type="chat")[name]
        model.task_dict = {name: task.dataset}
        given = [("", task.doc_to_messages, {"max_new_tokens": 2}, n, name, "test") for n in range(len(task.eval_docs))]
        answers = model.generate_until(
            [
                Instance(
                    "generate_until", own, 0, doc_id=own[3], metadata={"task": name, "doc_id": own[3], "repeats": 1}
                )
                for own in given[:limit]
            ]
        )
        return model.run, [(answer.text, answer.token_counts) for answer in answers]

    return run


def test_an_entry_meets_the_budget_with_the_threshold_of_the_file(calibrated, ask):
    row = calibrated()["benchmarks"]["one"]["baselines"]["random:4"]["tokens"]
    _, answers = ask(threshold=row["threshold"], preset="paper")
    kept = sum(counts.visual_kept for _, counts in answers)
    assert kept / sum(counts.visual_views for _, counts in answers) == pytest.approx(row["achieved"])


@pytest.mark.parametrize("budget", [{"keep": 4}, {"match": "prumerge"}, {"ratio": 5 / 16}, {"keep": 10.5}])
def test_a_file_of_thresholds_keeps_what_a_calibration_in_the_run_keeps(
    calibrated, ask, budget, tmp_path, monkeypatch, next_checkpoint
):
    calibrated()
    by_itself, expected = ask(**budget)
    monkeypatch.setattr(fitting, "score_pass", lambda *_: pytest.fail("calibrated"))
    copy = shutil.copytree(next_checkpoint, tmp_path / "copy", copy_function=shutil.copyfile)
    run, found = ask(**budget, thresholds=str(tmp_path / "thresholds.yaml"), pretrained=str(copy))
    assert found == expected
    before, after = by_itself.calibrations["one"], run.calibrations["one"]
    assert after["fitted"] == before["fitted"]
    assert after["fitted"]["ties"] > 0
    close = pytest.approx(before["achieved"]), pytest.approx(before["std"]), pytest.approx(before["native"])
    assert (after["achieved"], after["std"], after["native"]) == close
    same = ("target", "quantiles", "views", "questions", "data_hash", "per", "method")
    assert {name: after[name] for name in same} == {name: pytest.approx(before[name], abs=0) for name in same}
    assert run.resolved["thresholds_sha256"]


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
    monkeypatch.setattr(Request, "load", lambda *_: opened.append(1))
    for arguments, words in [
        ({"thresholds": str(tmp_path / "none.yaml")}, "No such file"),
        ({"thresholds": str(tmp_path / "foreign.yaml")}, "something else: KeyError 'setting'"),
        ({"keep": None, "threshold": 0.4}, "a budget that is no mean"),
        ({"variant": "double_softmax"}, "a budget that is no mean"),
        ({"codebook": str(other)}, "codebook_sha256="),
        ({"split": False}, "split=True"),
        ({"per": "image"}, "per=view"),
        ({"dtype": "bfloat16"}, "dtype=torch.float32"),
        ({"name": "one"}, r"for task one(.|\n)*allowed: left"),
        ({"keep": 5}, r"for 5 on left(.|\n)*allowed: random:4 \(4 tokens\)"),
        ({"keep": None, "match": "prumerge"}, "for prumerge:adaptive on left"),
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
    assert "random:4" in matching.for_terminal(apart)


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
    scores = run_pass(load_family(str(checkpoint), max_frames_num=4), codebook_file, items, {})
    views = {image.key: image.views for _, image in scores.images.images}
    assert sorted(views.values()) == [1, 1, 3, 4]
    assert sorted(scores.weights.values()) == [1, 1, 1, 2]
    (fit,) = fit_many(scores.images, [2.0], 1)
    assert abs(fit.achieved - 2) <= 0.5
    with pytest.raises(UserError, match="without CLS token"):
        calibrate_tasks(str(checkpoint), ["one"], "prumerge", codebook=str(codebook_file))


class Rows(list):
    """Documents in memory; a data set has a name."""

    _fingerprint = "rows"


def messages(items):
    from lmms_eval.api.task import ConfigurableMessagesTask

    return ConfigurableMessagesTask._build_user_turn(items, "What?")


def run_pass(family, codebook_file, items, counted):
    method = make_pruner("rcb", codebook=codebook_file)
    needs = frozenset().union(*(own.needs for own in counted.values()))
    encoder = ImageEncoder(family, needs, store_bytes=0)
    return score_documents(encoder, Documents("mixed", Rows(items), messages), method, counted, {})


# Kills, processes, damage


def killed_after(batches, monkeypatch):
    append, done = ScoreFiles.append, []

    def stop(self, *given):
        if len(done) == batches:
            self._handle.write(b"half a score, which a kill left behind")
            raise KeyboardInterrupt
        append(self, *given)
        done.append(1)

    monkeypatch.setattr(ScoreFiles, "append", stop)


@pytest.mark.parametrize("batches", [0, 1])
def test_a_killed_pass_continues_to_the_same_thresholds(calibrated, cache, counted, monkeypatch, tmp_path, batches):
    with monkeypatch.context() as patch:
        killed_after(batches, patch)
        with pytest.raises(KeyboardInterrupt):
            calibrated()
    for file in cache.rglob("documents-0.jsonl"):
        file.write_bytes(file.read_bytes()[:-7])  # a line cut off in its middle
    before = len(counted)
    resumed = calibrated()
    again = len(counted) - before
    monkeypatch.setenv("RCB_CACHE", str(tmp_path / "another"))
    counted.clear()
    assert calibrated() == resumed
    assert (again, len(counted)) == (len(counted) - 8 * batches, 12)  # batches of eight
    counted.clear()
    assert calibrated(match="random:4")["benchmarks"]["one"]["images"] == 12
    assert len(counted) == 12  # PruMerge was not counted now: another pass
    counted.clear()
    calibrated(match="random:7,fastv:rank=2")
    assert counted == []  # a finished pass serves every exact budget


def work(arguments):
    """What each of two processes does."""
    from lmms_eval.tasks import TaskManager

    given = json.loads(arguments)
    manager = TaskManager("ERROR", include_path=given.pop("tasks"), include_defaults=False)
    calibrate_tasks(
        given.pop("pretrained"), ["paper"], MATCH, task_manager=manager, out=Path(given.pop("out")), **given
    )


def test_two_processes_give_the_file_of_one(calibrated, tasks, next_checkpoint, codebook_file, tmp_path):
    one = calibrated(["paper"])
    arguments = {"pretrained": next_checkpoint, "codebook": str(codebook_file), "tasks": str(tasks)}
    arguments["out"] = str(tmp_path / "two.yaml")
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29633", "OMP_NUM_THREADS": "1"}
    shared |= {"RCB_CACHE": str(tmp_path / "cache2"), "PYTHONPATH": str(Path(__file__).parent)}
    command = [
        sys.executable,
        "-c",
        "import sys, test_calibrate; test_calibrate.work(sys.argv[1])",
        json.dumps(arguments),
    ]
    running = [subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank)}) for rank in (0, 1)]
    assert [process.wait(500) for process in running] == [0, 0]
    assert yaml.safe_load((tmp_path / "two.yaml").read_text()) == one
    sizes = [sum(file.stat().st_size for file in (tmp_path / "cache2").rglob(f"scores-{rank}.f32")) for rank in (0, 1)]
    assert min(sizes) > 0.2 * sum(sizes)  # they did share the work


def test_two_programs_cannot_write_one_pass(tmp_path):
    first = ScoreFiles(tmp_path, 0)
    with pytest.raises(UserError, match="running the same pass"):
        ScoreFiles(tmp_path, 0)
    first.close()
    ScoreFiles(tmp_path, 0).close()


def test_documents_that_cannot_be_read_are_counted_and_tried_again(next_checkpoint, codebook_file, cache, tmp_path):
    good, bad = tmp_path / "a.mp4", tmp_path / "b.mp4"
    frames = tmp_path / "frames"
    frames.mkdir()
    for number in range(6):
        tiny.random_image(number, 64, 48).save(frames / f"{number}.png")
    family = load_family(next_checkpoint, max_frames_num=2)
    items = [[picture(0)], [str(bad)], [picture(1)]]
    scores = run_pass(family, codebook_file, items, {})
    assert list(scores.errors) == [1]
    assert "no such file" in scores.errors[1]
    assert len(scores.images.images) == 2
    frames.rename(bad)
    scores = run_pass(family, codebook_file, items, {})
    assert scores.errors == {}
    assert len(scores.images.images) == 4  # two frames more, each image once, though batches are others now
    assert len({image.key for _, image in scores.images.images}) == 4
    with pytest.raises(UserError, match="no such file"):
        run_pass(family, codebook_file, [[str(good)]], {"prumerge": make_pruner("prumerge")})


def test_equal_budgets_need_one_reading_of_the_scores(calibrated, monkeypatch):
    asked = []
    monkeypatch.setattr(
        matching, "find_cuts", lambda chunks, targets, *more: asked.append(targets) or find_cuts(chunks, targets, *more)
    )
    calibrated(match="random:4,fastv:rank=4,prumerge:4")
    assert [len(targets) for targets in asked] == [2, 2]  # 4, and FastV's layer average; the benchmark, then all


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


# Baselines and errors


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prumerge", ("prumerge", None, 0, "tokens")),
        ("prumerge_plus:12.5", ("prumerge_plus", 12.5, 0, "tokens")),
        ("fastv:rank=144", ("fastv", 144, 2, "tokens")),
        ("fastv:144:layer=3", ("fastv", 144, 3, "tokens")),
        ("fastv:layer_average=171", ("fastv", 171, 2, "layer_average")),
        ("random:64", ("random", 64, 0, "tokens")),
    ],
)
def test_baselines_as_they_are_written(text, expected):
    own = Baseline.parse(text)
    assert (own.method, own.tokens, own.layer, own.convention) == expected
    assert (own.pruner is None) == (own.tokens is not None)


@pytest.mark.parametrize(
    "text",
    "sparsevlm random fastv rcb none random:layer=2 fastv:rank=1:layer_average=2 random:many random:0 random:2.5 "
    "fastv:rank= prumerge:inf".split(" "),
)
def test_what_is_no_baseline_is_refused(text):
    with pytest.raises(UserError):
        Baseline.parse(text)


def test_fastv_by_either_convention_is_one_budget(calibrated):
    rows = calibrated(match="fastv:rank=5,fastv:layer_average=10.5,fastv:rank=5:layer=1")["benchmarks"]["one"]
    by_rank, by_average, at_one = rows["baselines"].values()
    assert by_rank == by_average
    assert by_rank["tokens"]["target"] == 5
    assert by_rank["layer_average"]["target"] == 10.5
    assert at_one["layer_average"]["target"] == (16 + 3 * 5) / 4


def test_counting_what_prumerge_retains_merges_nothing(next_checkpoint):
    family = load_family(next_checkpoint)
    needs = make_pruner("prumerge").needs
    views = [view for number in range(6) for view in family.encode([picture(number)], needs)[0]]
    for name in ("prumerge", "prumerge_plus", "random"):
        for budget in (Budget.tokens(5), Budget.adaptive()) if name != "random" else (Budget.tokens(5),):
            pruner = make_pruner(name, budget=budget)
            assert [pruner.count(view) for view in views] == [len(pruner.choose(view)) for view in views]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"match": "random:17"}, "17 retained tokens"),
        ({"match": "fastv:layer_average=5"}, "needs rank"),
        ({"match": "fastv:rank=5:layer=4"}, "layer 4 of 4"),
        ({"match": "sparsevlm"}, "fastv:rank=TOKENS"),
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


def test_tasks_are_loaded_for_the_entry(next_checkpoint, codebook_file, cache, manager, monkeypatch, tmp_path):
    from rcb_lmms import runs

    asked = []
    monkeypatch.setattr(runs, "make_task_manager", lambda entry: asked.append(entry) or manager)
    calibrate_tasks(next_checkpoint, ["left"], "random:4", codebook=str(codebook_file), out=tmp_path / "a.yaml")
    assert asked == ["llava_next_rcb"]


def test_data_that_is_not_there(calibrated, manager, tasks):
    (tasks / "gone.yaml").write_text(TASK.format(name="gone", file=tasks / "gone.parquet"))
    from lmms_eval.tasks import TaskManager

    from rcb_lmms.calibration.tasks import load_benchmarks

    with pytest.raises(UserError, match="the data of task gone"):
        load_benchmarks(["gone"], TaskManager("ERROR", include_path=str(tasks), include_defaults=False))


def test_the_command_needs_images_or_tasks(tmp_path):
    from typer.testing import CliRunner

    from rcb_lmms.cli import app

    for given in ([], ["--images", str(tmp_path), "--tasks", "pope"]):
        result = CliRunner().invoke(app, ["calibrate", "--model", "lab", *given])
        assert isinstance(result.exception, UserError)


def test_reading_ahead_keeps_the_order_and_a_bound():
    started = []
    results = passes.ahead(lambda item: started.append(item) or item * 2, range(20), 2)
    assert [next(results) for _ in range(3)] == [0, 2, 4]
    assert len(started) <= 7
    assert list(results) == [2 * item for item in range(3, 20)]
    assert list(passes.ahead(io.StringIO, [], 2)) == []


def test_memory_is_bounded_by_a_chunk_and_not_by_the_benchmark(tmp_path, monkeypatch):
    import tracemalloc

    monkeypatch.setattr(score_files, "CHUNK_TOKENS", 1 << 14)
    generator, files = np.random.default_rng(0), ScoreFiles(tmp_path, 0)
    for number in range(400):
        image = ImageScores(str(number), (2880,), 2880, 1, {})
        files.append(str(number), [image], [generator.random(2880, dtype=np.float32)])
    found = [image for own in files.finished().values() for image in own]
    images = ScoredImages.of(tmp_path, found, Counter(image.key for image in found), "view")
    tracemalloc.start()
    (fit,) = fit_many(images, [64.0], 1)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    files.close()
    assert fit.achieved == 64.0
    assert peak_bytes < 400 * 2880 * 4  # less than the scores alone, of which sorting makes several copies
