"""lmms-eval requests as questions; their documents are read when they are needed and never kept."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rcb_lmms.engine.options import Generation
from rcb_lmms.engine.questions import Question, Turns


@dataclass(frozen=True)
class Request(Question):
    """One chat request of lmms-eval, `(ctx, doc_to_messages, gen_kwargs, doc_id, task, split)`.

    Attributes:
        request: as lmms-eval made it.
        doc_id: of the document; a failed sample's `request` loses it (see `PrunedModel`).
        dataset: the split that holds it.
    """

    request: Any = None
    task: str = ""
    doc_id: int = 0
    generation: Generation | None = None
    dataset: Any = None

    @classmethod
    def of(cls, request: Any, task_dict: dict[str, Any], seed: int) -> Request:
        """From a request; `seed` names it for answers that are drawn at random."""
        _, _, arguments, doc_id, task, split = request.args
        name = f"{seed} {task} {doc_id}"
        generation = Generation.parse(task, arguments)
        return cls(
            name=name, request=request, task=task, doc_id=doc_id, generation=generation, dataset=task_dict[task][split]
        )

    @property
    def turns(self) -> Turns:
        """The document's conversation, read from the data set each time."""
        return self.request.args[1](self.dataset[self.doc_id])

    @property
    def padding(self) -> bool:
        """Whether lmms-eval added this copy only to give every process the same number of requests."""
        return bool((self.request.metadata or {}).get("__padding_only__"))


def grouped(questions: list[Request]) -> list[tuple[tuple[str, Generation], list[int]]]:
    """Indices of questions that may share a batch: tasks together, and in them all questions about an image.

    Tasks and images come in the order of their first appearance.
    """
    groups: dict[tuple[str, Generation], list[int]] = {}
    for index, question in enumerate(questions):
        groups.setdefault((question.task, question.generation), []).append(index)
    order = {task: position for position, task in enumerate(dict.fromkeys(question.task for question in questions))}
    return [
        (group, _by_image(questions, indices))
        for group, indices in sorted(groups.items(), key=lambda group: order[group[0][0]])
    ]


def _by_image(questions: list[Request], indices: list[int]) -> list[int]:
    """Questions about the same images next to each other: POPE's benchmark has them thousands of documents apart.

    Images are told apart as the data set stores them, undecoded; without any, the order stays.
    """
    dataset = questions[indices[0]].dataset
    columns = _image_columns(getattr(dataset, "features", None) or {})
    if not columns:
        return indices
    stored = dataset.select_columns(columns).with_format("arrow")
    groups: dict[int, list[int]] = {}
    for index in indices:
        groups.setdefault(hash(pickle.dumps(stored[questions[index].doc_id].to_pylist())), []).append(index)
    return list(itertools.chain(*groups.values()))


def _image_columns(features: Mapping[str, Any]) -> list[str]:
    """Names of the columns that hold images, or lists of images."""
    from datasets import Image, List

    inner = {name: own.feature if isinstance(own, List) else own for name, own in features.items()}
    return [name for name, own in inner.items() if isinstance(own, Image)]
