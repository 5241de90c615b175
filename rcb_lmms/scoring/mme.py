"""MME: two questions about each image, one to be answered by yes and one by no; accuracy plus accuracy of pairs."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rcb_lmms.scoring import estimates
from rcb_lmms.scoring.answers import row, yes_no
from rcb_lmms.scoring.estimates import Term, with_stderr
from rcb_lmms.scoring.schema import IMAGE, TEXT, check_columns, check_values, refuse

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

SOURCE = "lmms-lab-encoder/MME"
SUBTASKS = {
    "perception": (
        "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"
    ),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}  # fmt: skip
_ABILITY = {subtask: ability for ability, subtasks in SUBTASKS.items() for subtask in subtasks}


def check(dataset: Dataset) -> Dataset:
    """The data set, if it can be asked and scored: every image has its pair of questions."""
    check_columns(
        dataset, SOURCE, {**dict.fromkeys(("question_id", "question", "answer", "category"), TEXT), "image": IMAGE}
    )
    check_values(SOURCE, "category", dataset["category"], _ABILITY)
    check_values(SOURCE, "answer", map(_gold, dataset["answer"]), ("yes", "no"))
    pairs = Counter(zip(dataset["category"], dataset["question_id"], strict=True))
    if odd := [key for key, count in pairs.items() if count != 2]:
        refuse(SOURCE, "two questions about each image", f"{len(odd)} images without a pair, {'/'.join(odd[0])} first")
    return dataset


def process(doc: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """One question's row for perception or cognition."""
    category = doc["category"]
    cluster = f"{category}/{doc['question_id']}"
    own = row(yes_no(results[0]), _gold(doc["answer"]), cluster, category=category)
    return with_stderr(own, f"rcb_mme_{_ABILITY[category]}")


def total(rows: Sequence[dict[str, Any]]) -> float | str:
    """Sum over the subtasks of accuracy and accuracy of pairs, in percent: 200 for each subtask without a mistake.

    A subtask's accuracy is over its images, as in MME's own script, which is the same where each has two questions.
    Subtasks that are absent and images with one answered question (`--limit`, failed samples) are left out, and said.
    """
    pairs = _pairs(rows)
    alone = len({row["cluster"] for row in rows}) - len(pairs)
    abilities = {_ABILITY[row["category"]] for row in rows}
    absent = [name for ability in abilities for name in SUBTASKS[ability] if name not in {t.stratum for t in pairs}]
    if alone or absent:
        logger.warning(
            "MME %s: not comparable with published sums: %d images with one answered question are left out; "
            "absent subtasks: %s",
            " and ".join(sorted(abilities)),
            alone,
            ", ".join(absent) or "none",
        )
    return estimates.score(pairs, total=True)


def total_stderr(rows: Sequence[dict[str, Any]]) -> float | str:
    """Of `total`; images are independent, their two questions are not."""
    return estimates.stderr(_pairs(rows), total=True)


def _pairs(rows: Sequence[dict[str, Any]]) -> list[Term]:
    images: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for own in rows:
        images[own["cluster"]].append(own)
    return [
        Term(100 * (first["score"] + second["score"]) / 2 + 100 * (first["score"] * second["score"]), 1.0, name,
             first["category"])
        for name, (first, second) in ((name, own) for name, own in images.items() if len(own) == 2)
    ]  # fmt: skip


def _gold(answer: str) -> str:
    return answer.strip().lower().replace(".", "")
