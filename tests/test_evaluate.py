"""`rcb eval` on a tiny random checkpoint: every run in its folder, once, whatever happens in between."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import yaml
from typer.testing import CliRunner

from rcb_lmms.cli import app
from rcb_lmms.errors import UserError
from rcb_lmms.files import read_jsonl
from rcb_lmms.lab.data import write_data
from rcb_lmms.runs import evaluate as module
from rcb_lmms.runs.configs import read_configs
from rcb_lmms.runs.evaluate import evaluate
from rcb_lmms.runs.folder import locked, read_record
from rcb_lmms.runs.tasks import make_task_manager, working_directory

# As in a terminal of its own: `rcb` is on no path where the suite runs from a checkout.
RCB = [sys.executable, "-c", "from rcb_lmms.cli import main; main()"]


@pytest.fixture(scope="module")
def managers():
    """Making one takes seconds, and the tests' tasks ask every model alike."""
    shared = functools.cache(lambda: make_task_manager())
    return lambda entry, include_path=None, tasks=(): (
        shared() if include_path is None else make_task_manager(entry, include_path, tasks)
    )


@pytest.fixture
def write_config(tmp_path, checkpoint):
    """Write a configuration of runs given as (name, model, model_args, tasks)."""

    def write(*runs, file="runs.yaml", **more) -> str:
        entries = [
            {
                "model": model,
                "model_args": f"pretrained={checkpoint}{arguments}",
                "tasks": tasks,
                "batch_size": 8,
                "log_samples": True,
                "output_path": f"results/{name}",
                **more,
            }
            for name, model, arguments, tasks in runs
        ]
        (tmp_path / file).write_text(yaml.safe_dump(entries))
        return str(tmp_path / file)

    return write


@pytest.fixture
def run(pope_tree, tmp_path, monkeypatch, managers):
    """Evaluate in this process; returns the problems."""
    monkeypatch.setenv("RCB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "make_task_manager", managers)

    def call(*configs, tree=pope_tree, **options):
        with working_directory(tree):
            return evaluate(configs, tmp_path / "results", **options)

    return call


FULL, RANDOM = ("full", "llava_full", "", "pope"), ("random", "llava_random", ",keep=3,seed=42", "pope")


def test_runs_are_made_once_and_fill_the_table(write_config, run, tmp_path, capsys):
    config = write_config(FULL, RANDOM)
    assert run(config) == []
    record = read_record(tmp_path / "results" / "random" / "pope")
    assert (record["status"], record["tasks"]) == ("success", ["pope"])
    assert (record["arguments"]["keep"], record["arguments"]["seed"]) == ("3", "42")
    assert "[2/2] random pope " in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("*.json*")}
    assert run(config) == []
    assert capsys.readouterr().out.count("done before") == 2
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("*.json*")}
    shown = CliRunner().invoke(app, ["table", str(tmp_path / "results")])
    assert shown.exit_code == 0
    assert [line.split()[0] for line in shown.stdout.splitlines()[-3:-1]] == ["none", "random"]


def test_samples_of_image_lists_are_the_same_in_every_run(write_config, run, tmp_path):
    tree = write_data(tmp_path / "lab", benchmarks=["seed"], sizes={"seed": 2})
    config = write_config(*((name, "llava_full", "", "rcb_seed_image") for name in ("one", "two")))
    assert run(config, tree=tree) == []
    one, two = (
        list(read_jsonl(tmp_path / "results" / name / "rcb_seed_image" / "samples_rcb_seed_image.jsonl"))
        for name in ("one", "two")
    )
    assert [row["doc"] for row in one] == [row["doc"] for row in two]
    first, second = (row["doc"]["image"][0] for row in one)
    assert re.fullmatch(r"image RGB 168x168 sha256 [0-9a-f]{16}", first)
    assert first != second


