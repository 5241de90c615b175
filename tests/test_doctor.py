"""`rcb doctor` on machines that lack things: each lack says what it costs and how to mend it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib import metadata

import pytest

from rcb_lmms import resources
from rcb_lmms.models import ENTRIES
from rcb_lmms.runs import doctor


def found(checks, name: str) -> doctor.Check:
    (check,) = [check for check in checks if check.name == name]
    return check


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RCB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_this_machine_can_run_the_package(capsys, monkeypatch):
    checks = doctor.doctor()
    assert found(checks, "three questions of POPE").found == "answered through lmms-eval"
    monkeypatch.setattr(doctor, "doctor", lambda: checks)
    assert doctor.main() == 0
    printed = capsys.readouterr().out
    assert "nothing essential is broken" in printed
    for check in checks:
        assert check.name in printed
        assert not check.essential or check.ok
        assert check.ok or (check.cost and check.mend)
    assert found(checks, "torch").found == metadata.version("torch")
    count = sum(len(methods) for methods in ENTRIES.values())
    assert f"{count} entries registered ({', '.join(ENTRIES)})" in found(checks, "lmms-eval models").found


def test_nothing_heavy_is_imported_to_see_the_entries():
    heavy = "{'torch', 'transformers'} & set(sys.modules)"
    code = f"import sys; from rcb_lmms.runs import doctor; doctor._entries(); print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(("installed", "good"), [("0.7.3", True), ("0.7.4", False), ("0.7.2", False), (None, False)])
def test_versions_are_held_against_the_declared_bounds(monkeypatch, capsys, installed, good):
    real = metadata.version

    def version(name):
        if name != "lmms-eval":
            return real(name)
        if installed is None:
            raise metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(doctor, "_questions", lambda: doctor.Check("questions", "not asked here"))
    check = found(doctor.doctor(), "lmms-eval")
    assert check.ok is good
    assert doctor.main() == (0 if good else 1)
    printed = capsys.readouterr().out
    if not good:
        assert check.found == (installed or "not installed")
        assert check.mend == 'pip install "lmms-eval==0.7.3"'
        assert check.mend in printed
        assert "broken: lmms-eval" in printed


def test_a_missing_reporting_package_is_no_breakdown(monkeypatch):
    real = metadata.version

    def version(name):
        if name == "matplotlib":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(doctor, "_questions", lambda: doctor.Check("questions", "not asked here"))
    check = found(doctor.doctor(), "matplotlib")
    assert (check.ok, check.essential, check.cost) == (False, False, "no tables, plots or pictures")


def test_an_uninstalled_package_is_broken(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    monkeypatch.setattr(metadata, "entry_points", lambda group: ())
    checks = doctor.doctor()
    assert [check.name for check in checks if check.essential and not check.ok] == ["rcb_lmms", "lmms-eval models"]
    assert found(checks, "lmms-eval models").mend.startswith("pip install -e .")


def test_versions_outside_the_tested_set_are_named(monkeypatch, tmp_path):
    (tmp_path / "constraints.txt").write_text(
        f"# made by uv\ntorch=={metadata.version('torch').partition('+')[0]}\ntyper==0.0.1 ; python_version > '3'\n"
        "numpy==0.1 ; python_version < '3'\nno-such-package==1\n"
    )
    monkeypatch.setattr(resources, "PACKAGE", tmp_path / "package")
    assert resources.tested_versions()["typer"] == "0.0.1"
    check = doctor._untested()
    assert (check.ok, check.essential) == (False, False)
    assert check.found == f"typer {metadata.version('typer')} (tested: 0.0.1)"


def test_a_run_that_lmms_eval_does_not_finish_is_broken(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    check = doctor._questions()
    assert (check.ok, check.essential, check.found) == (False, True, "exit status 1")


def test_an_exception_of_another_package_names_it_its_version_and_the_tested_one(monkeypatch, capsys, own_cache):
    from rcb_lmms import errors

    def tell(action):
        with pytest.raises(SystemExit) as stop, errors.exit_on_user_error():
            action()
        assert stop.value.code == 1
        return dict(line.split(": ", 1) for line in capsys.readouterr().err.splitlines()[1:5])

    monkeypatch.setattr(resources, "tested_versions", lambda: {"pyyaml": "6.0.2.dev1", "filelock": "3.0"})
    import yaml

    told = tell(lambda: yaml.safe_load("a: ["))
    assert told["wanted"] == " PyYAML, which this command uses"
    assert metadata.version("pyyaml") in told["found"]
    assert told["allowed"] == "PyYAML 6.0.2.dev1, the tested version"
    assert 'pip install "PyYAML==6.0.2.dev1"' in told["next"]
    assert "yaml.safe_load" in (own_cache / "traceback.txt").read_text()
    told = tell(lambda: exec("import filelock._no_such_part"))
    assert told["wanted"] == " filelock, which this command uses"
    with pytest.raises(ZeroDivisionError), errors.exit_on_user_error():
        errors.UserError(wanted=1 / 0, found="", allowed="", next_step="")


def test_java_that_is_absent_or_broken_is_told_apart(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._java().found == "not found"
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'no such VM' >&2\nexit 3\n")
    java.chmod(0o755)
    assert doctor._java().found == "does not start: no such VM"
    java.write_text("#!/bin/sh\necho 'openjdk version \"17\"' >&2\n")
    assert (doctor._java().ok, doctor._java().found) == (True, 'openjdk version "17"')


def test_video_backends_are_looked_for_without_importing_them(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "torchcodec" else None)
    assert doctor._video() == doctor.Check(
        "video backends", "torchcodec", cost=doctor._video().cost, mend="pip install av"
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not doctor._video().ok


def test_little_disk_space_is_noted(monkeypatch, own_cache):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=3 << 30))
    checks = list(doctor._disk())
    assert [check.ok for check in checks] == [False] * 3
    assert checks[1].found == f"3 GiB free at {own_cache}"


def test_a_cache_that_is_a_file_is_noted(own_cache):
    assert doctor._cache().ok
    assert not own_cache.exists()
    own_cache.write_text("")
    assert not doctor._cache().ok


def test_codebooks_are_shipped_cached_or_come_with_a_command(monkeypatch, tmp_path, own_cache):
    cards = tmp_path / "codebooks"
    shutil.copytree(resources.data_dir("codebooks"), cards, ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(resources, "PACKAGE", tmp_path / "package")
    before = {check.name: check for check in doctor._codebooks()}
    assert not any(check.ok for check in before.values())
    released = before["codebook llava-1.5-7b"]
    assert released.mend.startswith("curl -L -o coco_train_500samples_numPrototypes-454.pt https://")
    assert released.mend.endswith("rcb codebook import coco_train_500samples_numPrototypes-454.pt")
    assert before["codebook lab-llava"].mend.startswith("rcb codebook build --model lab ")
    (own_cache / "codebooks").mkdir(parents=True)
    (own_cache / "codebooks" / "llava-1.5-7b.safetensors").write_bytes(b"")
    (cards / "lab-llava.safetensors").write_bytes(b"")
    after = {check.name: check for check in doctor._codebooks()}
    assert after["codebook lab-llava"] == doctor.Check("codebook lab-llava", str(cards / "lab-llava.safetensors"))
    cached = own_cache / "codebooks" / "llava-1.5-7b.safetensors"
    assert after["codebook llava-1.5-7b"] == doctor.Check("codebook llava-1.5-7b", str(cached))
    (cards / "lab-llava.yaml").write_text("id: [")
    (broken,) = doctor._codebooks()
    assert broken.essential
    assert "lab-llava.yaml" in broken.found


def test_a_missing_laboratory_says_how_to_train_it(monkeypatch, tmp_path):
    from rcb_lmms.lab import checkpoint

    monkeypatch.setattr(checkpoint, "__file__", str(tmp_path / "checkpoint.py"))
    check = doctor._laboratory()
    assert (check.ok, check.essential) == (False, False)
    assert check.mend.startswith("in a source checkout: python -m training.train ")
    assert f"--out {tmp_path / 'checkpoints'}" in check.mend


def test_a_torch_that_does_not_load_is_broken(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    check = doctor._gpu()
    assert check.essential
    assert check.mend == "pip install --force-reinstall torch"
