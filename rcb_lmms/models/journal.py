"""Answers written as they come, so that a run killed at any moment continues behind its last batch.

lmms-eval keeps nothing before a whole run is answered. The files of a folder are told apart by everything an answer
depends on, and whoever started the run removes them once its results are saved.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult

from rcb_lmms.engine.questions import content_of
from rcb_lmms.families.base import Family
from rcb_lmms.files import append_jsonl, read_jsonl
from rcb_lmms.models.record import VisualTokenCounts
from rcb_lmms.models.requests import Request
from rcb_lmms.resources import sources_hash


class Journal:
    """Answers of one run, of all its processes.

    Args:
        folder: where the files are; without one nothing is kept.
        identity: everything answers depend on besides the question; another identity is another journal.
        rank: of this process, which writes a file of its own.
    """

    def __init__(self, folder: Path | None, identity: dict[str, Any], rank: int):
        self._file: Path | None = None
        self._known: dict[str, dict[str, Any]] = {}
        if folder is None:
            return
        whole = {**identity, "sources": sources_hash()}
        name = hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self._file = folder / f"{name}-{rank}.jsonl"
        for file in sorted(folder.glob(f"{name}-*.jsonl")):
            self._known |= {row["question"]: row for row in read_jsonl(file)}

    def answer(self, question: Request, parameters: dict[str, Any], family: Family) -> GenerationResult | None:
        """The answer given before to the same words and images under the same fitted `parameters`, or `None`."""
        row = self._known.get(_name(question, parameters))
        if row is None:
            return None
        try:
            asked = content_of(*question.load(family))
        except Exception:  # it fails again, and is told, when it is to be answered
            return None
        return GenerationResult(row["text"], VisualTokenCounts(**row["counts"])) if asked == row["asked"] else None

    def write(self, question: Request, parameters: dict[str, Any], asked: str, answer: GenerationResult) -> None:
        """Keep an answer; `asked` names the words and images that it answers."""
        if self._file is not None:
            row = {"question": _name(question, parameters), "asked": asked, "text": answer.text}
            append_jsonl(self._file, row | {"counts": dataclasses.asdict(answer.token_counts)})


def _name(question: Request, parameters: dict[str, Any]) -> str:
    return json.dumps([question.task, question.doc_id, repr(question.generation), parameters])


def forget(place: Path) -> None:
    """Remove a folder of journals, once the results they led to are saved."""
    shutil.rmtree(place, ignore_errors=True)
