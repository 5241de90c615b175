"""One case as it behaves now: its entry run through lmms-eval on the subsets, and what was kept of every question."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rcb_lmms.errors import UserError
from rcb_lmms.families.identity import weights_hash
from rcb_lmms.models import PARTS
from rcb_lmms.regress.declaration import Case
from rcb_lmms.regress.golden import COUNTS, Golden, Sample
from rcb_lmms.regress.kept import kept_sets
from rcb_lmms.regress.subset import choose, documents, load_task, restrict
from rcb_lmms.resources import cache_dir

if TYPE_CHECKING:
    from rcb_lmms.engine.session import Session
    from rcb_lmms.families.base import Family
    from rcb_lmms.models.base import PrunedModel
    from rcb_lmms.models.record import RunRecord
    from rcb_lmms.models.requests import Request
    from rcb_lmms.pruners.base import Pruner

# Not what an answer depends on, or said better by a hash of content.
UNCOMPARED = ("pretrained", "codebook", "device", "device_map", "batch_size")


def observe(case: Case, manager: Any, batch_size: int, golden: Golden | None = None) -> Golden:
    """Run a case; killed, the same call continues behind its last batch if the sources are committed.

    Args:
        case: what to run.
        manager: an lmms-eval `TaskManager`.
        batch_size: questions per batch.
        golden: whose documents to ask and whose model to demand; without one the subsets are chosen.

    Raises:
        UserError: other weights, codebook, precision or data than the golden file's, or samples that failed.
    """
    from rcb_lmms.models.invocation import Context, evaluating
    from rcb_lmms.models.journal import forget

    place = cache_dir() / "regress" / hashlib.sha256(str(case.golden.resolve()).encode()).hexdigest()[:16]
    with evaluating(Context(answers=place)) as context:
        model = _model(case, batch_size)
        # The model lets go of its session when lmms-eval is done with it.
        run, session = context.only_record(), model.session
        made_of = _made_of(model.family, run)
        if golden is not None:
            golden.check_made_of(made_of)
        # Tasks choose their words by the entry, and the manager serves the cases in turn.
        manager.model_name = case.entry
        tasks = {name: load_task(name, manager) for name in case.subsets}
        names = {name: _restricted(name, task, case, golden) for name, task in tasks.items()}
        results = _evaluate(model, list(tasks.values()), manager)
    _refuse_failures(case, run)
    samples = [
        sample
        for name, task in tasks.items()
        for sample in _samples(name, task, names[name], results, session.with_pruner(_fitted(model, run, name)))
    ]
    forget(place)
    return Golden(
        case=case.name,
        entry=case.entry,
        arguments=compared_arguments(case.model_args),
        subsets={task: subset.model_dump() for task, subset in case.subsets.items()},
        made_of=made_of,
        resolved=_resolved(run),
        versions=run.versions,
        calibrations={task: _calibration(record) for task, record in run.calibrations.items()},
        metrics={name: _metrics(results["results"][name]) for name in tasks},
        samples=samples,
    )


def compared_arguments(model_args: dict[str, Any]) -> dict[str, str]:
    """The declared arguments that make two cases different, as text."""
    return {name: str(value) for name, value in sorted(model_args.items()) if name not in UNCOMPARED}


def _model(case: Case, batch_size: int) -> PrunedModel:
    from lmms_eval.models import get_model

    if case.entry not in PARTS:
        raise UserError(
            wanted=f"entry {case.entry} of case {case.name}",
            found="no entry of this package",
            allowed=", ".join(PARTS),
            next_step="correct the declaration",
        )
    return get_model(case.entry)(**{**case.model_args, "batch_size": batch_size})


def _restricted(name: str, task: Any, case: Case, golden: Golden | None) -> list[str]:
    wanted = choose(documents(task), case.subsets[name]) if golden is None else golden.names(name)
    return restrict(task, wanted)


def _evaluate(model: PrunedModel, tasks: list[Any], manager: Any) -> dict[str, Any]:
    from lmms_eval.evaluator import simple_evaluate

    with _no_stored_calibration():
        return simple_evaluate(
            model=model, tasks=tasks, task_manager=manager, log_samples=True, bootstrap_iters=0, verbosity="ERROR"
        )


@contextlib.contextmanager
def _no_stored_calibration() -> Iterator[None]:
    """A stored calibration would hide what became of the calibrator."""
    before = os.environ.get("RCB_CACHE")
    with tempfile.TemporaryDirectory() as empty:
        os.environ["RCB_CACHE"] = empty
        try:
            yield
        finally:
            if before is None:
                del os.environ["RCB_CACHE"]
            else:
                os.environ["RCB_CACHE"] = before


def _refuse_failures(case: Case, run: RunRecord) -> None:
    if run.failures:
        raise UserError(
            wanted=f"answers of case {case.name} to every question",
            found=f"{len(run.failures)} samples failed; the first: {run.failures[0]['error']}",
            allowed="complete runs",
            next_step="mend the cause and repeat the command",
        )


def _fitted(model: PrunedModel, run: RunRecord, task: str) -> Pruner:
    from rcb_lmms.calibration.fitting import with_parameters

    calibration = run.calibrations.get(task)
    return with_parameters(model.settings.pruner, calibration["fitted"]) if calibration else model.settings.pruner


def _samples(name: str, task: Any, names: list[str], results: dict[str, Any], session: Session) -> Iterator[Sample]:
    from rcb_lmms.models.requests import questions_of

    rows = {row["doc_id"]: row for row in results["samples"][name]}
    for question in questions_of(task.instances, {name: task.dataset}, seed=0):
        yield _sample(names[question.doc_id], question, rows[question.doc_id], session)


def _sample(name: str, question: Request, row: dict[str, Any], session: Session) -> Sample:
    messages, visuals = question.load(session.family)
    budget = session.pruner.budget
    # Scores are minus the redundancy that a threshold bounds.
    threshold = -budget.value if budget is not None and budget.kind == "threshold" else None
    ids = session.family.chat(messages)
    texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
    (counts,) = row["token_counts"]
    return Sample(
        task=question.task,
        name=name,
        data=_short_hash(" ".join(visual.key for visual in visuals)),
        question="\n".join(texts),
        prompt=_short_hash(json.dumps(ids)),
        target=str(row["target"]),
        answer=str(row["filtered_resps"][0]),
        scores=_scores(row),
        counts={count: counts[count] for count in COUNTS},
        kept=tuple(kept_sets(session.trace(question), threshold)),
    )


def _scores(row: dict[str, Any]) -> dict[str, float]:
    """Numbers among a sample's metrics; a metric is a key that lmms-eval does not write itself."""
    own = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts", "doc_hash", "input_media"}
    found = {}
    for metric in sorted(set(row) - own):
        value = row[metric].get("score") if isinstance(row[metric], dict) else row[metric]
        if isinstance(value, (bool, int, float)):
            found[metric] = float(value)
    return found


def _metrics(results: dict[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in sorted(results.items())
        if isinstance(value, (int, float)) and "," in key and "_stderr" not in key
    }


def _calibration(record: dict[str, Any]) -> dict[str, float]:
    return {"target": record["target"], "achieved": record["achieved"], **record["fitted"]}


def _resolved(run: RunRecord) -> dict[str, str]:
    """Arguments as resolved, what has a hash or does not matter left out."""
    hashed = {"fingerprint", "revision", "codebook_sha256", "dtype"}
    flat = {name: value for name, value in run.resolved.items() if name not in {"pruner", *hashed, *UNCOMPARED}}
    flat |= {f"pruner.{name}": value for name, value in run.resolved["pruner"].items()}
    return {name: str(value) for name, value in sorted(flat.items())}


def _made_of(family: Family, run: RunRecord) -> dict[str, str | None]:
    """What makes two machines' results comparable; named by content, wherever it lies."""
    return {
        "weights": weights_hash(family),
        "codebook": run.resolved["codebook_sha256"],
        "dtype": str(family.dtype),
        "device": family.device.type,
    }


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
