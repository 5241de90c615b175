"""POPE: is an object in the image? Three ways of choosing absent objects, scored apart and averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rcb_lmms.models import ENTRIES
from rcb_lmms.scoring import estimates
from rcb_lmms.scoring.answers import row, yes_no
from rcb_lmms.scoring.estimates import Term, with_stderr
from rcb_lmms.scoring.schema import IMAGE, TEXT, check_columns, check_values

if TYPE_CHECKING:
    from datasets import Dataset

SOURCE = "lmms-lab-encoder/POPE"
CATEGORIES = ("random", "popular", "adversarial")

# lmms-eval chooses by the name given as --model. The paper asks LLaVA-1.5 in other words than LLaVA-NeXT.
_ONE_WORD = {"pre_prompt": "", "post_prompt": " Please answer this question with one word."}
_PHRASE = {"pre_prompt": "", "post_prompt": "\nAnswer the question using a single word or phrase."}
PROMPTS = {"default": _PHRASE, **{f"llava_{method}": _ONE_WORD for method in ENTRIES["llava"]}}


def check(dataset: Dataset) -> Dataset:
    """The data set, if it can be asked and scored."""
    texts = ("question", "answer", "category", "image_source")
    check_columns(dataset, SOURCE, {**dict.fromkeys(texts, TEXT), "image": IMAGE})
    check_values(SOURCE, "category", dataset["category"], CATEGORIES)
    check_values(SOURCE, "answer", (answer.strip().lower() for answer in dataset["answer"]), ("yes", "no"))
    return dataset


def process(doc: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """One question's row for every metric it belongs to."""
    own = row(yes_no(results[0]), doc["answer"].strip().lower(), doc["image_source"], category=doc["category"])
    names = ("accuracy", "f1", f"f1_{doc['category']}")
    said_yes = {"score": float(own["prediction"] == "yes"), "cluster": own["cluster"]}
    return with_stderr(own, *(f"rcb_pope_{name}" for name in names)) | with_stderr(said_yes, "rcb_pope_yes_ratio")


def accuracy(rows: Sequence[dict[str, Any]]) -> float | str:
    """Mean of the categories' accuracies, as the paper reports it."""
    return estimates.score(_right(rows))


def accuracy_stderr(rows: Sequence[dict[str, Any]]) -> float | str:
    """Of `accuracy`; all questions about an image, of all categories, are one cluster."""
    return estimates.stderr(_right(rows))


def f1(rows: Sequence[dict[str, Any]]) -> float | str:
    """Mean of the categories' F1 of "yes"; an answer that is neither yes nor no is a missed yes or a right silence."""
    return estimates.score(_found(rows))


def f1_stderr(rows: Sequence[dict[str, Any]]) -> float | str:
    """Of `f1`, by linearisation, clustered by image."""
    return estimates.stderr(_found(rows))


def _right(rows: Sequence[dict[str, Any]]) -> list[Term]:
    return [Term(own["score"], 1.0, own["cluster"], own["category"]) for own in rows]


def _found(rows: Sequence[dict[str, Any]]) -> list[Term]:
    # F1 = 2 TP / (said yes + is yes).
    terms = []
    for own in rows:
        said, true = (float(own[name] == "yes") for name in ("prediction", "answer"))
        terms.append(Term(2 * said * true, said + true, own["cluster"], own["category"]))
    return terms
