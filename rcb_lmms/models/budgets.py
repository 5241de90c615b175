"""Calibration over the very requests of a task, wherever they are spread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rcb_lmms.calibration import fitting
from rcb_lmms.errors import UserError
from rcb_lmms.models.arguments import VIDEO
from rcb_lmms.models.processes import gather
from rcb_lmms.models.questions import Request
from rcb_lmms.pruners.base import Pruner

if TYPE_CHECKING:
    from rcb_lmms.families.images import Visual
    from rcb_lmms.models.arguments import Target
    from rcb_lmms.models.base import PrunedModel

# What a record says of the tokens that a threshold was fitted to, besides the family's own options.
ENCODING = ("pretrained", "fingerprint", "codebook_sha256", "preprocess", "dtype", "per", *VIDEO)


def calibrate_requests(
    model: PrunedModel, task: str, questions: list[Request], target: Target
) -> tuple[Pruner, fitting.Calibration, bool]:
    """Fit the entry's method to a task's requests; every process gets the same result.

    Returns:
        The fitted method, the record, and whether it came from the cache or a file of thresholds.

    Raises:
        UserError: no image, a budget that the images cannot meet, or one that the file does not have.
    """
    pruner, file = model.settings.pruner, model.settings.thresholds
    if file is not None:
        file.row(task, target)  # refused before a whole benchmark is opened
    own = [question for question in questions if not question.padding]
    keys = [[visual.key for visual in _opened(model, question)] for question in own]
    weights = Counter(key for of_question in keys for key in of_question)
    if not (every := sum(gather(weights), Counter())):
        raise UserError(
            wanted=f"a mean budget over task {task}",
            found="no image or video that can be read",
            allowed="tasks over images or videos",
            next_step="check the task's data with the unpruned entry, which says what is wrong with each sample",
        )
    data = fitting.data_hash(every)
    if file is not None:
        record = file.calibration(task, target, data, float(sum(every.values())))
        return fitting.with_parameters(pruner, record.fitted), record, True
    identity = {
        "task": task,
        "data": data,
        "target": str(target),
        "pruner": model.run.resolved["pruner"],
        **{name: model.run.resolved[name] for name in (*ENCODING, *model.family.options)},
    }
    if all(gather((record := fitting.cached(identity)) is not None)):
        return fitting.with_parameters(pruner, record.fitted), record, True
    baselines = {} if target.baseline is None else {"baseline": target.baseline}
    scores = fitting.score_pass(model.encoder, {"method": pruner}, baselines, _visuals(model, own, keys), weights)
    scores = fitting.ScorePass(per=scores.per).merge(gather(scores))
    if target.baseline is not None:
        tokens = scores.baseline("baseline")
    else:
        tokens = target.tokens if target.tokens is not None else target.ratio * scores.mean(scores.natives)
    fitted, record = fitting.fit(pruner, scores, "method", tokens, data)
    if model.rank == 0:
        fitting.remember(identity, record)
    return fitted, record, False


def _opened(model: PrunedModel, question: Request) -> list[Visual]:
    try:
        return question.load(model.family)[1]
    except Exception:
        # The same failure is met, recorded and reported when the question is to be answered.
        return []


def _visuals(model: PrunedModel, questions: list[Request], keys: list[list[str]]) -> Iterator[Visual]:
    """Each distinct visual once, opened again when its turn comes: a benchmark does not fit into memory."""
    seen: set[str] = set()
    for question, of_question in zip(questions, keys, strict=True):
        if not seen.issuperset(of_question):
            for visual in _opened(model, question):
                if visual.key not in seen:
                    seen.add(visual.key)
                    yield visual
