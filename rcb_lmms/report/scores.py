"""What logged samples say: their scores, what groups them, and the answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# What the samples of one cluster count for.
COMBINE: dict[str | None, Callable[[list[float]], list[float]]] = {
    None: lambda scores: scores,
    # CircularEval: a question is right in every rotation of its options, or wrong.
    "circular": lambda scores: [min(scores)],
    # MME: accuracy plus the accuracy of pairs, in percent.
    "pairs": lambda scores: [100 * sum(scores) / 2 + 100 * min(scores)] if len(scores) == 2 else [],
}


@dataclass(frozen=True)
class Samples:
    """The scores of some samples and the labels of what groups them, both `(n,)`."""

    values: np.ndarray
    clusters: np.ndarray


@dataclass(frozen=True)
class Scores:
    """What the samples of a task say.

    Attributes:
        parts: a list for each part of a group, of MME's pairs one for each subtask; empty where some of the samples
            that have the metric have no score of their own.
        documents: names the documents by their content, so that runs over different data are never compared.
        answers: of every sample, as it was scored, the tasks of a group one after another, by document.
        marks: `(n,)` the score of each answer by itself, whatever clusters count for; NaN where it has none.
    """

    parts: tuple[Samples, ...]
    documents: str
    answers: tuple[str, ...]
    marks: np.ndarray

    def __len__(self) -> int:
        return sum(len(part.values) for part in self.parts)

    @property
    def values(self) -> np.ndarray:
        """The scores of all parts, `(n,)`."""
        return np.concatenate([part.values for part in self.parts])

    @property
    def clusters(self) -> np.ndarray:
        """The labels of all parts, `(n,)`; no two parts share one."""
        if len(self.parts) == 1:
            return self.parts[0].clusters
        return np.concatenate([np.char.add(f"{number} ", part.clusters) for number, part in enumerate(self.parts)])

    @property
    def judged(self) -> bool:
        """Whether every answer that is scored is right or wrong, 1 or 0, and nothing between."""
        marks = self.marks[~np.isnan(self.marks)]
        return bool(len(marks) and np.isin(marks, (0, 1)).all())


def samples_of(
    rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], combine: str | None, cluster: str | None
) -> list[Samples]:
    """Samples by subtask, arguments as in `Run.scores`; none if some have no score."""
    parts: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        own = scored_by(row, metrics)
        if own is None:
            continue
        if own.get("score") is None:
            return []
        label = own.get("cluster") if cluster is None else {**own, **row.get("doc", {})}.get(cluster)
        part = own["category"] if combine == "pairs" else ""
        parts.setdefault(part, []).append((str(row["doc_id"] if label is None else label), float(own["score"])))
    found = []
    for scored in parts.values():
        if combine is not None:
            clusters: dict[str, list[float]] = {}
            for label, score in scored:
                clusters.setdefault(label, []).append(score)
            scored = [(label, value) for label, scores in clusters.items() for value in COMBINE[combine](scores)]
        found.append(Samples(np.array([value for _, value in scored]), np.array([label for label, _ in scored])))
    return found


def answer_of(row: Mapping[str, Any]) -> str:
    """The answer of a logged sample, as it was scored."""
    answers = row.get("filtered_resps", [])
    return "\n".join(map(str, answers)) if isinstance(answers, list) else str(answers)


def scored_by(row: Mapping[str, Any], metrics: Sequence[str]) -> Mapping[str, Any] | None:
    """What a logged sample holds under the first of the metrics that it has, a bare number as `score`, or `None`."""
    metric = next((metric for metric in metrics if metric in row), None)
    if metric is None:
        return None
    return row[metric] if isinstance(row[metric], dict) else {"score": row[metric]}


def mark_of(row: Mapping[str, Any], metrics: Sequence[str]) -> float | None:
    """The score of a logged sample by the first of the metrics that it has."""
    score = (scored_by(row, metrics) or {}).get("score")
    return None if score is None else float(score)
