"""The paper's tables: the printed numbers, the configurations, and tables filled from synthetic results folders."""

from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from stored import edit, save_folder

from rcb_lmms.errors import UserError
from rcb_lmms.models.arguments import resolve
from rcb_lmms.pruners.schedules import mean_tokens
from rcb_lmms.report import statistics
from rcb_lmms.report.cells import measure
from rcb_lmms.report.collect import Excluded, collect, left_out
from rcb_lmms.report.paper import comparisons, numbers
from rcb_lmms.report.paper_text import readable, write_paper_table
from rcb_lmms.report.published import eval_configs, layout, layouts
from rcb_lmms.resources import data_dir
from rcb_lmms.runs.configs import Entry, for_checkpoint, read_configs, run_folder

# Right answers of eight, by method; of random pruning by seed.
RIGHT = {"full": 8, "rcb": 6, "fastv": 5, "prumerge": 4, "prumerge_plus": 3, "stride": 3, "downsample": 2}
RIGHT |= {"42": 3, "0": 4, "1234": 5}
SUBTASKS = ("action_count", "scene")


def bits(entry: Entry) -> list[int]:
    """One bit per question; the first ones are right."""
    method = entry.model.rpartition("_random")[2] and entry.model.replace("llava_", "", 1)
    method = method.removeprefix("next_").removeprefix("onevision_")
    right = RIGHT[dict(entry.arguments).get("seed", method)]
    return [1] * right + [0] * (8 - right)


def write_run(root: Path, entry: Entry, column, *, tag: str = "", **record) -> Path:
    """A run folder as `rcb eval` leaves it: eight questions about four images, MVBench's in each of two subtasks."""
    folder = run_folder(root, entry)
    tasks = [f"{entry.task}_{name}" for name in SUBTASKS] if entry.task == "rcb_mvbench" else [entry.task]
    own = bits(entry)
    keep = float(dict(entry.arguments).get("keep", 576))
    content = {
        "model": entry.model,
        "arguments": {name: str(value) for name, value in sorted(for_checkpoint(entry, None).items())},
        "tasks": [entry.task],
        "achieved": {
            task: {"retained_visual_tokens": keep, "layer_average_visual_tokens": keep + 1.0} for task in tasks
        },
    }
    value = sum(100 * (own[n] + own[n + 1]) / 2 + 100 * (own[n] & own[n + 1]) for n in (0, 2, 4, 6)) / 2
    value = value if column.heading == "MMEP" else sum(own) / 8
    metrics = [column.metric]
    if column.metric.endswith("_spice"):
        metrics.append(column.metric.replace("_spice", "_cider"))
    results = {
        "results": {entry.task: {"alias": entry.task, **{f"{metric},none": value for metric in metrics}}},
        "group_subtasks": {entry.task: tasks if len(tasks) > 1 else []},
    }
    samples = {task: [_row(metrics, number, bit, tag) for number, bit in enumerate(own)] for task in tasks}
    return save_folder(folder, samples, results=results, **content | record)


def _row(metrics, number: int, bit: int, tag: str) -> dict:
    image = f"image{number // 2}"
    own = {"score": float(bit), "cluster": image, "category": "count" if number < 4 else "color"}
    return {"doc_id": number, "target": "yes", "doc": {"question": f"{number}?{tag}"}, **dict.fromkeys(metrics, own)}


