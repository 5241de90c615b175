"""SEED-Bench, questions about images only."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rcb_lmms.scoring.answers import letter, row
from rcb_lmms.scoring.estimates import with_stderr
from rcb_lmms.scoring.schema import IMAGES, TEXT, check_columns, check_values, refuse

if TYPE_CHECKING:
    from datasets import Dataset

SOURCE = "lmms-lab-encoder/SEED-Bench"
LETTERS = ("A", "B", "C", "D")


def check(dataset: Dataset) -> Dataset:
    """The questions about images, if they can be asked and scored; those about videos are another benchmark.

    `data_id` names a question's image. Where the column is absent, the images' contents do.
    """
    texts = ("question_id", "question", "answer", "data_type", *(f"choice_{name.lower()}" for name in LETTERS))
    check_columns(dataset, SOURCE, {**dict.fromkeys(texts, TEXT), "image": IMAGES})
    images = [number for number, kind in enumerate(dataset["data_type"]) if kind == "image"]
    if not images:
        refuse(SOURCE, "questions about images", "no row whose data_type is image")
    chosen = dataset.select(images)
    check_values(SOURCE, "answer", chosen["answer"], LETTERS)
    return chosen if "data_id" in chosen.features else chosen.add_column("data_id", _digests(chosen))


def process(doc: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """One question's row."""
    image = doc["data_id"]
    cluster = image if isinstance(image, str) else "/".join(image)
    return with_stderr(row(letter(results[0], len(LETTERS)), doc["answer"], cluster), "rcb_seed_accuracy")


def _digests(dataset: Dataset) -> list[str]:
    # As Arrow, undecoded: casting a column of lists would write a copy of the data set.
    rows = (row["image"].to_pylist()[0] for row in dataset.select_columns(["image"]).with_format("arrow"))
    return [
        hashlib.sha256(b"".join(image["bytes"] or image["path"].encode() for image in images)).hexdigest()[:16]
        for images in rows
    ]
