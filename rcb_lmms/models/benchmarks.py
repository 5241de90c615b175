"""lmms-eval's tasks and requests, as documents whose images calibration reads, and the mean budgets fitted to them."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rcb_lmms.calibration import Calibration, Documents, data_hash, fit, score_pass, survey, with_parameters
from rcb_lmms.engine.processes import gather
from rcb_lmms.engine.questions import load_turns
from rcb_lmms.errors import UserError
from rcb_lmms.models.rows import Rows
from rcb_lmms.models.task_data import check_data, unloadable

if TYPE_CHECKING:
    from rcb_lmms.calibration import Target
    from rcb_lmms.families.base import Family
    from rcb_lmms.families.images import Visual
    from rcb_lmms.models.base import PrunedModel
    from rcb_lmms.models.requests import Request
    from rcb_lmms.pruners.base import Pruner

logger = logging.getLogger(__name__)


def documents_of(name: str, rows: Rows, messages: Any, numbers: Sequence[int]) -> Documents:
    """Documents of a split, by number, with the function that makes chat turns of one."""

    def media(family: Family, number: int) -> list[Visual]:
        return load_turns(family, name, messages(rows[number]))[1]

    return Documents(name, numbers, media, rows.fingerprint)


def documents_of_run(task: str, questions: Sequence[Request]) -> Documents:
    """All documents of a task that the run covers, those included that are not asked about any more.

    With `--use_cache` the host sends only the requests whose answers it does not know. All that it made hang on the
    task, whose bound method every request carries.
    """
    first = questions[0]
    made = getattr(getattr(first.to_messages, "__self__", None), "instances", None) or ()
    own = {question.doc_id for question in questions if not question.padding}
    own |= {request.args[3] for request in made if not (request.metadata or {}).get("__padding_only__")}
    return documents_of(task, first.rows, first.to_messages, sorted(set().union(*gather(own))))


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


def load_benchmarks(names: Sequence[str], manager: Any) -> dict[str, dict[str, Documents]]:
    """The documents of benchmarks by name, each with one task or several.

    A group of tasks is one benchmark; of a group that holds groups, every member is one.

    Raises:
        UserError: an unknown name, or data that cannot be loaded.
    """
    from tenacity import RetryError

    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 5)
            raise UserError(
                wanted=f"the task {name}",
                found="no such task or group",
                allowed="names that lmms-eval knows, and rcb_*" + (f"; near: {', '.join(near)}" if near else ""),
                next_step="lmms_eval tasks list, or --include_path FOLDER for a task of your own",
            )
    check_data(names, manager.include_path or ())
    benchmarks: dict[str, dict[str, Documents]] = {}
    for name in names:
        try:
            benchmarks |= _benchmarks(manager.load_task_or_group(name, task_type="chat"))
        except (OSError, ValueError, RetryError) as error:  # what `datasets` and the hub raise for absent data
            raise unloadable(name, error) from error
    return benchmarks


def _benchmarks(loaded: Mapping[Any, Any]) -> dict[str, dict[str, Documents]]:
    found: dict[str, dict[str, Documents]] = {}
    for key, value in loaded.items():
        if not isinstance(value, dict):
            found[key] = {key: _documents_of_task(key, value)}
        elif any(isinstance(member, dict) for member in value.values()):
            found |= _benchmarks(value)
        else:
            found[key.group_name] = {name: _documents_of_task(name, task) for name, task in value.items()}
    return found


def _documents_of_task(name: str, task: Any) -> Documents:
    return documents_of(name, Rows(task.eval_docs), task.doc_to_messages, range(len(task.eval_docs)))
