"""The lmms-eval model all entries share: requests in, answers and a ledger out."""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from tqdm import tqdm

from rcb_lmms.budget import layer_average
from rcb_lmms.cost import DecoderShape
from rcb_lmms.engine.encoding import ImageEncoder
from rcb_lmms.engine.generation import generate, out_of_memory, shares
from rcb_lmms.errors import UserError, leave_with
from rcb_lmms.families import Prompt, load_family
from rcb_lmms.models import entry_id
from rcb_lmms.models.arguments import describe, resolve
from rcb_lmms.models.budgets import calibrate_requests
from rcb_lmms.models.journal import Journal
from rcb_lmms.models.ledger import RUNS, RunRecord, VisualTokenCounts, report_metrics, summarize, versions
from rcb_lmms.models.processes import gather, rank_and_size
from rcb_lmms.models.questions import Generation, Question, grouped
from rcb_lmms.pruners.base import Pruner

logger = logging.getLogger(__name__)

# Batches whose prompts are made ready together, so that they can be sorted by length.
WINDOW_BATCHES = 8


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
            self.settings = resolve(self.family_name, self.method, arguments)
            loading = dict(self.settings.loading)
            rank, size = rank_and_size()
            if size > 1 and torch.cuda.is_available():
                loading["device"] = f"cuda:{rank % torch.cuda.device_count()}"
            self.family = load_family(**loading)
            codebook = getattr(self.settings.pruner, "codebook", None)
            if codebook is not None:
                codebook.check_width(self.family.width, self.family.pretrained)
        self._device = self.family.device
        self.shape = DecoderShape.of(self.family.model.config)
        self.batch_size = self.settings.batch_size
        self.encoder = ImageEncoder(self.family, self._needs(), per=self.settings.per)
        if self.settings.thresholds is not None:
            with leave_with():
                self.settings.thresholds.check(self.encoder, self.settings.pruner)
        self.rows: list[tuple[str, VisualTokenCounts]] = []
        self.seconds = 0.0
        self.run = RunRecord(
            model=entry_id(self.family_name, self.method),
            arguments={name: str(value) for name, value in arguments.items()},
            resolved=describe(self.settings, self.family),
            versions=versions(),
        )
        RUNS.append(self.run)
        identity = {"model": self.run.model, "versions": self.run.versions, **self.run.resolved}
        self.journal = Journal({**identity, "batch_size": None}, rank)
        self.resumed = 0

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
            started = time.perf_counter()
            questions = [Question.of(request, self.task_dict) for request in requests]
            groups = grouped(questions)
            pruners = {
                task: self._pruner_for(task, [questions[index] for _, indices in own for index in indices])
                for task, own in itertools.groupby(groups, key=lambda group: group[0][0])
            }
            answers: dict[int, GenerationResult] = {}
            with tqdm(total=len(questions), desc="questions", unit="q", disable=self.rank != 0) as progress:
                for (task, generation), indices in groups:
                    before = self._answered_before(questions, indices)
                    answers |= before
                    progress.update(len(before))
                    left = [index for index in indices if index not in before]
                    step = WINDOW_BATCHES * self.batch_size
                    for begin in range(0, len(left), step):
                        window = {index: questions[index] for index in left[begin : begin + step]}
                        answers |= self._answer_window(window, generation, pruners[task])
                        progress.update(len(window))
            self.seconds += time.perf_counter() - started
            self._refuse_if_nothing_was_answered(len(questions))
            return [answers[index] for index in range(len(questions))]

    def _answered_before(self, questions: list[Question], indices: list[int]) -> dict[int, GenerationResult]:
        """Answers that a run of the same command gave before it was interrupted."""
        found = {}
        for index in indices:
            question = questions[index]
            if (answer := self.journal.answer(question, self._fitted(question.task))) is not None:
                found[index] = answer
                if not question.padding:
                    self.rows.append((question.task, answer.token_counts))
                    self.resumed += 1
        return found

    def _answer_window(
        self, window: dict[int, Question], generation: Generation, pruner: Pruner
    ) -> dict[int, GenerationResult]:
        """Answers of a few batches of questions, by index."""
        answers, loaded = {}, {}
        for index, question in window.items():
            try:
                loaded[index] = question.load(self.family)
            except Exception as error:
                answers[index] = self._failed(question, error)
        visuals = [visual for _, own in loaded.values() for visual in own]
        packed = iter(self.encoder.packed(visuals, pruner))
        prompts = {
            index: self.family.embed(self.family.chat(messages), list(itertools.islice(packed, len(own))))
            for index, (messages, own) in loaded.items()
        }
        by_length = sorted(prompts, key=lambda index: len(prompts[index]))
        size = 1 if generation.sampled else self.batch_size
        for begin in range(0, len(by_length), size):
            batch = {index: prompts[index] for index in by_length[begin : begin + size]}
            answers |= self._answer_batch(batch, window, generation, pruner)
        return answers

    def _answer_batch(
        self, batch: dict[int, Prompt], window: dict[int, Question], generation: Generation, pruner: Pruner
    ) -> dict[int, GenerationResult]:
        """Answers of one batch; halved where it fails, until it fits or the failing sample stands alone."""
        layer_pruner = pruner if pruner.stage == "layers" else None
        if generation.sampled:
            torch.manual_seed(self._draw_seed(window[next(iter(batch))]))
        try:
            options = dict(generation.options)
            generated = generate(self.family, list(batch.values()), options, layer_pruner, self.settings.per)
        except UserError:
            raise
        except Exception as error:
            if len(batch) == 1:
                (index,) = batch
                return {index: self._failed(window[index], error)}
            if out_of_memory(error):
                self.batch_size = len(batch) // 2
                torch.cuda.empty_cache()
            items = list(batch.items())
            middle = len(items) // 2
            return self._answer_batch(dict(items[:middle]), window, generation, pruner) | self._answer_batch(
                dict(items[middle:]), window, generation, pruner
            )
        answers = {}
        for row, (index, prompt) in enumerate(batch.items()):
            rank = None if generated.layer_kept is None else generated.layer_kept[row]
            counts = self._counts(prompt, generated.output_tokens[row], layer_pruner, rank)
            if not window[index].padding:
                self.rows.append((window[index].task, counts))
            answers[index] = GenerationResult(generation.cut(generated.texts[row]), counts)
            self.journal.write(window[index], self._fitted(window[index].task), answers[index])
        return answers

    def _counts(
        self, prompt: Prompt, output_tokens: int, layer_pruner: Pruner | None, rank: int | None
    ) -> VisualTokenCounts:
        native, kept = prompt.native, prompt.retained
        average, pruned, capped = float(kept), (None, None), False
        if layer_pruner is not None and prompt.spans:
            kept = rank
            capped = layer_pruner.capped(prompt.retained, shares(prompt, self.settings.per))
            average = layer_average(kept, prompt.retained, layer_pruner.layer, self.shape.layers)
            # FastV's candidates are the visual tokens that stand in the prompt; newlines between them stay.
            pruned = (layer_pruner.layer, len(prompt) - prompt.retained + kept)
        return VisualTokenCounts(
            input_tokens=len(prompt),
            output_tokens=output_tokens,
            visual_native=native,
            visual_kept=kept,
            visual_newlines=prompt.newlines,
            visual_views=prompt.views,
            visual_layer_average=average,
            visual_capped=int(capped),
            prefill_tflops=self.shape.prefill_flops(len(prompt), *pruned) / 1e12,
        )

    def _failed(self, question: Question, error: Exception) -> GenerationResult:
        """Record a failure; without its document id, the evaluator leaves the sample out of every metric."""
        doc_id = question.request.doc_id
        row = {"task": question.task, "doc_id": doc_id, "error": f"{type(error).__name__}: {error}"}
        logger.error("sample failed and is excluded: %s", row, exc_info=not isinstance(error, UserError))
        if not question.padding:
            self.run.failures.append(row)
        question.request.doc_id = None
        return GenerationResult("")

    def _refuse_if_nothing_was_answered(self, asked: int) -> None:
        if self.run.failures and not self.rows:
            raise UserError(
                wanted=f"answers to {asked} questions",
                found=f"every one failed; the first: {self.run.failures[0]['error']}",
                allowed="a run in which at least one sample can be answered",
                next_step="mend the first failure and repeat the command",
            )

    def _draw_seed(self, question: Question) -> int:
        # Drawn answers depend on the seed and the sample, not on the order or the number of processes.
        name = f"{self.settings.seed} {question.task} {question.request.doc_id}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1

    # Budgets

    def _needs(self) -> frozenset[str]:
        target = self.settings.target
        baseline = target.baseline.needs if target is not None and target.baseline is not None else frozenset()
        return self.settings.pruner.needs | baseline

    def _pruner_for(self, task: str, questions: list[Question]) -> Pruner:
        """The method, fitted to this task's images if the budget is a mean."""
        target = self.settings.target
        if target is None:
            return self.settings.pruner
        pruner, record, from_cache = calibrate_requests(self, task, questions, target)
        self.run.calibrations[task] = {**asdict(record), "cached": from_cache}
        return pruner

    def _fitted(self, task: str) -> dict[str, float]:
        return self.run.calibrations.get(task, {}).get("fitted", {})

    def clean(self) -> None:
        """Gather what all processes did, report it once, and free the model."""
        every = gather((self.rows, self.run.failures, self.seconds, self.encoder.encoded_images, self.resumed))
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
            "questions_per_second": (len(rows) - resumed) / seconds if seconds else 0.0,
        }
        if self.rank == 0 and rows:
            report_metrics(self.run, rows)
        # The host deletes modules it finds on this object; ours hang below it.
        self.family = self.encoder = None
        super().clean()


def _generation_only(name: str) -> UserError:
    return UserError(
        wanted=f"{name} requests",
        found="a model that generates answers",
        allowed="tasks with output_type generate_until",
        next_step="choose the generating variant of the task (seedbench rather than seedbench_ppl)",
    )
