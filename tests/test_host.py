"""The `lmms_eval` command: exit statuses that tell the truth, and several processes."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import tiny

from rcb_lmms import errors
from rcb_lmms.lab.data import write_data
from rcb_lmms.runs import host
from rcb_lmms.runs.tasks import working_directory


@pytest.fixture
def command(pope_tree, checkpoint, indexed_tasks, tmp_path, monkeypatch):
    """Run the console script in this process; returns its exit status."""
    monkeypatch.setenv("RCB_CACHE", str(tmp_path / "cache"))

    def run(*arguments, model_args="", tree=pope_tree, tasks="pope"):
        given = ["--model_args", f"pretrained={checkpoint}{model_args}", "--tasks", tasks, "--batch_size", "8"]
        output = ["--output_path", str(tmp_path / "out"), "--log_samples", "--verbosity", "WARNING"]
        monkeypatch.setattr(sys, "argv", ["lmms_eval", *arguments, *given, *output])
        with working_directory(tree), pytest.raises(SystemExit) as stop:
            host.main()
        return stop.value.code

    return run


def test_a_complete_run_leaves_its_record_in_the_results_file(command, tmp_path, codebook_file):
    assert command("--model", "llava_rcb", model_args=f",keep=5,codebook={codebook_file}") == 0
    (file,) = (tmp_path / "out").rglob("*_results.json")
    results = json.loads(file.read_text())
    record = results["rcb"]
    assert record["model"] == "llava_rcb"
    assert record["achieved"]["pope"]["retained_visual_tokens"] == pytest.approx(5, abs=0.5)
    assert record["resolved"]["codebook_sha256"]
    assert record["versions"]["transformers"]


def test_a_task_may_leave_files_of_its_own_beside_the_results(command, tmp_path):
    tree = write_data(tmp_path / "lab", benchmarks=["mmbench"], sizes={"mmbench": 1})
    assert command("--model", "llava_full", tree=tree, tasks="mmbench_en_dev_static") == 0
    files = {file.name: json.loads(file.read_text()) for file in (tmp_path / "out").rglob("*_results.json")}
    assert [name for name, content in files.items() if "rcb" not in content] == ["mmbench_en_dev_static_results.json"]
    assert len(files) == 2


def test_failed_samples_set_the_exit_status(command, tmp_path, capsys):
    tree = tiny.save_pope(tmp_path / "broken", change=tiny.cut_off)
    assert command("--model", "llava_full", tree=tree) == 1
    assert "llava_full: 4 samples failed and are in no metric; the first: pope 8" in capsys.readouterr().err


def test_results_that_cannot_be_saved_are_no_success_and_cost_no_answer(command, tmp_path, capsys):
    assert command("--model", "llava_full", "--limit", "2") == 0
    (file,) = (tmp_path / "out").rglob("*_results.json")
    place = file.parent
    shutil.rmtree(place)
    place.write_text("in the way")
    assert command("--model", "llava_full") == 1
    assert "the results of llava_full could not be saved" in capsys.readouterr().err
    assert list((tmp_path / "out" / ".answers").glob("*.jsonl"))
    place.unlink()
    assert command("--model", "llava_full") == 0
    (file,) = (tmp_path / "out").rglob("*_results.json")
    assert json.loads(file.read_text())["rcb"]["totals"]["resumed_questions"] == 24
    assert not (tmp_path / "out" / ".answers").exists()


@pytest.mark.parametrize("kind", ["results", "samples"])
def test_files_that_a_full_disk_cut_off_are_no_success(command, tmp_path, capsys, monkeypatch, kind):
    from lmms_eval.loggers.evaluation_tracker import EvaluationTracker

    name = {"results": "save_results_aggregated", "samples": "save_results_samples"}[kind]
    save = getattr(EvaluationTracker, name)

    def cut(self, **given):
        save(self, **given)
        (file,) = (tmp_path / "out").rglob(f"*_{kind}*.json*")
        file.write_bytes(file.read_bytes()[:-20])

    with monkeypatch.context() as patch:
        patch.setattr(EvaluationTracker, name, cut)
        assert command("--model", "llava_full") == 1
    told = "is cut off" if kind == "results" else "holds 23 whole samples of 24"
    assert told in capsys.readouterr().err
    assert (tmp_path / "out" / ".answers").exists()


def test_two_commands_do_not_write_into_one_folder(command, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    # In a process of its own: lmms-eval makes locks of one process reentrant.
    hold = "import sys, filelock; own = filelock.FileLock(sys.argv[1]); own.acquire(); print(1, flush=True); input()"
    arguments = [sys.executable, "-c", hold, str(tmp_path / "out" / ".rcb.lock")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"1\n"
        assert command("--model", "llava_full") == 2
        other.kill()  # a holder that crashed holds nothing
    assert "another process that writes there since" in capsys.readouterr().err
    assert command("--model", "llava_full", "--limit", "2") == 0


def test_the_hosts_response_cache_is_refused(command, tmp_path, capsys):
    assert command("--model", "llava_random", "--use_cache", str(tmp_path / "cache")) == 2
    assert "wanted:  --use_cache with an entry" in capsys.readouterr().err
    assert command("--model", "llava_random", f"--use_cache={tmp_path / 'cache'}") == 2


def test_the_response_cache_is_refused_in_the_python_api_too(checkpoint, pope_tree, tmp_path, monkeypatch):
    from lmms_eval.evaluator import simple_evaluate

    from rcb_lmms.runs.tasks import make_task_manager

    monkeypatch.setenv("RCB_CACHE", str(tmp_path / "cache"))
    with working_directory(pope_tree), pytest.raises(errors.UserError, match="--use_cache"):
        simple_evaluate(
            model="llava_random", model_args=f"pretrained={checkpoint},keep=5", tasks=["pope"], limit=2,
            use_cache=str(tmp_path / "responses"), task_manager=make_task_manager(),
        )  # fmt: skip


def test_the_hosts_seed_is_the_entrys(command, tmp_path, caplog):
    def kept(*arguments, model_args=""):
        assert command("--model", "llava_random", *arguments, "--limit", "4", model_args=",keep=5" + model_args) == 0
        file = max((tmp_path / "out").rglob("*_results.json"), key=lambda file: file.stat().st_mtime_ns)
        samples = file.with_name(file.name.replace("_results.json", "_samples_pope.jsonl"))
        record = json.loads(file.read_text())["rcb"]["resolved"]["seed"]
        return record, [json.loads(line)["token_counts"][0]["kept"] for line in samples.read_text().splitlines()]

    first, second = kept("--seed", "7"), kept("--seed", "0,1,8,3")
    assert (first[0], second[0]) == (7, 8)
    assert first[1] != second[1]
    assert kept("--seed", "8") == second
    assert "seed=7 in model_args counts" not in caplog.text
    assert kept("--seed", "8", model_args=",seed=7") == first
    assert "seed=7 in model_args counts, not --seed 8" in caplog.text


def test_mistakes_end_in_four_lines_without_a_traceback(command, capsys):
    assert command("--model", "llava_random", model_args=",kep=4") == 2
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err + shown.out
    assert [line.split(":")[0] for line in shown.err.splitlines()[-4:]] == ["wanted", "found", "allowed", "next"]


def test_unknown_tasks_and_models_set_the_exit_status(command):
    assert command("--model", "llava_full", tasks="no_such_task") == 2
    assert command("--model", "x", tasks="pope") != 0


def test_the_hosts_own_command_says_what_it_lacks_and_ends_with_an_error(pope_tree, checkpoint, tmp_path):
    given = ["--model", "llava_random", "--model_args", f"pretrained={checkpoint},keep=999", "--tasks", "pope"]
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *given],
        cwd=pope_tree,
        env={**os.environ, "RCB_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.count("The same arguments work with `lmms_eval`") == 1
    assert "found:   a view of 16 visual tokens" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("entry", ["llava_rcb", "llava_random"])
def test_two_nodes_give_the_results_of_one_process(command, entry, pope_tree, checkpoint, codebook_file, tmp_path):
    own = f",keep=5,codebook={codebook_file}" if entry == "llava_rcb" else ",keep=5"
    arguments = f"pretrained={checkpoint}{own}"
    assert command("--model", entry, model_args=own) == 0
    meet = ["--nproc_per_node", "1", "--nnodes", "2", "--master_addr", "127.0.0.1", "--master_port", tiny.free_port()]
    launch = [sys.executable, "-m", "torch.distributed.run", *meet]
    given = ["--model", entry, "--model_args", arguments, "--tasks", "pope", "--batch_size", "8", "--log_samples"]
    given += ["--output_path", str(tmp_path / "two")]
    nodes = [
        subprocess.Popen(
            [*launch, "--node_rank", str(node), "-m", "rcb_lmms.runs.host", *given],
            cwd=pope_tree,
            env={**os.environ, "RCB_CACHE": str(tmp_path / f"cache-{node}"), "OMP_NUM_THREADS": "1"},
        )
        for node in (0, 1)
    ]
    assert [node.wait(300) for node in nodes] == [0, 0]
    one, two = (_read(tmp_path / name) for name in ("out", "two"))
    assert one[0]["results"]["pope"]["pope_accuracy,none"] == two[0]["results"]["pope"]["pope_accuracy,none"]
    assert one[1] == two[1]
    assert len(two[1]) == 24
    a, b = one[0]["rcb"], two[0]["rcb"]
    assert a["achieved"] == b["achieved"]
    assert b["totals"]["questions"] == 24
    if entry == "llava_rcb":  # whose budget is fitted to images that may be another process's
        assert a["calibrations"]["pope"]["fitted"] == b["calibrations"]["pope"]["fitted"]
    else:
        assert a["totals"]["images_encoded"] == b["totals"]["images_encoded"] == 6


def _read(folder):
    (results,) = folder.rglob("*_results.json")
    (samples,) = folder.rglob("*_samples_pope.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    return json.loads(results.read_text()), {row["doc_id"]: row["filtered_resps"] for row in rows}


def test_every_run_of_a_configuration_file_keeps_its_own_record(pope_tree, checkpoint, tmp_path, monkeypatch):
    import yaml

    monkeypatch.setenv("RCB_CACHE", str(tmp_path / "cache"))
    common = {"model": "llava_random", "tasks": "pope", "batch_size": 8, "log_samples": True, "limit": 4}
    runs = [
        {**common, "model_args": f"pretrained={checkpoint},keep={keep}", "output_path": str(tmp_path / str(keep))}
        for keep in (7, 3)
    ]
    (tmp_path / "runs.yaml").write_text(yaml.safe_dump(runs))
    monkeypatch.setattr(sys, "argv", ["lmms_eval", "--config", str(tmp_path / "runs.yaml"), "--verbosity", "WARNING"])
    with working_directory(pope_tree), pytest.raises(SystemExit) as stop:
        host.main()
    assert stop.value.code == 0
    for keep in (7, 3):
        (file,) = (tmp_path / str(keep)).rglob("*_results.json")
        assert json.loads(file.read_text())["rcb"]["achieved"]["pope"]["retained_visual_tokens"] == keep
