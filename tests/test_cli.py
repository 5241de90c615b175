"""The `rcb` command itself: what it lists, how fast it answers, what it says to misspelt words."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest
from typer.testing import CliRunner

from rcb_lmms.cli import app
from rcb_lmms.models import ENTRIES
from rcb_lmms.pruners import PRUNERS
from rcb_lmms.resources import data_dir


def rcb(*words):
    return CliRunner().invoke(app, words)


def test_everything_that_can_be_named_is_listed():
    shown = rcb("list")
    words = set(shown.stdout.split())
    assert shown.exit_code == 0
    assert {f"{family}_{method}" for family, methods in ENTRIES.items() for method in methods} <= words
    assert {*PRUNERS, "rcb_pope", "rcb_paper", "rcb_mvbench", "rcb_mvbench_state_change", "llava-1.5-7b"} <= words
    assert {file.stem for file in data_dir("eval_configs").glob("*.yaml")} <= words


def test_the_version_is_that_of_the_distribution():
    shown = rcb("--version")
    assert shown.exit_code == 0
    assert shown.stdout.replace(",", "").split()[:2] == ["rcb_lmms", metadata.version("rcb_lmms")]


@pytest.mark.parametrize(("words", "meant"), [(("tabel",), "table"), (("table", "--papr", "1", "x"), "--paper")])
def test_misspelt_words_are_answered_with_the_nearest(words, meant):
    shown = rcb(*words)
    assert shown.exit_code == 2
    assert meant in shown.stderr


def test_help_loads_no_model_code():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom rcb_lmms.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print({'torch', 'transformers', 'lmms_eval', 'pandas', 'matplotlib', 'pydantic'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
