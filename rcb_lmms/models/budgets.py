"""The mean budget of a run: fitted to a task's documents, or read from a file of thresholds."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from rcb_lmms.calibration import Calibration, data_hash, fit, score_pass, survey, with_parameters
from rcb_lmms.models.documents import documents_of_run

if TYPE_CHECKING:
    from rcb_lmms.calibration import Target
    from rcb_lmms.models.base import PrunedModel
    from rcb_lmms.models.questions import Request
    from rcb_lmms.pruners.base import Pruner

logger = logging.getLogger(__name__)


def calibrate_requests(
    model: PrunedModel, task: str, questions: list[Request], target: Target
) -> tuple[Pruner, Calibration, bool, dict[int, str]]:
    """Fit the entry's method to the documents of a task; every process gets the same result.

    Returns:
        The fitted method, the record, whether no image had to be scored for it, and what is wrong with the documents
        that cannot be read: they must not be answered, since the budget was met without them.

    Raises:
        UserError: no image, a budget that the images cannot meet, or one that the file does not have.
    """
    pruner, file, encoder = model.settings.pruner, model.settings.thresholds, model.encoder
    documents = documents_of_run(task, questions)
    if file is not None:
        file.row(task, target)  # refused before a whole benchmark is opened
        asked, errors = survey(encoder.family, documents)
        record = file.calibration(task, target, data_hash(asked), float(sum(asked.values())), len(errors))
        fitted, known = with_parameters(pruner, record.fitted), True
    else:
        baselines = {target.text: target.measured} if target.measured else {}
        scores = score_pass(encoder, pruner, baselines, documents, reread=True)
        fitted, record = fit(pruner, scores, target.mean(scores, encoder.family.layers))
        known, errors = scores.reused, scores.errors
    if errors:
        logger.warning(
            "%s: %d of %d documents cannot be read, twice each; the budget is met over the others, and these fail",
            task,
            len(errors),
            len(documents),
        )
    return fitted, record, known, errors
