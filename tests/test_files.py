import errno
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from rcb_lmms.errors import UserError, exit_on_user_error
from rcb_lmms.files import append_jsonl, read_jsonl, sha256_of, write_atomic

ERROR = UserError(wanted="w", found="f", allowed="a", next_step="n")


def test_a_full_disk_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = write_atomic(tmp_path / "result", "old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["result"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a Linux device")
def test_appending_to_a_full_disk_is_a_clear_error():
    with pytest.raises(UserError, match="No space left on device"):
        append_jsonl("/dev/full", {"a": 1})


def test_a_folder_that_is_a_file_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="finished work is kept"):
        write_atomic(tmp_path / "file" / "result", b"x")


def test_lines_that_a_kill_cut_off_are_passed_over_and_do_not_harm_the_next(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, {"row": 1})
    append_jsonl(path, {"row": "zwö"})
    path.write_bytes(path.read_bytes() + b'{"row": 3, "cut')
    append_jsonl(path, {"row": 4})
    assert [row["row"] for row in read_jsonl(path)] == [1, "zwö", 4]
    assert list(read_jsonl(tmp_path / "absent")) == []


def test_sha256_is_the_files(tmp_path):
    path = write_atomic(tmp_path / "abc", "abc")
    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_errors_are_four_lines_and_survive_a_process_boundary():
    assert str(pickle.loads(pickle.dumps(ERROR))) == "wanted:  w\nfound:   f\nallowed: a\nnext:    n"
    with multiprocessing.get_context("spawn").Pool(1) as pool, pytest.raises(UserError, match="wanted:  w"):
        pool.apply(_raise)


def _raise():
    raise ERROR


@pytest.mark.parametrize(("error", "status"), [(ERROR, 2), (KeyboardInterrupt(), 130)])
def test_exit_statuses(error, status, capsys):
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        raise error
    assert stop.value.code == status
    assert "Traceback" not in capsys.readouterr().err


def test_help_needs_no_heavy_import():
    code = (
        "import sys; sys.argv = ['rcb', '--help']\n"
        "from rcb_lmms.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'lmms_eval', 'matplotlib', 'sklearn', 'rich'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "quickstart" in done.stdout
    assert done.stderr.strip() == "[]"
