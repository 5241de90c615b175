"""MMBench: each question is asked once for every rotation of its options; CircularEval wants all of them right."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rcb_lmms.scoring import estimates
from rcb_lmms.scoring.answers import letter, row
from rcb_lmms.scoring.estimates import Term, with_stderr
from rcb_lmms.scoring.schema import IMAGE, INTEGER, TEXT, check_columns, check_values

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

SOURCE = "lmms-lab-encoder/MMBench"
LETTERS = ("A", "B", "C", "D")
# Rotations of question n are numbered n, n + 1000000, n + 2000000, ...
ROTATION = 1_000_000


def check(dataset: Dataset) -> Dataset:
    """The data set, if it can be asked and scored, with `passes`: in how many rotations each question is asked."""
    texts = ("question", "hint", "answer", "category", "L2-category", "source", "split", *LETTERS)
    check_columns(dataset, SOURCE, {"index": INTEGER, **dict.fromkeys(texts, TEXT), "image": IMAGE})
    check_values(SOURCE, "answer", dataset["answer"], LETTERS)
    questions = [index % ROTATION for index in dataset["index"]]
    passes = Counter(questions)
    return dataset.add_column("passes", [passes[question] for question in questions])


def process(doc: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """One pass's row for CircularEval and, if the options are in their first order, for the vanilla accuracy."""
    options = sum(_is_given(doc[name]) for name in LETTERS)
    question = doc["index"] % ROTATION
    own = row(letter(results[0], options), doc["answer"], str(question), passes=doc["passes"])
    metrics = ("circular", "vanilla") if doc["index"] == question else ("circular",)
    return with_stderr(own, *(f"rcb_mmbench_{name}" for name in metrics))


def circular(rows: Sequence[dict[str, Any]]) -> float | str:
    """Share of the questions that are answered rightly in every rotation of their options.

    Questions of which some passes were not answered (`--limit`, failed samples) are left out, and said; if none is
    whole, the score is not known.
    """
    whole, groups = _whole(rows)
    if len(whole) < groups:
        logger.warning(
            "MMBench CircularEval: %d of %d questions were not answered in all their rotations and are left out",
            groups - len(whole),
            groups,
        )
    return estimates.score(whole)


def circular_stderr(rows: Sequence[dict[str, Any]]) -> float | str:
    """Of `circular`."""
    return estimates.stderr(_whole(rows)[0])


def _whole(rows: Sequence[dict[str, Any]]) -> tuple[list[Term], int]:
    """A term for each question with all its passes, and how many questions there are."""
    questions: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for own in rows:
        questions[own["cluster"]].append(own)
    terms = [
        Term(min(own["score"] for own in passes), 1.0, name)
        for name, passes in questions.items()
        if len(passes) == passes[0]["passes"]
    ]
    return terms, len(questions)


def _is_given(option: str | None) -> bool:
    return option not in (None, "", "nan")
