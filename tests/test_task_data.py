"""Data that a task cannot use: refused before a model is loaded, in four parts."""

import os
import shutil
import sys

import pandas as pd
import pytest
import tiny

from rcb_lmms.errors import UserError
from rcb_lmms.models import task_data
from rcb_lmms.models.task_data import check_data
from rcb_lmms.runs import host
from rcb_lmms.runs.tasks import working_directory


@pytest.fixture
def tree(tmp_path):
    return tiny.save_pope(tmp_path / "tree", images=3)


def parquet(tree):
    (file,) = tree.rglob("*.parquet")
    return file


DAMAGES = {
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:2000]),
    "no bytes": lambda file: file.write_bytes(b""),
    "no rows": lambda file: pd.read_parquet(file).iloc[:0].to_parquet(file),
    "text": lambda file: file.write_text("an error page of a mirror\n"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_parquet_is_named(tree, name):
    DAMAGES[name](parquet(tree))
    with working_directory(tree), pytest.raises(UserError) as refused:
        check_data(["pope"])
    assert refused.value.wanted == "the data of task pope"
    assert str(parquet(tree)) in refused.value.found


def test_groups_and_tasks_of_the_package_lead_to_their_data(tree, monkeypatch):
    monkeypatch.setattr(task_data, "known_here", lambda _: True)
    parquet(tree).write_bytes(b"")
    with working_directory(tree), pytest.raises(UserError, match="the data of task rcb_pope"):
        check_data(["rcb_paper"])


@pytest.mark.parametrize("several", [False, True])
def test_tasks_of_a_folder_lead_to_their_data(tree, tmp_path, several):
    own = tmp_path / "own"
    own.mkdir()
    (own / "mine.yaml").write_text(f"task: rcb_mine\ndataset_path: {tree / 'lmms-lab-encoder' / 'POPE'}\n")
    (own / "loop").symlink_to("loop")  # nobody can read it, and nobody has to
    parquet(tree).write_bytes(b"")
    with pytest.raises(UserError, match="the data of task rcb_mine"):
        check_data(["rcb_mine"], [str(own)] if several else str(own))


@pytest.fixture
def cached(tree):
    """A tree of which `datasets` has a copy that was made a minute ago, with the copy's folder."""
    import datasets

    with working_directory(tree):
        data = datasets.load_dataset("lmms-lab-encoder/POPE", split="test")
    (copy,) = data.cache_files
    stat = os.stat(copy["filename"])
    os.utime(copy["filename"], (stat.st_atime, stat.st_mtime - 60))
    yield tree
    shutil.rmtree(os.path.dirname(copy["filename"]))


def test_a_cache_of_other_rows_is_refused(cached):
    rows = pd.read_parquet(parquet(cached))
    rows.loc[1, "question"] = "Is there anything else?"
    rows.to_parquet(parquet(cached))
    with working_directory(cached), pytest.raises(UserError, match="changed after `datasets` had made its own copy"):
        check_data(["pope"])
    rows.iloc[:5].to_parquet(parquet(cached))
    with working_directory(cached), pytest.raises(UserError, match="changed after"):
        check_data(["pope"])


def test_the_same_rows_written_again_are_taken(cached):
    pd.read_parquet(parquet(cached)).to_parquet(parquet(cached), row_group_size=5)
    with working_directory(cached):
        check_data(["pope"])


def refused_by(monkeypatch, error):
    from huggingface_hub import HfApi

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    monkeypatch.setattr(task_data, "known_here", lambda _: False)
    task_data._hub_error.cache_clear()


def test_a_hub_that_cannot_be_reached_is_told_with_the_laboratorys_way(tmp_path, monkeypatch):
    refused_by(monkeypatch, ConnectionError("no route"))
    with working_directory(tmp_path), pytest.raises(UserError) as refused:
        check_data(["rcb_pope"])
    assert refused.value.found.endswith("no hub: ConnectionError")
    assert "rcb lab data --out lab --benchmark pope" in refused.value.next_step


def test_a_gated_data_set_asks_for_a_login(tmp_path, monkeypatch):
    from huggingface_hub.errors import HfHubHTTPError

    class Response:
        headers, request, status_code = {}, None, 401

    refused_by(monkeypatch, HfHubHTTPError("401: the data set is gated", response=Response()))
    with working_directory(tmp_path), pytest.raises(UserError, match="hf auth login"):
        check_data(["pope"])


def test_documents_that_the_tasks_code_cannot_read_end_without_a_traceback(tmp_path, checkpoint, monkeypatch, capsys):
    monkeypatch.setenv("RCB_CACHE", str(tmp_path / "cache"))
    tree = tiny.save_pope(tmp_path / "tree", change=lambda rows: [rows[0] | {"question": None}, *rows[1:]])
    arguments = ["--model", "llava_full", "--model_args", f"pretrained={checkpoint}", "--tasks", "pope"]
    monkeypatch.setattr(sys, "argv", ["lmms_eval", *arguments])
    with working_directory(tree), pytest.raises(SystemExit) as stop:
        host.main()
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert "Traceback" not in shown.out + shown.err
    assert "lmms_eval/tasks/pope/utils.py, line 13, raised AttributeError" in shown.err
