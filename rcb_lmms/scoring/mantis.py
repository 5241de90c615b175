"""Mantis-Eval: questions about several images, with lettered options or a short answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rcb_lmms.scoring.answers import letter, letters, row
from rcb_lmms.scoring.estimates import with_stderr
from rcb_lmms.scoring.placeholders import count_images, place_all
from rcb_lmms.scoring.schema import IMAGES, TEXT, TEXTS, check_columns, check_values, refuse

if TYPE_CHECKING:
    from datasets import Dataset

SOURCE = "TIGER-Lab/Mantis-Eval"
_ENDING = "\nAnswer with the option's letter from the given choices directly."
_SHORT = (
    "Given the images, answer the following short answer vqa question:\nQ: {}\n"
    'You can first give your analysis, and then give your final answer as "Final Answer:"'
)
_FINAL = "final answer:"


def check(dataset: Dataset) -> Dataset:
    """The data set, if it can be asked and scored, with each question's `image_count`."""
    texts = ("id", "question_type", "question", "answer")
    check_columns(dataset, SOURCE, {**dict.fromkeys(texts, TEXT), "options": TEXTS, "images": IMAGES})
    check_values(SOURCE, "question_type", dataset["question_type"], ("multi-choice", "short-answer"))
    for number, doc in enumerate(dataset.select_columns(["question_type", "answer", "options"])):
        if doc["question_type"] == "multi-choice" and _gold(doc) not in letters(len(doc["options"])):
            refuse(SOURCE, "an option's letter as answer", f"row {number} has {doc['answer']!r}")
    return count_images(dataset, "images")


def text(doc: dict[str, Any]) -> str:
    """The question in Mantis' own templates; images without a placeholder come first, nothing between them."""
    if doc["question_type"] == "short-answer":
        return place_all(_SHORT.format(doc["question"]), doc["image_count"])
    lines = [doc["question"]]
    for name, option in zip(letters(len(doc["options"])), doc["options"], strict=True):
        lettered = any(f"{name}{mark}" in option.upper() for mark in "):.")
        lines.append(f" {option}" if lettered else f" ({name}) {option}")
    return place_all("\n".join(lines) + _ENDING, doc["image_count"])


def process(doc: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """One question's row.

    What follows "Final Answer:" counts, or else all of the answer. A choice is a letter as `letter` reads it or, as in
    Mantis' own script, the words of an option; a short answer is the expected one, whatever the case and the marks
    around it. That script takes the first letter of any word for a choice, so that "cat" chooses C; here it does not.
    """
    answer = results[0]
    if _FINAL in answer.lower():
        answer = answer[answer.lower().index(_FINAL) + len(_FINAL) :].strip()
    if doc["question_type"] == "short-answer":
        own = row(_plain(answer), _plain(doc["answer"]), doc["id"])
    else:
        chosen = letter(answer, len(doc["options"])) or _option_in_words(answer, doc["options"])
        own = row(chosen, _gold(doc), doc["id"])
    return with_stderr(own, "rcb_mantis_accuracy")


def _gold(doc: dict[str, Any]) -> str:
    return next((character.upper() for character in doc["answer"] if character.isalpha()), "")


def _option_in_words(answer: str, options: Sequence[str]) -> str:
    said = _plain(answer)
    for name, option in zip(letters(len(options)), options, strict=True):
        words = option.strip()
        for mark in (f"({name})", f"{name}.", f"{name}:", f"{name})"):
            words = words.removeprefix(mark)
        if said and said == _plain(words):
            return name
    return ""


def _plain(words: str) -> str:
    return words.strip(" \n\t.,;:!?\"'()*").lower()
