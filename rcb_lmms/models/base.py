"""The lmms-eval model that all entries share: requests in, answers and a ledger out. The work is the session's."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from tqdm import tqdm

from rcb_lmms.engine.engines import start_engine
from rcb_lmms.engine.processes import gather, own_device, rank_and_size
from rcb_lmms.engine.questions import Answer
from rcb_lmms.engine.session import Session
from rcb_lmms.errors import UserError, leave_with
from rcb_lmms.families import load_family
from rcb_lmms.models import entry_id, invocation
from rcb_lmms.models.argument_types import parse_arguments
from rcb_lmms.models.arguments import describe, resolve
from rcb_lmms.models.benchmarks import calibrate_requests
from rcb_lmms.models.journal import Journal
from rcb_lmms.models.record import RunRecord, VisualTokenCounts, report_metrics, summarize, versions
from rcb_lmms.models.requests import Request, dealt, grouped, questions_of
from rcb_lmms.pruners.base import Pruner

logger = logging.getLogger(__name__)


class PrunedModel(lmms):
    """A LLaVA model with visual token pruning, as lmms-eval wants it.

    Without arguments an entry means the paper's setting: the family's public checkpoint, its released codebook and a
    mean of 64 retained tokens per view (image, tile, frame), calibrated on the task at hand.

    Raises:
        UserError: unknown or contradictory arguments, a missing checkpoint or codebook, widths that do not fit.
    """

    is_simple = False
    family_name: ClassVar[str]
    method: ClassVar[str]

    def __init__(self, **arguments: Any):
        super().__init__()
        with leave_with():
            invocation.warn_of_host_command()
            invocation.refuse_response_cache()
            arguments = _seeded(arguments)
            self.settings = resolve(self.family_name, self.method, arguments)
            loading = dict(self.settings.loading)
            if own := own_device(self.settings.engine_options.get("tensor_parallel_size", 1)):
                loading["device"] = own
            self.family = load_family(**loading)
            codebook = getattr(self.settings.pruner, "codebook", None)
            if codebook is not None:
                codebook.check_family(self.family)
            settings = self.settings
            engine = start_engine(settings.engine, self.family, settings.prefix_cache, settings.engine_options)
        self._device = self.family.device
        self.session = Session(
            self.family,
            self.settings.pruner,
            engine=engine or "transformers",
            batch_size=self.settings.batch_size,
            per=self.settings.per,
            positions=self.settings.positions,
            prefix_cache=self.settings.prefix_cache,
        )
        self.encoder = self.session.encoder
        self.encoder.add_needs(self._needs())
        if self.settings.thresholds is not None:
            with leave_with():
                self.settings.thresholds.check(self.encoder, self.settings.pruner)
        self.rows: list[tuple[str, VisualTokenCounts]] = []
        self.seconds = 0.0
        # Documents that could not be read when a budget was fitted, by task and number: they fail, though they may be
        # readable by now, since the mean was taken without them.
        self.uncalibrated: dict[tuple[str, int], str] = {}
        self.run = RunRecord(
            model=entry_id(self.family_name, self.method),
            arguments={name: str(value) for name, value in arguments.items()},
            resolved={**describe(self.settings, self.family), "engine": engine.facts if engine else "transformers"},
            versions=versions(),
        )
        context = invocation.current_context()
        context.records.append(self.run)
        identity = {"model": self.run.model, "versions": self.run.versions, **self.run.resolved}
        self.journal = Journal(context.answers, {**identity, "batch_size": None}, rank_and_size()[0])
        self.resumed = 0

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> PrunedModel:
        """What the evaluator calls; a batch size or device in model_args counts, not lmms-eval's own argument."""
        from lmms_eval.utils import simple_parse_args_string

        with leave_with():
            parse_arguments(arg_string)
            given = simple_parse_args_string(arg_string)
            for name in given.keys() & (additional_config or {}).keys():
                asked = invocation.argument(f"--{name}")
                if asked not in (None, str(given[name])):
                    logger.warning("%s=%s in model_args counts, not --%s %s", name, given[name], name, asked)
        return cls(**{**(additional_config or {}), **given})

    @property
    def device(self) -> torch.device:
        """Where the model is; the evaluator gathers on it."""
        return self._device

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Refused: none of the benchmarks this package is for needs it, and the host cannot use it with chat models."""
        raise _generation_only("loglikelihood")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Refused: see `loglikelihood`."""
        raise _generation_only("generate_until_multi_round")

    def generate_until(self, requests: list[Any]) -> list[GenerationResult]:
        """Answer all requests of a run, in any mixture of tasks.

        A sample that cannot be answered is recorded as failed and taken out of the scoring; it never becomes an empty
        answer that counts as wrong.

        Raises:
            UserError: the budget cannot be met, or not one sample could be answered.
        """
        with leave_with():
            if invocation.asked_through_cache():
                raise invocation.cache_refused()
            started, worked = time.perf_counter(), time.process_time()
            questions = questions_of(requests, self.task_dict, self.settings.seed)
            pruners = {
                task: self._pruner_for(task, [question for question in questions if question.task == task])
                for task in dict.fromkeys(question.task for question in questions)
            }
            mine = dealt(questions)
            answered = dict(zip(mine, self._answers(list(mine.values()), pruners), strict=True))
            everywhere = {at: result for own in gather(answered) for at, result in own.items()}
            self.seconds += time.perf_counter() - started
            self.session.seconds["processor"] += time.process_time() - worked
            self._refuse_if_nothing_was_answered(len(questions))
            rank, _ = rank_and_size()
            return [_for_host(request, everywhere[rank, place]) for place, request in enumerate(requests)]

    def _answers(self, questions: list[Request], pruners: dict[str, Pruner]) -> list[GenerationResult | None]:
        """Results in the order of the questions; `None` for a sample that failed."""
        found: dict[int, GenerationResult | None] = {}
        with tqdm(total=len(questions), desc="questions", unit="q", disable=self.rank != 0) as progress:
            for (task, generation), indices in grouped(questions):
                before = self._answered_before(questions, indices)
                found |= before
                progress.update(len(before))
                left = [index for index in indices if index not in before]
                session = self.session.with_pruner(pruners[task])
                for number, answer in session.stream([questions[index] for index in left], generation):
                    found[left[number]] = self._result(questions[left[number]], answer)
                    progress.update()
        return [found[index] for index in range(len(questions))]

    def _answered_before(self, questions: list[Request], indices: list[int]) -> dict[int, GenerationResult | None]:
        """Answers that an interrupted run of the same command gave, and failures known since the budget was fitted."""
        found = {}
        for index in indices:
            question = questions[index]
            if error := self.uncalibrated.get((question.task, question.doc_id)):
                found[index] = self._failed(question, f"unreadable when the budget was fitted, twice: {error}")
            elif (answer := self.journal.answer(question, self._fitted(question.task), self.family)) is not None:
                found[index] = answer
                if not question.padding:
                    self.rows.append((question.task, answer.token_counts))
                    self.resumed += 1
        return found

    def _result(self, question: Request, answer: Answer) -> GenerationResult | None:
        """An answer as lmms-eval wants it, written down before the next one is made."""
        if answer.row is None:
            return self._failed(question, answer.error)
        counts = VisualTokenCounts(**{**asdict(answer.row), "kept": list(answer.row.kept)})
        if not question.padding:
            self.rows.append((question.task, counts))
        result = GenerationResult(answer.text, counts)
        self.journal.write(question, self._fitted(question.task), answer.asked, result)
        return result

    def _failed(self, question: Request, error: str) -> None:
        """Record a failure."""
        row = {"task": question.task, "doc_id": question.doc_id, "error": error}
        logger.error("sample failed and is excluded: %s", row)
        if not question.padding:
            self.run.failures.append(row)

    def _refuse_if_nothing_was_answered(self, asked: int) -> None:
        # Of all processes: one whose questions all fail must not leave the others waiting for it.
        failures, answered = zip(*gather((self.run.failures, len(self.rows))), strict=True)
        if any(failures) and not sum(answered):
            raise UserError(
                wanted=f"answers to {asked} questions",
                found=f"every one failed; the first: {next(filter(None, failures))[0]['error']}",
                allowed="a run in which at least one sample can be answered",
                next_step="mend the first failure and repeat the command",
            )

    # Budgets

    def _needs(self) -> frozenset[str]:
        target = self.settings.target
        baseline = target.measured.needs if target is not None and target.measured is not None else frozenset()
        return self.settings.pruner.needs | baseline

    def _pruner_for(self, task: str, questions: list[Request]) -> Pruner:
        """The method, fitted to this task's images if the budget is a mean."""
        target = self.settings.target
        if target is None:
            return self.settings.pruner
        pruner, record, from_cache, errors = calibrate_requests(self, task, questions, target)
        self.run.calibrations[task] = {**asdict(record), "cached": from_cache}
        self.uncalibrated |= {(task, number): error for number, error in errors.items()}
        return pruner

    def _fitted(self, task: str) -> dict[str, float]:
        return self.run.calibrations.get(task, {}).get("fitted", {})

    def clean(self) -> None:
        """Gather what all processes did, report it once, and free the model."""
        every = gather((self.rows, self.run.failures, self.seconds, self.encoder.encoded_images, self.resumed))
        stages, counts, engine = Counter(), Counter(), self.session.engine
        for seconds, own in gather((self.session.seconds, engine.counts if engine else {})):
            stages.update(seconds)
            counts.update(own)
        rows = [row for own, *_ in every for row in own]
        self.run.failures = [failure for _, own, *_ in every for failure in own]
        seconds = max(own for _, _, own, *_ in every)
        resumed = sum(own for *_, own in every)
        self.run.achieved = summarize(rows)
        self.run.totals = {
            "questions": len(rows),
            "failed_samples": len(self.run.failures),
            "resumed_questions": resumed,
            "images_encoded": sum(own for *_, own, _ in every),
            "seconds": seconds,
            **{f"seconds_{stage}": spent for stage, spent in sorted(stages.items())},
            **counts,
            "questions_per_second": (len(rows) - resumed) / seconds if seconds else 0.0,
        }
        if self.rank == 0 and rows:
            report_metrics(self.run, rows)
        if engine is not None:
            engine.close()
        # The host deletes modules it finds on this object; ours hang below it.
        self.family = self.session = self.encoder = None
        super().clean()


def _for_host(request: Any, result: GenerationResult | None) -> GenerationResult:
    """A result, or nothing of a sample that failed; without its document id, the evaluator leaves it out.

    lmms-eval has no other way of leaving a sample out of every metric: an empty answer would be scored as a wrong one.
    """
    if result is None:
        request.doc_id = None
        return GenerationResult("")
    return result


def _seeded(arguments: dict[str, Any]) -> dict[str, Any]:
    """model_args with lmms-eval's own seed as the default of `seed`."""
    asked = invocation.asked_seed()
    own = arguments.get("seed")
    if asked is None or own is None:
        return arguments if asked is None else {**arguments, "seed": asked}
    if str(own) != str(asked):
        logger.warning("seed=%s in model_args counts, not --seed %s", own, asked)
    return arguments


def _generation_only(name: str) -> UserError:
    return UserError(
        wanted=f"{name} requests",
        found="a model that generates answers",
        allowed="tasks with output_type generate_until",
        next_step="choose the generating variant of the task (seedbench rather than seedbench_ppl)",
    )
