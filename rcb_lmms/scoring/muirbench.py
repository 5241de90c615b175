"""MuirBench: lettered options about several images, which stand where the question or the options have them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rcb_lmms.scoring.answers import letter, letters, row
from rcb_lmms.scoring.estimates import with_stderr
from rcb_lmms.scoring.placeholders import PLACEHOLDER, count_images, place_all
from rcb_lmms.scoring.schema import IMAGES, TEXT, TEXTS, check_columns, refuse

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

SOURCE = "MUIRBENCH/MUIRBENCH"
_ENDING = "\nAnswer with the option's letter from the given choices directly."


def check(dataset: Dataset) -> Dataset:
    """The data set, if it can be asked and scored, with each question's `image_count`.

    Questions with fewer placeholders than images are asked with the remaining images in front. The paper's code left
    them out; how many they are is said.
    """
    texts = ("idx", "task", "question", "answer")
    check_columns(dataset, SOURCE, {**dict.fromkeys(texts, TEXT), "options": TEXTS, "image_list": IMAGES})
    counted = count_images(dataset, "image_list")
    without = 0
    for number, doc in enumerate(counted.select_columns(["question", "options", "answer", "image_count"])):
        if doc["answer"] not in letters(len(doc["options"])):
            refuse(SOURCE, "an option's letter as answer", f"row {number} has {doc['answer']!r}")
        without += "".join([doc["question"], *doc["options"]]).count(PLACEHOLDER) < doc["image_count"]
    if without:
        logger.warning("MuirBench: %d of %d questions do not place all their images", without, len(counted))
    return counted


def text(doc: dict[str, Any]) -> str:
    """The question, its lettered options and the closing sentence, with a new line behind every image."""
    named = zip(letters(len(doc["options"])), doc["options"], strict=True)
    options = "".join(f"\n{name}. {option}" for name, option in named)
    marked = (doc["question"] + options + _ENDING).replace(PLACEHOLDER, f"{PLACEHOLDER}\n")
    return place_all(marked, doc["image_count"], f"{PLACEHOLDER}\n")


def process(doc: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """One question's row; a question and its unanswerable counterpart share their images."""
    pair = sorted({str(doc["idx"]), str(doc.get("counterpart_idx") or doc["idx"])})
    own = row(letter(results[0], len(doc["options"])), doc["answer"], "+".join(pair), task=doc["task"])
    return with_stderr(own, "rcb_muirbench_accuracy")