def test_a_failed_run_stops_no_other_and_sets_the_exit_status(write_config, run, pope_tree, tmp_path, monkeypatch):
    broken = tiny.save_pope(tmp_path / "broken", change=tiny.cut_off)
    config = write_config(FULL, RANDOM, ("lost", "llava_random", ",keep=99", "pope"))
    problems = run(config, tree=broken)
    assert len(problems) == 3
    assert "4 samples failed" in problems[0]
    assert "99" in problems[2]
    # Mended, the same command makes what is missing. Only a budget that no view has goes on failing.
    monkeypatch.chdir(pope_tree)
    shown = CliRunner().invoke(app, ["eval", config, "--out", str(tmp_path / "results")])
    assert shown.exit_code == 1
    assert shown.stdout.count("failed") == 1
    assert f"failed: {tmp_path / 'results' / 'lost' / 'pope'}: " in shown.stderr
    assert read_record(tmp_path / "results" / "full" / "pope")["status"] == "success"


def test_partial_runs_lie_apart(write_config, run, tmp_path):
    config = write_config(RANDOM)
    assert run(config, limit=4) == []
    assert read_record(tmp_path / "results" / "limit-4" / "random" / "pope")["limit"] == 4
    assert not (tmp_path / "results" / "random").exists()
    assert run(config) == []
    assert read_record(tmp_path / "results" / "random" / "pope")["totals"]["questions"] == 24


def test_another_checkpoint_is_no_continuation(write_config, run, tmp_path):
    config = write_config(RANDOM)
    assert run(config) == []
    (problem,) = run(config, pretrained="lab")
    assert "holds another run" in problem


def test_results_that_went_missing_are_said_to(write_config, run, tmp_path):
    config = write_config(RANDOM)
    folder = tmp_path / "results" / "random" / "pope"
    assert run(config) == []
    (folder / "results.json").unlink()
    (problem,) = run(config)
    assert problem.endswith(f"run.json speaks of: no results.json beside it; next: remove {folder} to run it again")
    for damaged in ("{", "[1]", '{"name": "somebody else\'s"}'):
        (folder / "run.json").write_text(damaged)
        (problem,) = run(config)
        assert "a damaged file" in problem


# Killed


SLOW = """
import sys, time
from rcb_lmms.engine import session
generate, calls = session.generate, []
def slow(*arguments):
    calls.append(1)
    if len(calls) == {batches}:
        print("STOPPED", flush=True)
        time.sleep(600)
    return generate(*arguments)
session.generate = slow
from rcb_lmms.cli import main
sys.argv = ["rcb", *sys.argv[1:]]
main()
"""


