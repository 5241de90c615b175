"""MVBench: twenty subtasks of lettered options about videos."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcb_lmms.errors import UserError, leave_with
from rcb_lmms.scoring.answers import letter, letters, row
from rcb_lmms.scoring.estimates import with_stderr
from rcb_lmms.scoring.schema import TEXT, TEXTS, check_columns, check_values, refuse

if TYPE_CHECKING:
    from datasets import Dataset

SOURCE = "OpenGVLab/MVBench"
VIDEOS = "mvbench_video"


def check(dataset: Dataset) -> Dataset:
    """A subtask's questions, if they can be asked and scored and all their videos are there, with `subtask`."""
    from lmms_eval.tasks.mvbench.utils import DATA_LIST

    check_columns(dataset, SOURCE, {"video": TEXT, "question": TEXT, "answer": TEXT, "candidates": TEXTS})
    check_values(SOURCE, "configuration", [dataset.config_name], DATA_LIST)
    for number, (answer, candidates) in enumerate(zip(dataset["answer"], dataset["candidates"], strict=True)):
        if answer not in candidates:
            refuse(SOURCE, "an answer among the candidates", f"row {number} of {dataset.config_name} has {answer!r}")
    videos = sorted(set(dataset["video"]))
    if missing := [name for name in videos if not _find(dataset.config_name, name).exists()]:
        _refuse_missing(dataset.config_name, missing, len(videos))
    return dataset.add_column("subtask", [dataset.config_name] * len(dataset))


def video(doc: dict[str, Any]) -> list[str]:
    """Path of the question's video file, or of the folder of its frames."""
    return [str(_find(doc["subtask"], doc["video"]))]


def text(doc: dict[str, Any]) -> str:
    """Question, lettered options and the closing sentence, as in MVBench's own evaluation."""
    named = zip(letters(len(doc["candidates"])), doc["candidates"], strict=True)
    options = "".join(f"({name}) {option}\n" for name, option in named)
    return f"Question: {doc['question']}\nOptions:\n{options}Only give the best option."


def process(doc: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """One question's row; an empty answer is a wrong one (lmms-eval's own task leaves it out of the count)."""
    candidates = doc["candidates"]
    answer = letters(len(candidates))[candidates.index(doc["answer"])]
    return with_stderr(row(letter(results[0], len(candidates)), answer, doc["video"]), "rcb_mvbench_accuracy")


def _folders() -> list[Path]:
    """Where videos may lie: beside the questions in the current folder, and where lmms-eval's own task puts them."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    return [Path.cwd() / VIDEOS, home / VIDEOS]


def _find(subtask: str, name: str) -> Path:
    """The video, where it is or where it should be."""
    from lmms_eval.tasks.mvbench.utils import DATA_LIST

    # Two of MVBench's archives unpack into a folder of their own.
    places = [root / archive / DATA_LIST[subtask] / name for root in _folders() for archive in (".", "data0613")]
    return next((path for path in places if path.exists()), places[2])


def _refuse_missing(subtask: str, missing: list[str], count: int) -> None:
    home = _folders()[1]
    with leave_with():
        raise UserError(
            wanted=f"the videos of MVBench {subtask}",
            found=f"{len(missing)} of {count} are missing, the first: {_find(subtask, missing[0])}",
            allowed=f"MVBench's archives unpacked in {home}, or in {VIDEOS} of the current folder",
            next_step=f"hf download {SOURCE} --repo-type dataset --revision video --local-dir {home}, unpack it there; "
            "or choose subtasks whose videos are there",
        )
