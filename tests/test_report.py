"""Stored runs as tables, plots and pictures, on synthetic run folders; then the whole of `rcb quickstart`, tiny."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import tiny_next
import tiny_onevision
import torch
from PIL import Image
from stored import edit, save_folder
from transformers import CLIPImageProcessorPil

from rcb_lmms.budget import Budget
from rcb_lmms.engine.questions import Question
from rcb_lmms.engine.session import Session
from rcb_lmms.errors import UserError
from rcb_lmms.families import load_family, places
from rcb_lmms.families.images import Visual, central_square_region, pad_to_square
from rcb_lmms.files import answers_hash
from rcb_lmms.pruners import make_pruner
from rcb_lmms.report import drawing, pictures, statistics
from rcb_lmms.report.collect import Measured, collect
from rcb_lmms.report.field import beside_published, field_data, readable_published
from rcb_lmms.report.flips import run_label
from rcb_lmms.report.plots import accuracy_plot
from rcb_lmms.report.reading import Run
from rcb_lmms.report.sheets import kept_of
from rcb_lmms.report.summary import comparison_table, group, summary_table
from rcb_lmms.report.tables import for_terminal, readable, write_tables
from rcb_lmms.runs.configs import read_configs
from rcb_lmms.runs.quickstart import quickstart

NATIVE = 144


def write_run(
    folder: Path,
    method: str,
    correct: dict[str, list[int]],
    *,
    keep: int | None = None,
    seed: int | None = None,
    retained: float | None = None,
    calibrated: bool = False,
    perception: float = 1000.0,
    tag: str = "image",
    **record,
) -> Path:
    """A run folder as `run_evaluation` leaves it; `correct` holds 0 or 1 per sample, two samples per image."""
    arguments = {"pretrained": "lab"} | ({"keep": str(keep)} if keep else {}) | ({"seed": str(seed)} if seed else {})
    kept = retained or keep or NATIVE
    achieved = {
        task: {
            "samples": len(values),
            "native_visual_tokens": float(NATIVE),
            "retained_visual_tokens": kept,
            "layer_average_visual_tokens": kept + 1.0,
            "prefill_tflops": 0.001 * kept,
            "method_tflops": 1e-5 * kept,
        }
        for task, values in correct.items()
    }
    content = {
        "model": f"llava_{'full' if method == 'none' else method}",
        "arguments": arguments,
        "resolved": {"family": "llava", "pruner": {"budget": f"tokens={keep}" if keep and not calibrated else "None"}},
        "calibrations": {task: {"target": float(keep)} for task in correct} if calibrated else {},
        "achieved": achieved,
        "totals": {
            "questions_per_second": 100.0 / kept,
            "questions": 20,
            "seconds_processor": 0.1 * kept,
            "seconds_choose": 0.002 * kept,
        },
    }
    samples = {
        task: [_sample(task, number, value, f"{tag}{number // 2}") for number, value in enumerate(values)]
        for task, values in correct.items()
    }
    results = {task: {"mme_perception_score,none": perception} if task == "mme" else {} for task in correct}
    return save_folder(folder, samples, results={"results": results}, **content | record)


def _sample(task: str, number: int, value: int, image: str) -> dict:
    score = {"question_id": image, "score": float(value)}
    metric = {"pope": "pope_accuracy", "mme": ("mme_perception_score", "mme_cognition_score")[number % 2]}[task]
    doc = {"question_id": image, "image_source": image, "question": f"{task} {number}?"}
    row = {"doc_id": number, "target": "yes", "doc": doc, "filtered_resps": [image], "token_counts": [{}]}
    return {**row, metric: score}


def answers(share: float, count: int = 200, seed: int = 0) -> list[int]:
    """Exactly `share` of `count` right answers, at places that depend on the seed."""
    values = np.zeros(count, int)
    values[np.random.default_rng(seed).permutation(count)[: round(share * count)]] = 1
    return values.tolist()


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Unpruned, RCB, PruMerge (POPE only), and random with two seeds, at a budget of 36 tokens."""
    monkeypatch.setattr(statistics, "RESAMPLES", 999)
    both = {"pope": answers(0.9), "mme": answers(0.8)}
    write_run(tmp_path / "full", "none", both, perception=1600)
    write_run(
        tmp_path / "rcb",
        "rcb",
        {"pope": answers(0.81), "mme": answers(0.7, seed=1)},
        keep=36,
        retained=35.75,
        calibrated=True,
        perception=1200,
    )
    write_run(tmp_path / "prumerge", "prumerge", {"pope": answers(0.7, seed=2)}, keep=36)
    for seed, share in ((42, 0.60), (7, 0.64)):
        task_answers = {"pope": answers(share, seed=seed), "mme": answers(0.5, seed=seed)}
        write_run(tmp_path / f"random{seed}", "random", task_answers, keep=36, seed=seed, perception=800)
    return tmp_path


# Collecting


def test_a_whole_run_is_read_in_the_order_of_its_documents(results):
    runs, excluded = collect(results)
    assert [run.path.name for run in runs] == ["full", "prumerge", "random42", "random7", "rcb"]
    assert excluded == []
    rcb = runs[-1]
    assert rcb.scores["pope"].values.tolist() == answers(0.81)
    assert rcb.scores["mme"].clusters[:4].tolist() == ["image0", "image0", "image1", "image1"]
    assert (rcb.method, rcb.target, rcb.official) == ("rcb", 36.0, {"mme": 1200})
    assert (runs[0].method, runs[0].target) == ("none", None)