def test_a_killed_command_goes_on_where_it_was(write_config, pope_tree, tmp_path, monkeypatch, run):
    config = write_config(FULL, RANDOM)
    results = tmp_path / "results"
    environment = {**os.environ, "RCB_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    # Three batches for each run: the fifth is the second of the second run.
    command = [sys.executable, "-c", SLOW.format(batches=5), "eval", config, "--out", str(results)]
    with subprocess.Popen(
        command, cwd=pope_tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        for line in process.stdout:
            if "STOPPED" in line:
                break
        assert read_record(results / "random" / "pope")["status"] == "started"
        # A second command meanwhile: what is done is done, what is being written is refused.
        (problem,) = run(config)
        assert "another process that writes there since" in problem
        process.send_signal(signal.SIGKILL)
    assert read_record(results / "random" / "pope")["status"] == "started"
    assert run(config) == []
    record = read_record(results / "random" / "pope")
    assert (record["totals"]["questions"], record["totals"]["resumed_questions"]) == (24, 8)
    assert run(write_config(("again", *RANDOM[1:]), file="again.yaml")) == []
    assert _answers(results / "again") == _answers(results / "random")


def _answers(folder: Path) -> dict[int, list]:
    rows = [json.loads(line) for line in (folder / "pope" / "samples_pope.jsonl").read_text().splitlines()]
    return {row["doc_id"]: row["filtered_resps"] for row in rows}


def test_a_lock_lasts_as_long_as_its_process(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from rcb_lmms.runs.folder import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        try:
            with pytest.raises(UserError, match="just now"), locked(tmp_path):
                pass
        finally:
            process.kill()
    with locked(tmp_path):  # the file is still there
        assert (tmp_path / ".rcb.lock").exists()
    began = time.perf_counter()
    with locked(tmp_path):
        assert time.perf_counter() - began < 5


def test_a_second_quickstart_is_refused(tmp_path, monkeypatch):
    from rcb_lmms.runs import folder, quickstart

    monkeypatch.setattr(folder, "run_evaluation", lambda *_, **__: pytest.fail("ran"))
    (tmp_path / "full").mkdir()
    with (tmp_path / "full" / ".rcb.lock").open("w") as other:  # lmms-eval lets a process lock a file twice
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="writes there since"):
            quickstart._run(quickstart.Step("full", "none", {}), tmp_path, tmp_path)


# Configurations


GOOD = {"model": "llava_random", "tasks": "pope", "output_path": "results/a"}
BAD = [
    ("model: llava_full\noutput_path: results/a", "no tasks", "tasks: something in its place"),
    ({**GOOD, "gen_kwargs": "x=1"}, "gen_kwargs, which is unknown", "model, tasks, output_path, model_args"),
    ({**GOOD, "model": "llava_randon"}, "model=llava_randon", "llava_random"),
    ({**GOOD, "model": {"a": 1}}, "model=a dict", "model: text"),
    ({**GOOD, "tasks": ["pope"]}, "tasks=a list", "tasks: text"),
    ({**GOOD, "tasks": ""}, "tasks=", "tasks: String should have at least 1 character"),
    ({**GOOD, "model_args": {"keep": 3}}, "model_args=a dict", "model_args: text"),
    ({**GOOD, "model_args": "keep=nan"}, "keep=nan", "a finite number"),
    ({**GOOD, "model_args": "keep=36,keep=16"}, "keep with more than one value", "each name once"),
    ({**GOOD, "model_args": "kep=36"}, "model_args this entry does not have", "keep"),
    ({**GOOD, "batch_size": "eight"}, "batch_size=eight", "a whole number"),
    ({**GOOD, "batch_size": True}, "batch_size=True", "a number"),
    ({**GOOD, "batch_size": 0}, "batch_size=0", "greater than or equal to 1"),
    ({**GOOD, "output_path": "results/.."}, "output_path=results/..", "a folder below --out"),
    ({**GOOD, "output_path": "results/../"}, "output_path=results/../", "a folder below --out"),
    ({**GOOD, "output_path": "."}, "output_path=.", "a folder below --out"),
    ({**GOOD, "output_path": "a" * 300}, "output_path=aaa", "a folder below --out"),
    ({**GOOD, 7: 8}, "7, which is unknown", "model, tasks"),
    (["pope"], "something else than runs", "one run or a list of them"),
    ([], "something else than runs", "one run or a list of them"),
    ("", "something else than runs", "one run or a list of them"),
    ("- {model: ", "expected the node content", "a YAML file"),
    ("day: 2026-99-99", "month must be in 1..12", "a YAML file"),
    ("[" * 10_000 + "]" * 10_000, "nested too deeply", "a YAML file"),
    ("a: &a [x,x]\nmodel: &b [*a,*a]\ntasks: &c [*b,*b]\noutput_path: [*c,*c]", "a, which is unknown", "model, tasks"),
    (b"\xff\xfe\x00", "codec can't decode", "a YAML file"),
]


@pytest.mark.parametrize(("content", "found", "allowed"), BAD, ids=lambda value: str(value)[:40])
def test_a_configuration_is_refused_before_anything_runs(tmp_path, content, found, allowed):
    path = tmp_path / "bad.yaml"
    text = content if isinstance(content, (str, bytes)) else yaml.safe_dump(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        read_configs([path])
    assert found in error.value.found
    assert allowed in error.value.allowed
    assert "bad.yaml" in error.value.wanted or "model_args" in error.value.wanted


def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, found in [(tmp_path, "a folder"), (tmp_path / "pipe", "a pipe"), ("a" * 5000, "File name too long")]:
        with pytest.raises(UserError) as error:
            read_configs([name])
        assert found in error.value.found
    with pytest.raises(UserError) as error:
        read_configs(["table-1_llava-1.5-7b"])
    assert "table-1_llava-1.5-7b_64, " in error.value.allowed
    assert error.value.next_step.startswith("rcb eval table-1_llava-1.5-7b_")


OWN = """task: mine
dataset_path: parquet
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visuals
doc_to_text: "{{{{text}}}}"
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 4}}
metric_list:
  - metric: exact_match
"""


def test_a_task_of_ones_own_is_evaluated(write_config, run, tmp_path, capsys):
    """A YAML file beside its data, as `lmms_eval --include_path` takes it."""
    from datasets import Dataset, Features, Image, Value

    home = tmp_path / "own"
    home.mkdir()
    (home / "utils.py").write_text("def visuals(doc):\n    return [doc['image'].convert('RGB')]\n")
    (home / "mine.yaml").write_text(OWN.format(file=home / "mine.parquet"))
    rows = [{"image": tiny.random_image(number), "text": f"What is {number}?", "answer": "yes"} for number in range(3)]
    features = Features({"image": Image(), "text": Value("string"), "answer": Value("string")})
    Dataset.from_list(rows, features=features).to_parquet(home / "mine.parquet")
    config = write_config(("random", "llava_random", ",keep=3", "mine"))
    with pytest.raises(UserError, match="the tasks mine"):
        run(config)
    with pytest.raises(UserError, match="no such file"):
        run(config, include_path=tmp_path / "nowhere")
    assert run(config, include_path=home) == []
    assert read_record(tmp_path / "results" / "random" / "mine")["totals"]["questions"] == 3
    named = write_config(("named", "llava_random", ",keep=3", "mine"), file="named.yaml", include_path=str(home))
    assert run(named) == []
    shown = CliRunner().invoke(app, ["eval", named, "--out", str(tmp_path / "results")])
    assert shown.stdout.endswith(f"next: rcb table {tmp_path / 'results'}\n")
    table = CliRunner().invoke(app, ["table", str(tmp_path / "results" / "named")])
    assert "mine" in table.stdout
    assert "exact_match" in table.stdout


@pytest.mark.parametrize("words", [("--limit", "4"), ()])
def test_the_next_step_works_when_typed(write_config, run, pope_tree, tmp_path, monkeypatch, words):
    """After a partial run a table was recommended that refuses it."""
    monkeypatch.chdir(pope_tree)
    config, results = write_config(RANDOM), str(tmp_path / "results")
    shown = CliRunner().invoke(app, ["eval", config, "--out", results, *words])
    assert shown.exit_code == 0
    _, _, told = shown.stdout.partition("next: ")
    if words:
        assert told.startswith("the same command without --limit")
    else:
        assert told.strip() == f"rcb table {results}"
        assert CliRunner().invoke(app, told.split()[1:]).exit_code == 0


def test_one_folder_takes_one_run(write_config):
    same = [write_config(FULL, RANDOM, file="a.yaml"), write_config(RANDOM, file="b.yaml")]
    assert [entry.name for entry in read_configs(same)] == ["full", "random"]
    other = write_config(("random", "llava_random", ",keep=4", "pope"), file="c.yaml")
    with pytest.raises(UserError, match="one run in random/pope"):
        read_configs([*same, other])


def test_unknown_tasks_are_refused_before_anything_runs(write_config, run, tmp_path):
    with pytest.raises(UserError, match="the tasks poppe, mmme"):
        run(write_config(FULL, ("b", "llava_full", "", "pope,poppe"), ("c", "llava_full", "", "mmme,poppe")))
    assert not (tmp_path / "results").exists()