def write_all(root: Path, key: str) -> Path:
    """Every run of a table."""
    for block in layout(key).blocks:
        for row in (layout(key).reference(block, block.rows[0]), *block.rows):
            for column in layout(key).columns:
                for entry in row.entries(column):
                    if not run_folder(root, entry).exists():
                        write_run(root, entry, column)
    return root


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 199)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Complete results of Table 1; not to be changed."""
    return write_all(tmp_path_factory.mktemp("results"), "table-1")


@pytest.fixture
def small(tmp_path):
    """Complete results of Table 2, to be damaged."""
    return write_all(tmp_path / "results", "table-2")


def block_of(key: str, words: str):
    return next(block for block in layout(key).blocks if words in block.title)


# Printed numbers

# Typed a second time from the paper, method by method: POPE, MMBench, SEED, RealWorldQA, MME, NoCaps, Flickr30k.
PRINTED = {
    ("1.5 7B, retain 144", "PruMerge"): "75.2 57.7 55.7 46.8 1280.8 14.0 15.8",
    ("1.5 7B, retain 144", "FastV"): "79.5 62.2 61.2 51.2 1388.2 15.5 18.8",
    ("1.5 7B, retain 144", "Ours"): "84.7 61.6 62.6 52.7 1369.1 16.4 20.2",
    ("1.5 7B, retain 64", "PruMerge"): "73.5 54.6 53.2 48.4 1228.6 12.9 14.8",
    ("1.5 7B, retain 64", "FastV"): "69.3 59.9 54.6 47.6 1150.6 13.4 15.3",
    ("1.5 7B, retain 64", "Ours"): "79.9 57.1 57.3 48.5 1290.5 15.1 18.8",
    ("LLaVA-1.5 7B", "w/o Split 576×"): "85.6 62.9 65.4 56.1 1458.9 16.5 20.0",
    ("LLaVA-Next 8B", "w/o Split 576×"): "83.9 72.2 71.4 56.2 1504.2 16.1 18.8",
    ("LLaVA-Next 8B", "w Split 2880×"): "87.8 72.1 72.7 59.5 1555.8 16.6 19.3",
    ("w/o Split, retain 64", "Random"): "76.7 59.2 62.0 46.7 1188.2 13.5 15.1",
    ("w/o Split, retain 64", "Ours"): "80.8 66.6 63.7 54.6 1224.4 15.1 17.8",
    ("w Split, retain 64", "Random"): "81.7 63.3 65.7 47.9 1339.0 14.6 16.6",
    ("w Split, retain 64", "Ours"): "85.2 69.6 68.3 57.5 1343.8 16.1 18.8",
    ("w Split, retain 32", "Random"): "77.9 58.4 62.1 45.5 1209.4 13.5 15.0",
    ("w Split, retain 32", "Ours"): "82.7 66.2 64.4 55.2 1254.1 15.2 17.7",
}


def test_printed_numbers_of_table_1():
    rows = [row for block in layout("table-1").blocks for row in block.rows if not row.control]
    assert len(rows) == len(PRINTED)
    for (words, label), line in PRINTED.items():
        (row,) = (row for row in block_of("table-1", words).rows if row.label == label)
        printed = [row.published[column.heading].value for column in layout("table-1").columns if column.printed]
        assert printed == [float(text) for text in line.split()]
    random = block_of("table-1", "w Split, retain 32").rows[0]
    assert [number.std for number in random.published.values()] == [0.2, 0.4, 0.1, 0.2, 19.3, 0.04, 0.02]


def test_printed_averages_agree_with_what_the_paper_says_of_its_tables(tmp_path):
    frame = numbers(measure(layout("table-1"), tmp_path)).set_index(["block", "row", "column"])["published"]
    at_144, at_64 = "LLaVA-1.5 7B, retain 144 visual tokens", "LLaVA-1.5 7B, retain 64 visual tokens"
    base = "LLaVA-Next 8B, w/o Split, retain 64 visual tokens"
    # Section 5.2.1: 82% and 94% on captions; Table 3: 91.3 and 84.5 for the rows that Table 1 has too.
    assert round(frame[at_144, "PruMerge", "captions, %"]) == 82
    assert round(frame[at_144, "FastV", "captions, %"]) == 94
    assert frame[at_144, "Ours", "captions, %"] > 100
    assert frame[at_64, "Ours", "VQA, %"] == pytest.approx(89.3, abs=0.05)
    assert frame[base, "Ours", "VQA, %"] == pytest.approx(91.3, abs=0.05)
    assert frame[base, "Random", "VQA, %"] == pytest.approx(84.5, abs=0.05)
    third = numbers(measure(layout("table-3"), tmp_path)).set_index(["row", "column"])
    printed = third.loc[(slice(None), "Avg. Perf., %"), "published"].tolist()
    assert printed == [91.3, 84.9, 90.6, 91.2, 90.1, 88.0, 84.5]
    second = numbers(measure(layout("table-2"), tmp_path)).set_index(["row", "column"])
    assert second.loc[("Ours", "MVBench"), "published_relative"] == pytest.approx(100 * 55.0 / 58.7)
    assert second.loc[("Ours", "Mantis-test"), "published_tokens"] == 351
    assert second.loc[("Random", "MVBench"), "place"] == (
        "Table 2, Retain 144 tokens per image, 16 per frame, row Random, column MVBench"
    )


def test_figure_9_has_no_number_that_was_not_printed(tmp_path):
    frame = numbers(measure(layout("figure-9"), tmp_path))
    assert frame[frame["column"] != "average, %"]["published"].isna().all()
    printed = frame[frame["column"] == "average, %"].set_index("row")["published"].dropna()
    assert sorted(printed.index) == ["FastV 144", "FastV 64", "Ours 144", "Ours 64", "PruMerge 144", "PruMerge 64"]
    assert printed["Ours 64"] == pytest.approx(89.3, abs=0.05)


def test_cells_say_what_answers_they_share_with_the_unpruned_model(whole):
    frame = numbers(measure(layout("table-1"), whole)).set_index(["block", "row", "column"])
    block = "LLaVA-1.5 7B, retain 144 visual tokens"
    # Of eight answers the unpruned model has all right, RCB the first six, the smaller image the first two.
    shared = frame.loc[(block, "Ours", "POPE")]
    assert (shared["right_to_wrong"], shared["wrong_to_right"]) == (2 / 8, 0)
    assert (shared["hard_samples"], shared["hard_accuracy"]) == (6, pytest.approx(4 / 6))
    assert frame.loc[(block, "FastV", "MMEP"), "right_to_wrong"] == 3 / 8
    unpruned = frame.xs("w/o Split 576×", level="row")
    assert unpruned["agreement"].isna().all()


# Configurations


def test_eval_configs_are_what_the_description_says():
    files = {
        path.stem: path.read_text() for path in data_dir("eval_configs").glob("*.yaml") if path.stem[:5] != "thres"
    }
    assert {name: files[name] for name in eval_configs()} == eval_configs()
    stale = {name for name in files if name.startswith(("table-", "figure-"))} - set(eval_configs())
    assert stale == set()


def test_every_run_of_a_table_is_in_a_configuration():
    entries = set(read_configs(list(eval_configs())))
    needed = {
        entry
        for own in layouts().values()
        for block in own.blocks
        for row in block.rows
        for column in own.columns
        for entry in row.entries(column)
    }
    assert needed == entries
    random = [entry for entry in entries if entry.model == "llava_next_random" and entry.task == "rcb_mme"]
    assert {dict(entry.arguments)["seed"] for entry in random} == {"42", "0", "1234"}


def test_model_args_resolve_without_loading_a_model(codebook_file):
    field = [f"field_llava-1.5-7b_{keep}" for keep in (192, 128, 64)]
    for entry in {(entry.model, entry.arguments) for entry in read_configs([*eval_configs(), *field])}:
        model, arguments = entry[0], dict(entry[1])
        family = model[: model.index("_", 10 if "next" in model else 14 if "onevision" in model else 0)]
        method = model.removeprefix(f"{family}_")
        own = {"codebook": codebook_file} if method == "rcb" else {}
        settings = resolve(family, "none" if method == "full" else method, arguments | own)
        if method in ("rcb", "prumerge") and family != "llava_onevision":
            assert settings.target.tokens == float(arguments["keep"])
        elif method != "full":
            assert settings.pruner.budget.value == float(arguments["keep"])


def test_every_schedule_of_the_fields_table_can_be_met():
    means = {}
    for keep in (192, 128, 64):
        for entry in read_configs([f"field_llava-1.5-7b_{keep}"]):
            method = entry.model.removeprefix("llava_")
            if method in ("fastv", "pyramiddrop", "v2drop", "dart", "sparsevlm"):
                steps = resolve("llava", method, dict(entry.arguments)).pruner.schedule(576, 32)
                counts, behind = [step.keep for step in steps], [step.layer for step in steps]
                means[method, keep] = round(mean_tokens(counts, behind, 576, 32), 1)
    exact = {key: mean for key, mean in means.items() if key[0] in ("fastv", "pyramiddrop", "v2drop")}
    assert all(abs(mean - keep) < 0.6 for (_, keep), mean in exact.items())
    assert (means["dart", 64], means["sparsevlm", 64]) == (99.8, 82.2)


def test_the_laboratory_gets_the_same_shares_of_its_views():
    entry = Entry("x", "llava_next_prumerge_plus", (("template", "llama_3"), ("keep", "64")), "rcb_pope")
    assert for_checkpoint(entry, None) == {"template": "llama_3", "keep": "64"}
    assert for_checkpoint(entry, "a/b") == {"pretrained": "a/b", "template": "llama_3", "keep": "64"}
    assert for_checkpoint(entry, "lab") == {"pretrained": "lab", "ratio": "0.111111"}
    frames = Entry("x", "llava_onevision_rcb", (("keep", "49"),), "rcb_mvbench")
    assert for_checkpoint(frames, "lab")["ratio"] == "0.25"


# Filling


def test_a_complete_table_is_filled(whole):
    frame = numbers(measure(layout("table-1"), whole))
    assert frame["measured"].notna().all()
    cells = frame.set_index(["block", "row", "column"]).sort_index()
    ours = cells.loc["LLaVA-1.5 7B, retain 64 visual tokens", "Ours"]
    assert ours.loc["POPE", ["measured", "relative", "retained_tokens", "layer_average_tokens"]].tolist() == [
        75.0,
        75.0,
        64.0,
        65.0,
    ]
    # MME: in one subtask both pairs are right (200), in the other one of two (100).
    assert ours.loc["MMEP", "measured"] == 300
    assert ours.loc["VQA, %", "measured"] == pytest.approx(75)
    random = cells.loc["LLaVA-Next 8B, w Split, retain 32 visual tokens per sub-image", "Random"]
    assert random.loc["SEEDI", ["measured", "measured_std", "seeds"]].tolist() == [50, 12.5, 3]
    assert random.loc["SEEDI", "folder"].split()[2] == "llava_next_random_keep-32_seed-1234"
    assert set(cells.loc["LLaVA-Next 8B", "w Split 2880×"]["relative"]) == {100.0}


def test_methods_are_compared_on_the_same_samples(whole):
    frame = comparisons(measure(layout("table-1"), whole)).set_index(["block", "row", "against", "column"])
    own = frame.loc["LLaVA-1.5 7B, retain 144 visual tokens"].loc["Ours"]
    assert own.index.get_level_values("against").unique().tolist() == [
        "unpruned", "PruMerge", "FastV", "PruMerge+", "Random", "Stride", "Downsample"
    ]  # fmt: skip
    ours, fastv = np.array([1] * 6 + [0] * 2), np.array([1] * 5 + [0] * 3)
    images = np.repeat(np.arange(4), 2)
    pope = own.loc["FastV", "POPE"]
    assert pope["difference"] == pytest.approx(12.5)
    assert pope["p"] == statistics.paired_p([(ours, fastv, images)]) == 1.0  # one image differs
    assert pope["low"] <= 12.5 <= pope["high"]
    assert pope["samples"] == 8
    # All rotations right: images 0, 1, 2 against 0, 1.
    circular = own.loc["FastV", "MMBen"]
    assert (circular["samples"], circular["difference"]) == (4, 25.0)
    # The third image counts 200 of two in its subtask against 50: 75 in the sum.
    assert own.loc["FastV", "MMEP"]["difference"] == pytest.approx(75)
    # Random sample by sample over three seeds: 3, 4 and 5 of 8 right, so a mean of a half.
    assert own.loc["Random", "RWQA"]["difference"] == pytest.approx(25)


def test_a_group_of_subtasks_counts_each_alike(small):
    table = measure(layout("table-2"), small)
    frame = comparisons(table).set_index(["against", "column"])
    assert frame.loc[("unpruned", "MVBench"), "difference"] == pytest.approx(-25)
    assert frame.loc[("unpruned", "MVBench"), "samples"] == 16
    block = layout("table-2").blocks[1]
    cell = table.cell(block, block.rows[1], layout("table-2").columns[2])
    assert (cell.value, cell.mean("tokens")) == (75.0, 16.0)


def test_tables_are_written_in_three_forms(small, tmp_path):
    text, excluded = write_paper_table(layout("table-2"), small, tmp_path / "out")
    assert excluded == []
    markdown = (tmp_path / "out" / "table-2.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines() if "|" in line]
    assert lines[0] == ["method", "", "tokens", "Mantis-test", "MUIRBench", "MVBench"]
    printed, here = next((one, two) for one, two in itertools.pairwise(lines) if one[0] == "Ours")
    assert printed == ["Ours", "paper", "351 / 626 / 256", "63.6 (108)", "48.1 (113)", "55.0 (94)"]
    assert here == ["", "here", "144 / 144 / 16", "75.0 (75)", "75.0 (75)", "75.0 (75)"]
    assert "50.0 ± 12.5 (50)" in markdown
    assert "Ours against Random" in markdown
    assert "nan" not in markdown.lower().replace("random", "")
    latex = (tmp_path / "out" / "table-2.tex").read_text()
    assert r"61.4 $\pm$ 0.6 (104)" in latex
    assert latex.count("&") == 5 * latex.count(r"\\")
    rows = list(csv.DictReader((tmp_path / "out" / "table-2.csv").open()))
    assert len(rows) == 9
    assert rows[-1]["measured"] == "75.0"
    assert "w/o Split" in text


def test_controls_are_shown_once_they_are_measured(whole, tmp_path):
    empty = readable(layout("table-1"), numbers(measure(layout("table-1"), tmp_path)))
    assert "PruMerge+" not in empty["method"].tolist()
    filled = readable(layout("table-1"), numbers(measure(layout("table-1"), whole)))
    (row,) = filled[filled["method"] == "PruMerge+"].iloc[:1].to_dict("records")
    assert (row[""], row["POPE"]) == ("here", "37.5 (38)")
    assert (empty.loc[empty[""] == "here"].drop(columns=["method", ""]) == "").all(axis=None)


def test_the_figure_is_drawn_from_its_numbers(tmp_path):
    root = write_all(tmp_path / "results", "figure-9")
    write_paper_table(layout("figure-9"), root, tmp_path / "one")
    write_paper_table(layout("figure-9"), root, tmp_path / "two")
    svg = (tmp_path / "one" / "figure-9.svg").read_bytes()
    assert svg == (tmp_path / "two" / "figure-9.svg").read_bytes()
    assert (tmp_path / "one" / "figure-9.png").read_bytes()[1:4] == b"PNG"
    shutil.rmtree(root / "llava_rcb_keep-29")
    write_paper_table(layout("figure-9"), root, tmp_path / "three")
    assert svg != (tmp_path / "three" / "figure-9.svg").read_bytes()
    frame = list(csv.DictReader((tmp_path / "three" / "figure-9.csv").open()))
    by_row = {row["row"]: row["measured"] for row in frame if row["column"] == "average, %"}
    assert (by_row["Ours 29"], by_row["Ours 17"]) == ("", "75.0")


def test_tables_and_figures_of_the_laboratory_say_so(tmp_path):
    root = tmp_path / "results"
    for row in layout("figure-9").blocks[0].rows[:2]:
        for column in layout("figure-9").columns:
            for entry in row.entries(column):
                write_run(root, entry, column, arguments=for_checkpoint(entry, "lab"))
    text, blanks = write_paper_table(layout("figure-9"), root, tmp_path)
    assert "laboratory model" in text
    assert " here" not in text
    title = (tmp_path / "figure-9.md").read_text().splitlines()[0]
    assert title.endswith("removed, beside the laboratory model")
    (line,) = blanks
    assert line.endswith("runs are not there, llava_full first (rcb eval figure-9_llava-1.5-7b)")


def test_a_figure_without_a_measured_number_is_not_drawn(tmp_path):
    _, (line,) = write_paper_table(layout("figure-9"), tmp_path, tmp_path / "out")
    assert "170 runs are not there" in line
    assert not (tmp_path / "out" / "figure-9.png").exists()


# What may not enter


def _record(**changes):
    return edit("run.json", lambda text: json.dumps(json.loads(text) | changes))


NAME = "llava_onevision_rcb_keep-144/rcb_mantis"
# What else makes a run unusable is in test_report.py.
DAMAGES = {
    "failed: out of memory": _record(status="failed", error="out of memory"),
    "run.json is of another run: keep=64": _record(arguments={"keep": "64", "template": "qwen"}),
    "run.json is of another run: model llava_rcb": _record(model="llava_rcb"),
    r"run.json is of another run: tasks \['pope'\]": _record(tasks=["pope"]),
    "results.json has no number for rcb_mantis_accuracy": edit(
        "results.json", lambda text: text.replace("0.75", '"N/A"')
    ),
    "results.json is damaged: n-samples: Field required": edit(
        "results.json", lambda text: text.replace("n-samples", "samples")
    ),
    "no results.json": lambda folder: (folder / "results.json").unlink(),
    "samples_rcb_mantis.jsonl has 7 of 8 samples": edit(
        "samples_rcb_mantis.jsonl", lambda text: text[: text.rindex("{")]
    ),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_cell_without_a_whole_run_stays_blank_and_is_named(small, tmp_path, reason):
    DAMAGES[reason](small / NAME)
    _, (line,) = write_paper_table(layout("table-2"), small, tmp_path / "out")
    assert line.startswith(f"{small / NAME}: ")
    assert re.search(reason, line)
    assert f"- {line}" in (tmp_path / "out" / "table-2.md").read_text()
    frame = numbers(measure(layout("table-2"), small))
    assert frame["measured"].isna().tolist() == [False] * 6 + [True, False, False]


def test_one_missing_seed_leaves_the_cell_blank(small):
    shutil.rmtree(small / "llava_onevision_random_keep-144_seed-0" / "rcb_muirbench")
    frame = numbers(measure(layout("table-2"), small)).set_index(["row", "column"])
    assert np.isnan(frame.loc[("Random", "MUIRBench"), "measured"])
    assert frame.loc[("Random", "Mantis-test"), "seeds"] == 3


def test_an_average_with_a_blank_is_blank(whole, tmp_path):
    for name in ("llava_full", "llava_rcb_keep-64"):
        shutil.copytree(whole / name, tmp_path / name)
    shutil.rmtree(tmp_path / "llava_rcb_keep-64" / "rcb_mme")
    frame = numbers(measure(layout("table-1"), tmp_path)).set_index(["row", "column"])["measured"]
    assert frame["w/o Split 576×", "VQA, %"].tolist()[0] == 100
    assert np.isnan(frame["Ours", "VQA, %"]).all()
    assert np.isnan(frame["Ours", "captions, %"]).tolist() == [True, False, True, True, True]


def test_without_the_unpruned_model_nothing_is_relative(small):
    shutil.rmtree(small / "llava_onevision_full")
    frame = numbers(measure(layout("table-2"), small)).set_index(["row", "column"])
    assert np.isnan(frame.loc[("Ours", "MVBench"), "relative"])
    assert frame.loc[("Ours", "MVBench"), "measured"] == 75


def test_a_column_that_the_paper_does_not_have_is_shown_once_measured(whole, tmp_path):
    columns = readable(layout("table-1"), numbers(measure(layout("table-1"), whole))).columns
    assert {"NoCaps CIDEr", "CIDEr, %"} <= set(columns)
    columns = readable(layout("table-1"), numbers(measure(layout("table-1"), tmp_path))).columns
    assert not {"NoCaps CIDEr", "CIDEr, %"} & set(columns)


def test_captions_whose_spice_is_still_to_come_say_how(whole, tmp_path):
    root = tmp_path / "results"
    shutil.copytree(whole / "llava_full", root / "llava_full")
    lacking = lambda text: text.replace('spice,none": 1.0', 'spice,none": null')  # noqa: E731
    edit("results.json", lacking)(root / "llava_full" / "rcb_nocaps_val")
    table = measure(layout("table-1"), root)
    (excluded,) = table.excluded
    filled = {heading for block, row, heading in table.cells if (block, row) == ("LLaVA-1.5 7B", "w/o Split 576×")}
    assert "NoCaps CIDEr" in filled
    assert "NoCaps" not in filled
    assert excluded.reason == ("results.json has no number for rcb_nocaps_spice; rcb captions adds it to the samples")


def test_samples_without_scores_fill_the_cell_but_no_comparison(small):
    path = small / NAME / "samples_rcb_mantis.jsonl"
    path.write_text(path.read_text().replace('"score"', '"text"'))
    table = measure(layout("table-2"), small)
    assert numbers(table)["measured"].notna().all()
    assert set(comparisons(table)["column"]) == {"MUIRBench", "MVBench"}


def test_runs_over_other_samples_or_checkpoints_are_refused(small):
    folder = small / NAME
    entry = next(
        entry
        for entry in read_configs(["table-2_llava-onevision-7b"])
        if (entry.name, entry.task) == ("llava_onevision_rcb_keep-144", "rcb_mantis")
    )
    shutil.rmtree(folder)
    column = layout("table-2").columns[0]
    write_run(small, entry, column, tag=" on another image")
    with pytest.raises(UserError, match=r"different samples: .*llava_onevision_rcb_keep-144"):
        measure(layout("table-2"), small)
    shutil.rmtree(folder)
    arguments = for_checkpoint(entry, "a/b")
    write_run(small, entry, column, arguments=arguments)
    with pytest.raises(UserError, match=r"different checkpoints: .*llava_onevision_rcb_keep-144"):
        measure(layout("table-2"), small)


def test_a_missing_folder_and_an_unknown_table_are_errors(tmp_path):
    with pytest.raises(UserError, match=r"rcb eval table-1_llava-1\.5-7b_144"):
        measure(layout("table-1"), tmp_path / "nothing")
    with pytest.raises(UserError, match="table 1, table 2, table 3, figure 9"):
        layout("table-7")


def test_runs_of_single_tasks_are_one_row_of_the_plain_table(tmp_path):
    from test_report import answers, write_run

    speed = {"totals": {"questions": 200, "questions_per_second": 10.0}}
    write_run(tmp_path / "full" / "pope", "none", {"pope": answers(0.9)}, **speed)
    slow = {"totals": {"questions": 100, "questions_per_second": 2.0}}
    write_run(tmp_path / "full" / "mme", "none", {"mme": answers(0.8, 100)}, **slow)
    ((run,), excluded) = collect(tmp_path)
    assert (run.path, list(run.scores), excluded) == (tmp_path / "full", ["mme", "pope"], [])
    assert run.record["totals"]["questions_per_second"] == pytest.approx(300 / (20 + 50))
    _record(status="started")(tmp_path / "full" / "pope")
    _record(status="started")(tmp_path / "full" / "mme")
    with pytest.raises(UserError, match=r"none that can be used; the first: .*mme: not finished"):
        collect(tmp_path)


def test_runs_left_out_for_one_reason_take_one_line():
    runs = [
        Excluded(Path(name), reason)
        for name, reason in (("a", "late"), ("b", "torn\n  up"), ("c", "late"), ("d", "late"))
    ]
    assert left_out(runs) == ["a and 2 more: late", "b: torn up"]
