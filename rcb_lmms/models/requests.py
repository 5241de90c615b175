"""lmms-eval requests as questions; their documents are read when they are needed and never kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rcb_lmms.engine.options import Generation
from rcb_lmms.engine.processes import gather, rank_and_size
from rcb_lmms.engine.questions import Question, Turns
from rcb_lmms.models.rows import Rows, decoded_once


@dataclass(frozen=True)
class Request(Question):
    """One chat request of lmms-eval, `(ctx, doc_to_messages, gen_kwargs, doc_id, task, split)`.

    Attributes:
        task: its name.
        split: of the task's data.
        doc_id: of the document.
        generation: from `gen_kwargs`.
        stored: names the images that the document stores; `None` if it stores none.
        padding: whether lmms-eval added this copy only to give every process the same number of requests.
        rows: the split's documents.
        to_messages: makes chat turns of one.
    """

    task: str = ""
    split: str = ""
    doc_id: int = 0
    generation: Generation | None = None
    stored: str | None = None
    padding: bool = False
    rows: Rows | None = None
    to_messages: Callable[[Any], Turns] | None = None

    @classmethod
    def of(cls, request: Any, rows: Rows, seed: int) -> Request:
        """From a request and the documents of its split; `seed` names it for answers drawn at random."""
        _, to_messages, arguments, doc_id, task, split = request.args
        return cls(
            name=f"{seed} {task} {doc_id}",
            task=task,
            split=split,
            doc_id=doc_id,
            generation=Generation.parse(task, arguments),
            stored=rows.stored_images(doc_id),
            padding=bool((request.metadata or {}).get("__padding_only__")),
            rows=rows,
            to_messages=to_messages,
        )

    @property
    def turns(self) -> Turns:
        """The document's conversation, read from the data set each time."""
        return self.to_messages(self.rows[self.doc_id])


def questions_of(requests: Sequence[Any], task_dict: Mapping[str, Any], seed: int) -> list[Request]:
    """Questions of requests; those of a split share its `Rows`, and all of them what was decoded."""
    splits, decoded = {tuple(own.args[4:6]) for own in requests}, decoded_once()
    rows = {(task, split): Rows(task_dict[task][split], decoded) for task, split in splits}
    return [Request.of(own, rows[own.args[4:6]], seed) for own in requests]


def dealt(questions: Sequence[Request]) -> dict[tuple[int, int], Request]:
    """What this process answers of the questions of all, by the process that was asked and the question's place there.

    lmms-eval deals documents out one by one, so that hardly two questions about an image would meet in a process. Here
    all of them go to one, which encodes the image and computes what they have in common once. An image with more
    questions than an even share is cut, and a process is given questions of those tasks alone of which it has some.
    """
    rank, size = rank_and_size()
    own = {(question.task, question.split): question for question in questions}
    # What stays behind, a data set and a bound method, every process that knows the split has itself.
    every = gather(([replace(question, rows=None, to_messages=None) for question in questions], set(own)))
    if len(every) == 1:
        return {(rank, place): question for place, question in enumerate(questions)}
    asked = {(process, place): one for process, (theirs, _) in enumerate(every) for place, one in enumerate(theirs)}
    groups: dict[Hashable, list[tuple[int, int]]] = {}
    for at, question in sorted(asked.items(), key=lambda item: item[0][::-1]):  # in the order of the documents
        groups.setdefault((question.task, question.split, question.generation, question.stored or at), []).append(at)
    shares: list[list[tuple[int, int]]] = [[] for _ in every]
    even = math.ceil(len(asked) / size)
    for (task, split, *_), group in groups.items():
        able = [share for share, (_, known) in zip(shares, every, strict=True) if (task, split) in known]
        for begin in range(0, len(group), even):
            min(able, key=len).extend(group[begin : begin + even])
    mine = {}
    for at in shares[rank]:
        like = own[asked[at].task, asked[at].split]
        mine[at] = replace(asked[at], rows=like.rows, to_messages=like.to_messages)
    return mine


def grouped(questions: Sequence[Request]) -> list[tuple[tuple[str, Generation], list[int]]]:
    """Indices of questions that may share a batch: tasks together, and in them all questions about an image.

    Tasks and images come in the order of their first appearance: POPE has the questions about an image thousands of
    documents apart.
    """
    first: dict[Hashable, int] = {}
    order = []
    for index, question in enumerate(questions):
        image = (question.task, question.generation, question.stored or index)
        places = (question.task, (question.task, question.generation), image)
        order.append([first.setdefault(place, index) for place in places])
    groups: dict[tuple[str, Generation], list[int]] = {}
    for index in sorted(range(len(questions)), key=order.__getitem__):
        groups.setdefault((questions[index].task, questions[index].generation), []).append(index)
    return list(groups.items())
