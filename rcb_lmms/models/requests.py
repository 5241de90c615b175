"""lmms-eval requests as questions; their documents are read when they are needed and never kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rcb_lmms.engine.options import Generation
from rcb_lmms.engine.questions import Question, Turns
from rcb_lmms.models.rows import Rows, decoded_once


@dataclass(frozen=True)
class Request(Question):
    """One chat request of lmms-eval, `(ctx, doc_to_messages, gen_kwargs, doc_id, task, split)`.

    Attributes:
        request: as lmms-eval made it.
        doc_id: of the document; a failed sample's `request` loses it (see `PrunedModel`).
        rows: the split that holds it.
    """

    request: Any = None
    task: str = ""
    doc_id: int = 0
    generation: Generation | None = None
    rows: Rows | None = None

    @classmethod
    def of(cls, request: Any, rows: Rows, seed: int) -> Request:
        """From a request and the split that holds its document; `seed` names it for answers drawn at random."""
        _, _, arguments, doc_id, task, _ = request.args
        name = f"{seed} {task} {doc_id}"
        generation = Generation.parse(task, arguments)
        return cls(name=name, request=request, task=task, doc_id=doc_id, generation=generation, rows=rows)

    @property
    def turns(self) -> Turns:
        """The document's conversation, read from the data set each time."""
        return self.request.args[1](self.rows[self.doc_id])

    @property
    def padding(self) -> bool:
        """Whether lmms-eval added this copy only to give every process the same number of requests."""
        return bool((self.request.metadata or {}).get("__padding_only__"))


def questions_of(requests: Sequence[Any], task_dict: Mapping[str, Any], seed: int) -> list[Request]:
    """Questions of requests; those of a split share its `Rows`, and all of them what was decoded."""
    splits, decoded = {tuple(own.args[4:6]) for own in requests}, decoded_once()
    rows = {(task, split): Rows(task_dict[task][split], decoded) for task, split in splits}
    return [Request.of(own, rows[own.args[4:6]], seed) for own in requests]


def grouped(questions: Sequence[Request]) -> list[tuple[tuple[str, Generation], list[int]]]:
    """Indices of questions that may share a batch: tasks together, and in them all questions about an image.

    Tasks and images come in the order of their first appearance: POPE has the questions about an image thousands of
    documents apart.
    """
    groups: dict[tuple[str, Generation], list[int]] = {}
    for index, question in enumerate(questions):
        groups.setdefault((question.task, question.generation), []).append(index)
    order = {task: position for position, task in enumerate(dict.fromkeys(question.task for question in questions))}
    found = []
    for group, indices in sorted(groups.items(), key=lambda group: order[group[0][0]]):
        places = questions[indices[0]].rows.by_image([questions[index].doc_id for index in indices])
        found.append((group, [indices[place] for own in places for place in own]))
    return found