DAMAGES = {
    "not finished": edit("run.json", lambda text: text.replace('"success"', '"started"')),
    "failed: 0 failed samples": edit("run.json", lambda text: text.replace('"success"', '"failed"')),
    "limited to the first 8": edit("run.json", lambda text: text.replace('"limit": null', '"limit": 8')),
    "run.json is damaged": edit("run.json", lambda text: text[:50]),
    "run.json is damaged: status: Field required": edit("run.json", lambda text: '{"model": "llava_hf"}'),
    "run.json is damaged: totals: Field required": edit("run.json", lambda text: text.replace('"totals"', '"other"')),
    "no run.json": lambda folder: (folder / "run.json").unlink(),
    "no results.json": lambda folder: (folder / "results.json").unlink(),
    "results.json is damaged": edit("results.json", lambda text: text[:30]),
    "has 0 of 200 samples": lambda folder: (folder / "samples_pope.jsonl").unlink(),
    "has 199 of 200 samples": edit("samples_pope.jsonl", lambda text: text[:-20]),
    "has 200 of 200 samples": edit("samples_pope.jsonl", lambda text: text.replace('"doc_id": 7,', '"doc_id": 8,')),
    "not every sample of pope has a score of its own": edit(
        "samples_pope.jsonl", lambda text: text.replace("pope_accuracy", "accuracy")
    ),
    "samples_gqa.jsonl or results.json is damaged: KeyError 'gqa'": edit(
        "run.json", lambda text: text.replace('["pope"', '["gqa"')
    ),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_an_unusable_run_is_left_out_by_name_and_the_others_stay(results, reason):
    DAMAGES[reason](results / "rcb")
    runs, excluded = collect(results)
    assert "rcb" not in [run.path.name for run in runs]
    assert len(runs) == 4
    (left_out,) = excluded
    assert left_out.path.name == "rcb"
    assert reason in left_out.reason


WRONG = (None, True, 3, "text", [1], {"a": 1}, [[]], {"pope": None}, {"pope": [1]})


@pytest.mark.parametrize("name", ["run.json", "results.json", "samples_pope.jsonl"])
def test_values_of_every_wrong_type_leave_a_run_out_or_change_nothing(results, name):
    path = results / "rcb" / name
    text = path.read_text()
    first = json.loads(text.splitlines()[0] if name.startswith("samples") else text)
    expected = [run.path.name for run in collect(results)[0]]
    for key, value in [(key, value) for key in [None, *first] for value in WRONG]:
        changed = value if key is None else {**first, key: value}
        path.write_text("\n".join([json.dumps(changed), *text.splitlines()[1:] * name.startswith("samples")]) + "\n")
        runs, excluded = collect(results)
        names = [run.path.name for run in runs]
        assert names == (expected if not excluded else [other for other in expected if other != "rcb"])
        # Other documents are refused, with the names of both runs.
        with contextlib.suppress(UserError) if key in ("doc", "target") else contextlib.nullcontext():
            write_tables(runs, excluded, results / "out")


def write_host_results(folder: Path, time: str, model: str, task: str, scores: list[float], **content) -> Path:
    """What `lmms_eval --output_path --log_samples` leaves of a task that scores by `exact_match`."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        "results": {task: {"alias": task, "exact_match,none": sum(scores) / len(scores), "f1,none": 0.3}},
        "group_subtasks": {task: []},
        "n-samples": {task: {"original": len(scores), "effective": len(scores)}},
        "config": {"model": model, "model_args": "pretrained=a/b,device_map=auto", "limit": None},
    }
    rows = [
        {"doc_id": n, "target": "x", "input": f"{n}?", "filtered_resps": "x", "exact_match": score}
        for n, score in enumerate(scores)
    ]
    file = folder / f"20261101_{time}_results.json"
    file.write_text(json.dumps(results | content))
    (folder / f"20261101_{time}_samples_{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_results_of_lmms_eval_share_a_table_whatever_their_task_and_model(tmp_path):
    scores = [1.0, 0.0, 1.0, 1.0]
    noted = {
        "model": "llava_random",
        "arguments": {"pretrained": "a/b", "keep": "36", "device": "None"},
        "resolved": {"family": "llava", "pruner": {"budget": "tokens=36"}},
        "calibrations": {},
        "achieved": {"own": {"retained_visual_tokens": 36.0, "layer_average_visual_tokens": 36.0}},
        "totals": {"questions_per_second": 2.0},
    }
    write_host_results(tmp_path / "b", "120000", "llava_hf", "own", scores)
    write_host_results(tmp_path / "b", "130000", "llava_random", "own", [0.0, 0.0, 1.0, 0.0], rcb=noted)
    (tmp_path / "b" / "submissions").mkdir()
    (tmp_path / "b" / "submissions" / "own_results.json").write_text("{}")
    runs, excluded = collect(tmp_path)
    assert excluded == []
    table = summary_table(runs).set_index("method")
    assert table["own_accuracy"].to_dict() == {"llava_hf": 0.75, "random": 0.25}
    assert (table.loc["random", "retained_tokens"], table.loc["random", "target_tokens"]) == (36, 36)
    assert pd.isna(table.loc["llava_hf", "retained_tokens"])
    lines = for_terminal(summary_table(runs))
    assert "own" in lines
    assert "exact_match" in lines
    assert accuracy_plot(summary_table(runs), tmp_path / "plot")[0].stat().st_size > 5000


def test_a_number_that_is_no_mean_of_samples_is_not_called_by_its_name(tmp_path):
    scores = [1.0, 0.0, 1.0, 1.0]
    own = {"own": {"alias": "own", "exact_match,none": 0.2}}
    write_host_results(tmp_path, "120000", "llava_hf", "own", scores, results=own)
    ((run,), _) = collect(tmp_path)
    assert run.benchmarks["own"].label == "own exact_match, mean of samples,"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"config": {"model": "x", "model_args": "", "limit": 8}}, "limited to the first 8"),
        ({"rcb": {"failures": [{}]}}, "1 failed samples"),
        ({"config": None}, "no results of a run"),
        ({"rcb": {"achieved": [1]}}, "achieved"),
        ({"group_subtasks": [1]}, "group_subtasks"),
    ],
)
def test_partial_and_damaged_results_of_lmms_eval_are_left_out(tmp_path, changes, reason):
    write_host_results(tmp_path, "120000", "llava_hf", "own", [1.0, 0.0])
    write_host_results(tmp_path, "130000", "llava_hf", "own", [1.0, 0.0], **changes)
    ((run,), (excluded,)) = collect(tmp_path)
    assert run.path.name == "20261101_120000_results.json"
    assert reason in excluded.reason


def test_answers_with_control_characters_shift_no_sample(results):
    path = results / "rcb" / "samples_pope.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["filtered_resps"] = ["\x00\x1b[2J\r\n\x0b\x85\u2028\u2029\ufffd"]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    expected = {run.path.name: run for run in collect(results)[0]}["rcb"].scores["pope"].values
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = (run for run in collect(results)[0] if run.path.name == "rcb")
    assert found.scores["pope"].values.tolist() == expected.tolist()
    assert len(expected) == 200


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match="no folder with a run record"):
        collect(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        collect(tmp_path / "absent")


# Statistics


def test_interval_of_clustered_answers_is_the_normal_one_with_clustered_standard_error():
    random = np.random.default_rng(3)
    chance = random.beta(1, 1, 400)  # images differ in difficulty, so their questions hang together
    clusters = np.repeat(np.arange(400), 5)
    values = (random.random(2000) < chance[clusters]).astype(float)
    mean, low, high = statistics.accuracy_interval(values, clusters)
    per_image = values.reshape(400, 5).mean(1)
    half = 1.96 * per_image.std(ddof=1) / 20
    assert mean == values.mean()
    assert low == pytest.approx(mean - half, abs=0.05 * half)
    assert high == pytest.approx(mean + half, abs=0.05 * half)
    independent = 1.96 * math.sqrt(mean * (1 - mean) / 2000)
    assert (high - low) / 2 > 1.4 * independent


def test_interval_of_unequal_clusters_is_that_of_a_ratio():
    random = np.random.default_rng(4)
    sizes = random.integers(1, 8, 300)
    clusters = np.repeat(np.arange(300), sizes)
    values = (random.random(len(clusters)) < 0.7).astype(float)
    mean, low, high = statistics.accuracy_interval(values, clusters)
    sums = np.array([values[clusters == number].sum() for number in range(300)])
    half = 1.96 * math.sqrt(np.sum((sums - mean * sizes) ** 2)) / sizes.sum()
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)


def test_interval_of_faultless_answers_counts_images_not_questions():
    clusters = np.repeat(np.arange(10), 4)
    assert statistics.accuracy_interval(np.ones(40), clusters) == (1, pytest.approx(0.025**0.1), 1)
    assert statistics.accuracy_interval(np.zeros(40), clusters) == (0, 0, pytest.approx(1 - 0.025**0.1))
    assert statistics.mean_interval(np.zeros(40), clusters) == (0, 0, 0)


def test_mcnemar_is_the_sum_of_binomial_terms():
    first = np.array([1] * 12 + [0] * 4 + [1] * 30)
    second = np.array([0] * 12 + [1] * 4 + [1] * 30)
    tail = sum(math.comb(16, count) for count in range(5)) / 2**16
    assert statistics.mcnemar(first, second) == pytest.approx(2 * tail)
    assert statistics.mcnemar(first, first) == 1
    with pytest.raises(ValueError, match="scores of 0 and 1"):
        statistics.mcnemar(first / 2, second)


def test_permutation_p_equals_all_swaps_of_whole_images():
    random = np.random.default_rng(5)
    clusters = np.repeat(np.arange(8), 3)
    first, second = random.integers(0, 2, 24) * 1.0, random.random(24)
    differences = [first[clusters == number].sum() - second[clusters == number].sum() for number in range(8)]
    swapped = [np.dot(signs, differences) for signs in itertools.product((1, -1), repeat=8)]
    extreme = np.mean(np.abs(swapped) >= abs(sum(differences)) - 1e-9)
    assert 0.01 < extreme < 0.99
    assert statistics.paired_p([(first, second, clusters)]) == pytest.approx(extreme)


def test_permutation_p_weighs_tasks_not_questions():
    # Twelve images with one question for, one task of twelve images with ten questions against, equally strong.
    one, many = np.arange(12), np.repeat(np.arange(12), 10)
    pairs = [(np.ones(12), np.zeros(12), one), (np.zeros(120), np.ones(120), many)]
    assert statistics.paired_p(pairs) == 1
    assert statistics.paired_p(pairs[:1]) == pytest.approx(2 / 2**12)


def test_permutation_p_is_rarely_small_without_a_difference(monkeypatch):
    random = np.random.default_rng(6)
    clusters = np.repeat(np.arange(60), 4)
    small = 0
    monkeypatch.setattr(statistics, "RESAMPLES", 999)
    for _ in range(60):
        chance = random.random(60)[clusters]
        first, second = (random.random((2, 240)) < chance).astype(float)
        small += statistics.paired_p([(first, second, clusters)]) < 0.05
    assert small <= 8  # 3 are expected; 9 or more have a chance of 0.2%


# Tables


def test_summary_has_the_numbers_of_the_runs(results):
    table = summary_table(collect(results)[0])
    assert table["method"].tolist() == ["none", "rcb", "prumerge", "random"]
    full, rcb, prumerge, random = (row for _, row in table.iterrows())
    assert rcb["pope_accuracy"] == pytest.approx(0.81)
    assert rcb["mme_score"] == 1200
    assert (rcb["target_tokens"], rcb["retained_tokens"], rcb["layer_average_tokens"]) == (36, 35.75, 36.75)
    assert rcb["relative"] == pytest.approx(100 * (0.81 / 0.9 + 1200 / 1600) / 2)
    assert full["relative"] == 100
    assert random["seeds"] == 2
    assert random["pope_accuracy"] == pytest.approx(0.62)
    assert random["pope_std"] == pytest.approx(np.std([0.6, 0.64], ddof=1))
    assert rcb["questions_per_second"] == pytest.approx(100 / 35.75)
    assert random["prefill_tflops"] == pytest.approx(0.036)
    assert random["method_tflops"] == pytest.approx(36e-5)
    assert random["processor_seconds"] == pytest.approx(0.1 * 36 / 20)
    assert readable(table)["choosing ms"].tolist()[3] == "3.60"
    assert readable(table)["method GFLOPs"].tolist()[1:3] == ["0.358", "0.36"]
    # A method without one of the tasks has no average over them.
    assert prumerge[["mme_accuracy", "mme_score", "relative", "p_vs_random"]].isna().all()
    assert full[["target_tokens", "p_vs_random"]].isna().all()


def test_the_test_against_random_pools_its_seeds_sample_by_sample(results):
    table = summary_table(collect(results)[0]).set_index("method")
    clusters = np.repeat(np.arange(100), 2)
    pope = np.mean([answers(0.60, seed=42), answers(0.64, seed=7)], axis=0)
    mme = np.mean([answers(0.5, seed=42), answers(0.5, seed=7)], axis=0)
    pairs = [(np.array(answers(0.81)), pope, clusters), (np.array(answers(0.7, seed=1)), mme, clusters)]
    assert table.loc["rcb", "p_vs_random"] == pytest.approx(statistics.paired_p(pairs), abs=1e-3)
    comparisons = comparison_table(collect(results)[0]).set_index(["method", "task"])
    assert comparisons.index.tolist() == [("rcb", "pope"), ("rcb", "mme"), ("prumerge", "pope")]
    row = comparisons.loc[("rcb", "pope")]
    assert row["difference"] == pytest.approx(0.81 - 0.62)
    assert row["low"] < row["difference"] < row["high"]
    assert row["mcnemar_p"] == max(
        statistics.mcnemar(np.array(answers(0.81)), np.array(answers(share, seed=seed)))
        for seed, share in ((42, 0.60), (7, 0.64))
    )


def test_tables_are_written_with_blanks_for_what_is_missing(results):
    table = write_tables(*collect(results), results / "report")
    pd.testing.assert_frame_equal(
        pd.read_csv(results / "report" / "table.csv")[["pope_accuracy", "relative", "p_vs_random"]],
        table[["pope_accuracy", "relative", "p_vs_random"]].astype(float),
    )
    lines = (results / "report" / "table.md").read_text().splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:6]}
    heading = [cell.strip() for cell in lines[0].split("|")[2:-1]]
    prumerge, random = (
        dict(zip(heading, cells["prumerge"], strict=True)),
        dict(zip(heading, cells["random"], strict=True)),
    )
    assert prumerge["MME accuracy, %"] == prumerge["MME perception"] == prumerge["relative, %"] == ""
    assert prumerge["budget"] == "keep=36"
    assert random["POPE accuracy, %"].startswith("62.0 ± 2.8 [")
    assert random["prefill TFLOPs"] == "0.036"
    assert "nan" not in "\n".join(lines).lower()
    assert len({len(line) for line in for_terminal(table).splitlines()[3:]}) <= 2


def test_a_table_names_what_it_leaves_out(results):
    DAMAGES["not finished"](results / "rcb")
    write_tables(*collect(results), results)
    assert f"Left out:\n\n- {results / 'rcb'}: not finished\n" in (results / "table.md").read_text()


def test_columns_that_say_nothing_are_not_shown(tmp_path):
    write_run(tmp_path / "full", "none", {"pope": answers(0.9)})
    columns = readable(summary_table(collect(tmp_path)[0])).columns
    assert list(columns) == [
        "method",
        "retained",
        "layer average",
        "POPE accuracy, %",
        "relative, %",
        "questions/s",
        "processor ms",
        "prefill TFLOPs",
        "choosing ms",
        "method GFLOPs",
    ]


def test_a_number_that_one_seed_lacks_is_not_averaged_over_the_others(results):
    record = json.loads((results / "random7" / "run.json").read_text())
    (results / "random7" / "run.json").write_text(json.dumps(record | {"totals": {}}))
    table = summary_table(collect(results)[0]).set_index("method")
    assert math.isnan(table.loc["random", "questions_per_second"])
    assert table.loc["random", "seeds"] == 2


def test_runs_over_other_samples_are_refused(results):
    write_run(results / "other", "fastv", {"pope": answers(0.5)}, keep=36, tag="photo")
    with pytest.raises(UserError, match="different samples of pope"):
        summary_table(collect(results)[0])


def test_runs_of_two_codebooks_are_told_apart(results):
    for name in ("no-tau_in", "llava-1.5-7b"):
        given = {"pretrained": "lab", "keep": "8", "codebook": f"books/{name}.safetensors"}
        write_run(results / name, "rcb", {"pope": answers(0.5)}, keep=8, arguments=given)
    runs, _ = collect(results)
    options = [setting.options for setting in group(runs) if setting.budget == "keep=8"]
    assert sorted(options) == ["codebook=llava-1.5-7b", "codebook=no-tau_in"]
    assert "rcb, codebook=no-tau_in, keep=8" in [run_label(run, False) for run in runs]
    assert "rcb (codebook=no-tau_in)" in readable(summary_table(runs))["method"].tolist()


def test_a_run_that_is_there_twice_is_refused(results):
    write_run(results / "copy", "random", {"pope": answers(0.6)}, keep=36, seed=42)
    with pytest.raises(UserError, match=r"the same run twice: .*copy and .*random42"):
        group(collect(results)[0])


# Plots


def test_equal_tables_give_equal_plots(results, tmp_path):
    table = summary_table(collect(results)[0])
    png, svg = accuracy_plot(table, tmp_path / "one")
    assert svg.read_bytes() == accuracy_plot(table, tmp_path / "two")[1].read_bytes()
    with Image.open(png) as image:
        assert min(image.size) > 400
    # FastV stands where it costs: at its average over the layers, not at what is left behind the pruned one.
    other = table.assign(pope_retained=1.0, mme_retained=1.0)
    other.loc[table["method"] == "none", "pope_retained"] = table["pope_retained"]
    other.loc[table["method"] == "none", "mme_retained"] = table["mme_retained"]
    assert svg.read_bytes() == accuracy_plot(other, tmp_path / "x")[1].read_bytes()
    moved = table.assign(layer_average_tokens=table["layer_average_tokens"] + 20)
    assert svg.read_bytes() != accuracy_plot(moved, tmp_path / "y")[1].read_bytes()
    table[["pope_accuracy", "pope_low", "pope_high"]] -= 0.1
    assert svg.read_bytes() != accuracy_plot(table, tmp_path / "three")[1].read_bytes()


# Pictures


def _coordinates(width: int, height: int) -> Image.Image:
    """Red rises from left to right, green from top to bottom, each over the whole range."""
    x, y = (np.arange(width) + 0.5) * 255 / width, (np.arange(height) + 0.5) * 255 / height
    red, green = np.broadcast_to(x, (height, width)), np.broadcast_to(y[:, None], (height, width))
    return Image.fromarray(np.stack([red, green, 0 * red], 2).round().astype(np.uint8))


GEOMETRY = {"rcb": "centre_crop", "pad": "padded_square"}


def test_samples_of_another_run_are_in_no_table(results):
    rows = [_sample("pope", number, 1, f"image{number // 2}") for number in range(4)]
    same, other = answers_hash(rows), answers_hash([{**row, "filtered_resps": ["no"]} for row in rows])
    assert same == answers_hash(reversed(rows)) != other
    place = results / "four"
    write_run(place / "own", "none", {"pope": [1] * 4}, answers={"pope": same})
    write_run(place / "foreign", "random", {"pope": [1] * 4}, keep=36, answers={"pope": other})
    runs, excluded = collect(place)
    assert [run.path.name for run in runs] == ["own"]
    assert [(entry.path.name, "other answers" in entry.reason) for entry in excluded] == [("foreign", True)]


def test_mixed_versions_are_noted_in_the_table(results):
    for name, version in (("a", "5.20.2"), ("b", "5.23.0"), ("c", "5.23.0")):
        versions = {"transformers": version, "torch": "2.15.0"}
        write_run(results / name, "random", {"pope": answers(0.9)}, keep=ord(name), versions=versions)
    runs, excluded = collect(results)
    write_tables(runs, excluded, results)
    noted = "mixed versions of transformers: 5.20.2 (1 runs, a first); 5.23.0 (2 runs, b first)"
    assert noted in (results / "table.md").read_text()
    assert "of torch" not in (results / "table.md").read_text()


def test_pictures_of_extreme_images_stay_small(checkpoint, tmp_path):
    family = load_family(checkpoint)
    pruners = {"random": make_pruner("random", budget=Budget.tokens(5))}
    images = [Image.new("RGB", size, "red") for size in ((10_000, 1), (1, 3_000), (5_000, 4_000), (3, 2))]
    for image in images:
        boxes = family.places(Visual((image,), "base"))[0].boxes(family.grid)
        shown, boxes = drawing.enlarged(image, boxes)
        assert max(shown.size) <= 1680
        assert boxes.shape == (16, 4)
        assert boxes[:, 2].max() <= shown.width * (1 + 1e-9)
    pictures.kept_tokens_picture(family, pruners, images, tmp_path / "kept.png")
    assert Image.open(tmp_path / "kept.png").width < 4000


@pytest.mark.parametrize("preprocess", ["rcb", "pad"])
@pytest.mark.parametrize("size", [(168, 168), (200, 120), (121, 250), (640, 427), (1200, 40), (30, 20)])
def test_patch_boxes_undo_the_image_processor(size, preprocess):
    side, grid = 56, (4, 4)
    image = _coordinates(*size)
    prepared = central_square_region(image) if preprocess == "rcb" else pad_to_square(image, (0, 0, 0))
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_rescale=False, do_normalize=False
    )
    pixels = np.asarray(processor(prepared, return_tensors="np")["pixel_values"][0], dtype=float)  # (3, 56, 56)
    seen = pixels.reshape(3, 4, 14, 4, 14).mean((2, 4)).reshape(3, 16)
    boxes = places.patch_boxes(size, grid, GEOMETRY[preprocess], side)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    # Where a patch reaches the image's edge, its mean is of something else than the image alone.
    inside = (boxes >= -1e-9).all(1) & (boxes[:, 2] <= size[0] + 1e-9) & (boxes[:, 3] <= size[1] + 1e-9)
    assert preprocess == "pad" or inside.all()
    for axis in range(2):
        expected = centres[:, axis] * 255 / size[axis]
        assert np.abs(seen[axis] - expected)[inside].max(initial=0) < 2.5
        # All boxes are of one size, and neighbours touch.
        extent = boxes[:, axis + 2] - boxes[:, axis]
        assert np.ptp(extent) < 1e-9
    assert np.allclose(boxes[:3, 2], boxes[1:4, 0])
    assert np.allclose(boxes[:12, 3], boxes[4:, 1])


def test_patch_boxes_of_a_wide_photograph_by_hand():
    # 640 x 427 at 336: the long side becomes int(503.6), and (503 - 336) // 2 = 83 columns are cut off on the left.
    boxes = places.patch_boxes((640, 427), (24, 24), "centre_crop", 336)
    scale = 640 / 503
    assert boxes[0] == pytest.approx([83 * scale, 0, 97 * scale, 427 / 24])
    assert boxes[-1] == pytest.approx([405 * scale, 427 * 23 / 24, 419 * scale, 427])
    padded = places.patch_boxes((640, 427), (24, 24), "padded_square", 336)
    assert padded[0] == pytest.approx([0, -106, 640 / 24, 640 / 24 - 106])


def test_kept_patches_stay_as_they_are_and_the_others_do_not():
    image = Image.fromarray(np.random.default_rng(8).integers(60, 256, (112, 168, 3), dtype=np.uint8))
    boxes = places.patch_boxes(image.size, (4, 4), "centre_crop", 112)
    kept = np.array([0, 5, 15])
    drawn, original = np.asarray(pictures.highlight(image, boxes, kept)), np.asarray(image)
    for number, (left, top, right, bottom) in enumerate(boxes.astype(int)):
        patch, before = drawn[top:bottom, left:right], original[top:bottom, left:right]
        assert patch.shape == (28, 28, 3)
        if number in kept:
            assert (patch == before).all()
        else:
            assert (patch == patch[..., :1]).all()  # grey
            assert patch.max() < 0.3 * 255 + 19
    outside = np.concatenate([drawn[:, :28], drawn[:, 140:]], 1)
    assert outside.min() > 220


def test_pixels_belong_to_the_patch_that_holds_their_centre():
    boxes = places.patch_boxes((10, 10), (3, 3), "centre_crop", 56)  # borders at 3.33 and 6.67
    owners = [places.kept_mask((10, 10), boxes, np.array([number])) for number in range(9)]
    assert (np.sum(owners, axis=0) == 1).all()
    assert owners[0].nonzero()[1].max() == 2
    assert owners[1].nonzero()[1].tolist()[:4] == [3, 4, 5, 6]


def test_picture_of_kept_tokens_counts_them(family, codebook_file, tmp_path, monkeypatch):
    captions = []
    draw = pictures.panel_image
    monkeypatch.setattr(pictures, "panel_image", lambda *args: (captions.append(args[2]), draw(*args)))
    pruners = {
        "rcb": make_pruner("rcb", budget=Budget.tokens(6), codebook=str(codebook_file)),
        "prumerge_plus": make_pruner("prumerge_plus", budget=Budget.tokens(6)),
        "fastv": make_pruner("fastv", budget=Budget.tokens(4)),
    }
    images = [tiny.random_image(1), tiny.random_image(2, 60, 90)]
    out = pictures.kept_tokens_picture(family, pruners, images, tmp_path / "kept.png")
    assert captions[:4] == ["80 × 60 px", "6 of 16", "5 + 1 merged of 16", "4 of 16"]
    assert captions[4] == "60 × 90 px"
    with Image.open(out) as image:
        assert image.width > image.height > 400


def test_fastv_draws_what_eager_attention_ranks_highest(family):
    pruner = make_pruner("fastv", budget=Budget.tokens(5))
    image = tiny.random_image(1)
    session = Session(family, pruner)

    def kept_under(text):
        return kept_of(session, Question(text, [Visual((image,), "base")]))[1][0].indices

    kept = kept_under("Is it red?")
    (view,) = family.encode([image])[0]
    prompt = family.embed(family.prompt("Is it red?"), [family.pack_base(view.features)])
    decoder = family.model.get_decoder()
    decoder.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            attention = decoder(inputs_embeds=prompt.embeds[None], output_attentions=True).attentions[1]
    finally:
        decoder.set_attn_implementation("sdpa")
    ((start, stop),) = prompt.spans
    row = attention[0].mean(0)[-1, start:stop]
    assert kept.tolist() == sorted(row.topk(5).indices.tolist())
    other = kept_under("How many circles are there?")
    assert len(other) == 5


@pytest.mark.parametrize("save", [tiny_next.save_next, tiny_onevision.save_onevision])
def test_kept_tokens_of_a_stretched_base_view(tmp_path, save):
    family = load_family(str(save(tmp_path / "checkpoint")))
    image = tiny.random_image(1, 120, 40)
    boxes = places.patch_boxes(image.size, family.grid, family.geometry["rcb"], 56)
    assert boxes[0].tolist() == [0, 0, 30, 10]
    assert boxes[-1].tolist() == [90, 30, 120, 40]
    pruners = {name: make_pruner(name, budget=Budget.tokens(5)) for name in ("random", "fastv")}
    question = Question("What?", [Visual((image,), "base")])
    kept = {name: kept_of(Session(family, pruner), question)[1][0] for name, pruner in pruners.items()}
    assert [len(own.indices) for own in kept.values()] == [5, 5]
    assert max(own.indices.max() for own in kept.values()) < 16
    assert pictures.kept_tokens_picture(family, pruners, [image], tmp_path / "kept.png").stat().st_size > 5000


# Quickstart


def test_quickstart_compares_and_continues(checkpoint, codebook_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RCB_CACHE", str(tmp_path / "cache"))
    options = {
        "pretrained": str(checkpoint),
        "codebook": str(codebook_file),
        "budgets": (2,),
        "seeds": (0,),
        "sizes": {"pope": 1, "mme": 1},
    }
    out = quickstart(tmp_path / "quick", **options)
    said = capsys.readouterr().out
    table = pd.read_csv(out / "table.csv")
    assert table["method"].tolist() == ["none", "rcb", "prumerge", "prumerge_plus", "fastv", "random"]
    sizes = json.loads((out / "runs" / "full" / "results.json").read_text())["n-samples"]
    # One image each: 18 questions of POPE, two subtasks of two questions of MME.
    assert {task: size["original"] for task, size in sizes.items()} == {"pope": 18, "mme": 4}
    assert table["retained_tokens"].iloc[1:].tolist() == pytest.approx([2.0] * 5, abs=0.5)
    assert "[ 6/6] random-2-seed0" in said
    assert "next: cd " in said
    assert f"next: open {out / 'report.html'}" in said
    named = {
        "index.md",
        "table.md",
        "table.csv",
        "comparisons.csv",
        "accuracy.png",
        "accuracy.svg",
        "kept_tokens_2.png",
        "report.html",
    }
    assert named <= {path.name for path in out.iterdir()}
    assert all(f"`{name}`" in (out / "index.md").read_text() for name in named - {"index.md"})
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/run.json")}
    (out / "runs" / "fastv-2" / "run.json").unlink()  # as after a kill between two runs
    quickstart(tmp_path / "quick", **options)
    assert capsys.readouterr().out.count("done before") == 5
    changed = [path.parent.name for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert changed == ["fastv-2"]
    with pytest.raises(UserError, match="holds another run"):
        quickstart(tmp_path / "quick", **options | {"codebook": "lab-llava"})
    with pytest.raises(UserError, match="runs over different samples cannot be compared"):
        quickstart(tmp_path / "quick", **options | {"sizes": {"pope": 2, "mme": 1}})


def test_quickstart_side_by_side_gives_what_one_run_after_another_gives(tmp_path, monkeypatch, capsys):
    from rcb_lmms.runs.quickstart import quickstart

    monkeypatch.setenv("RCB_CACHE", str(tmp_path / "cache"))
    options = {"budgets": (36,), "seeds": (0,), "sizes": {"pope": 2, "mme": 1}, "methods": ("rcb",)}
    answers, used = {}, {}
    for at_once in (1, 2):
        out = quickstart(tmp_path / str(at_once), **options, at_once=at_once)
        files = sorted(out.glob("runs/*/samples_*.jsonl"))
        assert len(files) == 6
        answers[at_once] = [
            [json.loads(line)["filtered_resps"] for line in file.read_text().splitlines()] for file in files
        ]
        used[at_once] = {json.loads(file.read_text())["process"] for file in out.glob("runs/*/run.json")}
    assert answers[1] == answers[2]
    assert sum(map(len, answers[1])) == 3 * (36 + 4)
    assert used[1] == {os.getpid()}
    assert os.getpid() not in used[2]
    lines = [line.split()[:3] for line in capsys.readouterr().out.splitlines() if "/3] " in line]
    assert sorted(name for *_, name in lines) == sorted(["full", "rcb-36", "random-36-seed0"] * 2)


def test_processes_end_with_their_work_and_are_missed_before(tmp_path):
    from rcb_lmms.runs.side_by_side import workers

    with workers(2, int, tmp_path / "log.txt") as work:
        pids = set(work(os.getpid, [()] * 8))
        assert os.getpid() not in pids
        assert sorted(work(divmod, [(7, 2), (9, 4)])) == [(2, 1), (3, 1)]
        with pytest.raises(UserError, match="one that ended before its work"):
            list(work(os._exit, [(3,)]))
    with pytest.raises(ZeroDivisionError), workers(2, int, tmp_path / "log.txt") as work:
        list(work(divmod, [(1, 0)]))


def test_the_target_counts_every_view_of_a_question():
    def run(**record):
        content = {"resolved": {"pruner": {"budget": "tokens=16"}, "per": "view"}, **record}
        return Measured(Run(Path("x"), content, {}), {}, {}, {}, {})

    achieved = {"pope": {"views": 4.0}, "mme": {"views": 3.0}}
    assert run(calibrations={}, achieved=achieved).target == 16 * 3.5
    fitted = {"pope": {"target": 16.0}, "mme": {"target": 16.0}}
    assert run(calibrations=fitted, achieved=achieved).target == 16 * 3.5
    whole = run(calibrations=fitted, achieved=achieved, resolved={"pruner": {"budget": "tokens=16"}, "per": "image"})
    assert whole.target == 16


def field_run(folder, method, correct, scores, keep=None, **record):
    """A run of POPE and MME on LLaVA-1.5 7B, padded, with lmms-eval's own numbers of both."""
    arguments = {"pretrained": "llava-hf/llava-1.5-7b-hf", "preprocess": "pad"} | ({"keep": str(keep)} if keep else {})
    budget = {"budget": f"tokens={keep}" if keep else "None"}
    own = {"family": "llava", "preprocess": "pad", "pruner": budget}
    write_run(folder, method, correct, keep=keep, **{"arguments": arguments, "resolved": own} | record)
    results = json.loads((folder / "results.json").read_text())
    f1, perception, cognition = scores
    results["results"]["pope"] |= {"pope_f1_score,none": f1}
    results["results"]["mme"] |= {"mme_perception_score,none": perception, "mme_cognition_score,none": cognition}
    (folder / "results.json").write_text(json.dumps(results))


def test_what_papers_print_stands_beside_the_rows_of_the_fields_table(tmp_path):
    both = {"pope": answers(0.9), "mme": answers(0.8)}
    field_run(tmp_path / "full", "none", both, (0.8, 1500.0, 300.0))
    field_run(tmp_path / "divprune", "divprune", both, (0.76, 1350.0, 300.0), keep=64)
    field_run(tmp_path / "random", "random", both, (0.7, 1200.0, 300.0), keep=64)
    runs = collect(tmp_path)[0]
    table = beside_published(runs)
    assert table["method"].tolist() == ["divprune"] * 3
    assert table["source"].str.contains("MMTok|EADP|RESTORE").all()
    mmtok, eadp, restore = (row for _, row in table.iterrows())
    # As printed by MMTok: 85.56 of 85.9, and 1674.4 of 1862, the sum of both parts of MME; EADP prints perception.
    assert mmtok["pope_published"] == pytest.approx(100 * 85.56 / 85.9)
    assert (mmtok["pope"], mmtok["mme"]) == (pytest.approx(95), pytest.approx(100 * 1650 / 1800))
    assert mmtok["mme_published"] == pytest.approx(100 * 1674.4 / 1862)
    assert (eadp["mme"], eadp["mme_published"]) == (pytest.approx(90), pytest.approx(100 * 1356.2 / 1513.4))
    assert mmtok["mean"] == pytest.approx((95 + 100 * 1650 / 1800) / 2)
    assert restore["gqa_published"] == pytest.approx(100 * 57.1 / 61.9)
    assert table["gqa"].isna().all()
    assert readable_published(table)["POPE F1"].tolist()[0] == "95.0 / 99.6"
    write_tables(runs, [], tmp_path)
    assert "| divprune | keep=64 |" in (tmp_path / "table.md").read_text().replace("   ", " ").replace("  ", " ")
    assert "here / as published" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "published.csv").exists()


