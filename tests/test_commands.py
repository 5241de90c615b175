"""Commands that the documentation shows run on the laboratory, small, or name what only their reader has."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import sys
from pathlib import Path

import click
import pytest
import typer
from typer.testing import CliRunner

from rcb_lmms.cli import app
from rcb_lmms.lab.data import BENCHMARKS, SEVERAL_IMAGES, write_data
from rcb_lmms.models import PARTS
from rcb_lmms.models.argument_types import parse_arguments, validated

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES.remove(ROOT / "docs" / "index.md")  # the README once more
ONE_EACH = " ".join(f"--size {name}=1" for name in BENCHMARKS)

# The beginning of a command, and what makes it small.
SMALL = {
    "rcb lab data": ONE_EACH,
    "rcb lab images": "--count 3",
    "rcb codebook build": "--setting tau_in=0",
    "rcb analyze tokens": "--tokens 0-3",
    "rcb analyze influence": "--tokens 60 --candidates 1",
    "rcb analyze curves": "--limit 2 --patches 4",
    "rcb bench": "--keep 16 --repeats 1 --batch-size 2 --new-tokens 2",
    "lmms_eval": "--verbosity WARNING",
}
# A part of a command, and what it needs that is not here; files that these name are nowhere in the repository.
ELSEWHERE = {
    "path/to/llava-v1.5-7b": "a checkpoint of the original code",
    "coco_train_500samples_numPrototypes-454.pt": "a released codebook",
    "rcb codebook show llava-1.5-7b": "the network, for a released codebook",
    "eval_configs/thresholds/llava-1.5-7b-hf.yaml": "thresholds of a real checkpoint",
    "fastv:rank=144": "a checkpoint of more tokens than the laboratory's 144",
    "rcb captions": "Java",
    "llava-onevision-qwen2-72b": "a checkpoint of 72 billion parameters",
    "quantization=": "bitsandbytes, see tests/test_placement.py",
    "engine=vllm": "vLLM, see tests/test_vllm.py",
}
# What takes minutes, and the workflow that runs it.
WORKFLOWS = {"rcb quickstart": "test.yml", "rcb regress check": "regress.yml"}


def blocks(page):
    """Fenced blocks of shell: their lines, comments and continuations resolved."""
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        yield [line.split("  #")[0].strip() for line in block.replace("\\\n", " ").splitlines()]


def commands(page):
    """The commands of a page in order, each with the folder below the page's in which it runs."""
    for block in blocks(page):
        stays = "."
        for line in block:
            here = stays
            for part in re.split(r"&&|\|\|", line):
                words = shlex.split(part.strip(" ()"), comments=True)
                if words[:1] == ["cd"]:
                    here = words[1]
                elif words[:1] in (["rcb"], ["lmms_eval"]):
                    yield here, words
            if not re.search(r"\(cd ", line):
                stays = here


def lacking(words):
    return any(part in " ".join(words) for part in (*ELSEWHERE, *WORKFLOWS))


def small(words):
    """The same command on the laboratory's model, small."""
    told = " ".join(words)
    words = [*words, *(word for begin, more in SMALL.items() if told.startswith(begin) for word in more.split())]
    if words[0] == "lmms_eval":
        own = dict(zip(words[1::2], words[2::2], strict=False)).get("--model_args", "")
        words += [] if "pretrained=" in own else ["--model_args", f"{own},pretrained=lab".strip(",")]
    elif told.startswith("rcb eval") and "--pretrained" not in words:
        words += ["--pretrained", "lab"]
    return words


SHOWN = [(page, words) for page in PAGES for _, words in commands(page)]


@pytest.mark.parametrize(("page", "words"), SHOWN, ids=lambda given: given.stem if isinstance(given, Path) else None)
def test_commands_are_understood(page, words):
    if words[0] == "rcb":
        command, rest = typer.main.get_command(app), words[1:]
        context = click.Context(command)
        while isinstance(command, click.Group):
            name, command, rest = command.resolve_command(context, rest)
            context = click.Context(command, info_name=name, parent=context)
        command.make_context(words[0], list(rest))
        return
    given = dict(zip(words[1::2], words[2::2], strict=False))
    validated(*PARTS[given["--model"]], parse_arguments(given.get("--model_args", "")))


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    """Two images or questions of each benchmark of single images."""
    names = [name for name in BENCHMARKS if name not in SEVERAL_IMAGES]
    return write_data(tmp_path_factory.mktemp("benchmarks"), benchmarks=names, sizes=dict.fromkeys(names, 2))


@pytest.fixture
def folder(benchmarks, indexed_tasks, tmp_path, monkeypatch):
    """A reader's folder: a photograph, a task of their own, and the benchmarks beside them."""
    import lmms_eval
    from PIL import Image
    from sklearn.datasets import load_sample_image

    from rcb_lmms.runs import evaluate

    for place in benchmarks.iterdir():
        (tmp_path / place.name).symlink_to(place)
    photo = Image.fromarray(load_sample_image("china.jpg"))
    (tmp_path / "photos").mkdir()
    for path in (tmp_path / "photo.jpg", tmp_path / "photos" / "china.jpg"):
        photo.save(path)
    pope = Path(lmms_eval.__file__).parent / "tasks" / "pope"
    shutil.copytree(pope, tmp_path / "my_tasks", ignore=lambda _, names: {*names} - {"pope.yaml", "utils.py"})
    task = tmp_path / "my_tasks" / "pope.yaml"
    task.write_text(task.read_text().replace('task: "pope"', "task: mine"))
    monkeypatch.setenv("RCB_CACHE", str(tmp_path / "cache"))
    # The first runs of a file stand for all of them.
    read = evaluate.read_configs
    monkeypatch.setattr(evaluate, "read_configs", lambda configs: read(configs)[:2])
    return tmp_path


def run(words, monkeypatch):
    if words[0] == "rcb":
        done = CliRunner().invoke(app, words[1:], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return
    from rcb_lmms.runs import host

    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        host.main()
    assert stop.value.code == 0


@pytest.mark.parametrize("page", sorted({page for page, _ in SHOWN}), ids=lambda page: page.stem)
def test_commands_of_a_page_run(page, folder, monkeypatch):
    for place, words in commands(page):
        if lacking(words):
            continue
        with contextlib.chdir(folder / place):
            run(small(words), monkeypatch)


def test_what_is_not_run_is_not_here():
    shown = [" ".join(words) for _, words in SHOWN]
    for part in (*ELSEWHERE, *WORKFLOWS):
        assert any(part in told for told in shown), f"{part} is no longer shown"
        assert not (ROOT / part).exists()
    for part, workflow in WORKFLOWS.items():
        assert part in (ROOT / ".github" / "workflows" / workflow).read_text()
