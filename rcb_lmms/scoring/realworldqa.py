"""RealWorldQA: a letter, yes or no, a number or a word, as each question asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rcb_lmms.scoring.answers import letter, row, yes_no
from rcb_lmms.scoring.estimates import with_stderr
from rcb_lmms.scoring.schema import IMAGE, TEXT, check_columns

if TYPE_CHECKING:
    from datasets import Dataset

SOURCE = "lmms-lab-encoder/RealWorldQA"
LETTERS = ("A", "B", "C", "D", "E")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def check(dataset: Dataset) -> Dataset:
    """The data set, if it can be asked and scored, with each question's `number`: it has an image of its own."""
    check_columns(dataset, SOURCE, {"question": TEXT, "answer": TEXT, "image": IMAGE})
    return dataset.add_column("number", list(range(len(dataset))))


def process(doc: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """One question's row: the expected answer says how the given one is read.

    A letter is read by `letter`, yes and no by `yes_no`. Other answers are equal if their words are, whatever the
    case, the marks around them, and whether a number up to ten is written in digits.
    """
    answer = doc["answer"].strip()
    if answer.upper() in LETTERS:
        prediction, answer = letter(results[0], len(LETTERS)), answer.upper()
    elif answer.lower() in ("yes", "no"):
        prediction, answer = yes_no(results[0]), answer.lower()
    else:
        prediction, answer = _words(results[0]), _words(answer)
    return with_stderr(row(prediction, answer, str(doc["number"])), "rcb_realworldqa_accuracy")


def _words(text: str) -> str:
    words = text.strip(" \n\t.,;:!?\"'()*").lower().split()
    return " ".join(str(_NUMBERS.index(word)) if word in _NUMBERS else word for word in words)