def test_runs_of_other_models_have_nothing_published_beside_them(tmp_path, results):
    assert not len(beside_published(collect(results)[0]))
    other = {"resolved": {"family": "llava", "preprocess": "rcb", "pruner": {"budget": "tokens=64"}}}
    both = {"pope": answers(0.9), "mme": answers(0.8)}
    field_run(tmp_path / "own" / "full", "none", both, (0.8, 1500.0, 300.0), **other)
    field_run(tmp_path / "own" / "divprune", "divprune", both, (0.7, 1400.0, 300.0), keep=64, **other)
    assert not len(beside_published(collect(tmp_path / "own")[0]))


def test_published_rows_are_whole_and_below_what_was_unpruned():
    data, columns = field_data(), len(field_data()["columns"])
    methods = [entry.model for keep in (192, 128, 64) for entry in read_configs([f"field_llava-1.5-7b_{keep}"])]
    for table in data["tables"]:
        for method, rows in table["rows"].items():
            assert f"llava_{method}" in methods or method == "prumerge_plus"
            for keep, row in rows.items():
                assert keep in (192, 128, 64)
                assert len(row) == columns
                shares = [own / whole for own, whole in zip(row, table["unpruned"], strict=True) if own]
                assert all(0.3 < share < 1.1 for share in shares), (table["source"], method, keep)
        for rows in table["rows"].values():  # in every table the mean falls with the budget
            pairs = [zip(row, table["unpruned"], strict=True) for row in rows.values()]
            shares = [[own / whole for own, whole in row if own] for row in pairs]
            assert [*map(np.mean, shares)] == sorted(map(np.mean, shares), reverse=True)
