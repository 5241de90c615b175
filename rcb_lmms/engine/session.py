"""A model and a method that answer questions: in a notebook, in pictures and regressions, and under lmms-eval."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rcb_lmms.cost import DecoderShape
from rcb_lmms.engine.encoding import ImageEncoder
from rcb_lmms.engine.engines import Engine, check_engine, start_engine
from rcb_lmms.engine.generation import (
    Generated,
    among_visual,
    generate,
    layer_steps,
    left_pad,
    out_of_memory,
    prune_prompts,
    shares,
)
from rcb_lmms.engine.ledger import ledger_row, pack_kept
from rcb_lmms.engine.options import Generation, shares_prefix
from rcb_lmms.engine.prefix import PrefixCache
from rcb_lmms.engine.prompts import Prompts, Ready
from rcb_lmms.engine.questions import READERS, Answer, Question, Trace, ahead, said
from rcb_lmms.errors import BudgetError
from rcb_lmms.families.clip import space_of
from rcb_lmms.families.images import whole_images_only

if TYPE_CHECKING:
    from rcb_lmms.families.base import Family
    from rcb_lmms.pruners.base import Pruner

# Batches whose prompts are made ready together, so that they can be sorted by length.
WINDOW_BATCHES = 8


class Session:
    """Answers questions with one method on one model; a question that fails costs the others nothing.

    Args:
        family: a loaded model (`rcb_lmms.families.load_family`).
        pruner: the method, fitted if its budget is a mean.
        engine: `auto` or `transformers`, which answer in this process; `vllm`, which is started beside it with its own
            language model, for methods before that; or an engine that runs.
        batch_size: questions per forward pass; halved for good when memory runs out.
        per: `view` or `image`: what the budget is spent on.
        positions: `contiguous` numbers what stays; `original` leaves every token of the prompt and the answer at the
            rotary position that it would have without pruning before the language model.
        prefix_cache: `auto` computes what questions about one image have in common once, where it may and where
            questions share it, and answers equal questions once; `on` demands it, `off` answers each by itself. In
            float32 answers are the same.
        seed: of answers that are drawn at random.
        encoder: of another session on the same model, to share its images.

    Attributes:
        seconds: spent so far by stage, see `Clock`; also by other sessions that share its encoder.
    """

    def __init__(
        self,
        family: Family,
        pruner: Pruner,
        *,
        engine: str | Engine = "auto",
        batch_size: int = 8,
        per: str = "view",
        positions: str = "contiguous",
        prefix_cache: str = "auto",
        seed: int = 0,
        encoder: ImageEncoder | None = None,
    ):
        check_engine(engine, pruner, positions)
        self.family, self.pruner, self.batch_size, self.per, self.seed = family, pruner, batch_size, per, seed
        space_of(family, pruner)  # refused here rather than at every question
        self.prefixes = PrefixCache(family, prefix_cache == "on") if shares_prefix(pruner, prefix_cache) else None
        self.prefix_cache, self.positions = prefix_cache, positions
        self.encoder = encoder or ImageEncoder(family, pruner.needs, per=per)
        self.shape = DecoderShape.of(family.model.config)
        self.engine = start_engine(engine, family, prefix_cache) if isinstance(engine, str) else engine
        self.prompts = Prompts(family, self.encoder, pruner, positions)

    @property
    def seconds(self) -> Counter[str]:
        """See the class."""
        return self.encoder.clock.seconds

    def with_pruner(self, pruner: Pruner) -> Session:
        """Another method on the same model and the same encoded images."""
        self.encoder.add_needs(pruner.needs)
        own = ("batch_size", "per", "positions", "prefix_cache", "seed", "encoder")
        options = {name: getattr(self, name) for name in own}
        return Session(self.family, pruner, engine=self.engine or "transformers", **options)

    def answer(self, questions: Sequence[Question], **generation: Any) -> list[Answer]:
        """Answer questions, in their order.

        Args:
            questions: any number, about any images and videos.
            generation: `max_new_tokens`, `do_sample`, `temperature`, `top_p`, `top_k`, `num_beams`,
                `repetition_penalty` and `until`, strings that an answer is cut at.

        Raises:
            UserError: an argument that is not supported.
            BudgetError: a budget that cannot be met, or a method that broke its own.
        """
        answers = dict(self.stream(questions, Generation.parse("answer", generation)))
        return [answers[index] for index in range(len(questions))]

    def stream(self, questions: Sequence[Question], generation: Generation) -> Iterator[tuple[int, Answer]]:
        """Answers with the index of their question, as they come: batch by batch, each window sorted by length."""
        if self.engine is not None:
            self.engine.check(generation)
        begin = 0
        opened = ahead(self.prompts.open, questions, READERS, self.batch_size)
        with whole_images_only(), contextlib.closing(opened):  # a matter of the process, not of a thread
            while begin < len(questions):
                size = WINDOW_BATCHES * self.batch_size if self.engine is None else self.engine.window
                window = dict(enumerate(questions[begin : begin + size], begin))
                begin += len(window)
                clock = self.encoder.clock
                before = clock.before_prefill()
                alike = self.prefix_cache != "off" and not generation.sampled
                ready, failed = self.prompts.of(window, opened, alike)
                clock.seconds["first_token"] += clock.before_prefill() - before
                yield from failed.items()
                for batch in self._batches(ready, generation):
                    yield from self._generate(batch, window, generation).items()

    def _batches(self, ready: list[Ready], generation: Generation) -> Iterator[list[Ready]]:
        """Prompts of like lengths together; those that share their beginnings apart from those that do not.

        An engine makes batches itself.
        """
        if self.engine is not None:
            yield from [ready] if ready else []
            return
        names = [own.prompt.prefix_name for own in ready]
        # transformers does not spread a given cache over beams.
        sharing = self.prefixes.shared(names) if self.prefixes and not generation.beams else set()
        by_length = sorted(ready, key=lambda own: len(own.prompt))
        for shared in (True, False):
            own = [replace(one, shared=shared) for one in by_length if (one.prompt.prefix_name in sharing) == shared]
            begin = 0
            while begin < len(own):  # the size may have been halved since
                batch = own[begin : begin + (1 if generation.sampled else self.batch_size)]
                begin += len(batch)
                yield batch

    # From prompts to answers

    def _generate(self, batch: list[Ready], window: dict[int, Question], generation: Generation) -> dict[int, Answer]:
        """Answers of one batch; halved where it fails, until it fits or the failing question stands alone."""
        import torch

        seeds = [window[ready.indices[0]].draw_seed for ready in batch]
        if generation.sampled:
            torch.manual_seed(seeds[0])
        prompts = [ready.prompt for ready in batch]
        prefixes = self.prefixes if batch[0].shared else None
        try:
            with self.encoder.clock.timed("decode"):
                if self.engine is not None:
                    generated = self.engine.generate(prompts, generation, seeds)
                else:
                    options = dict(generation.options)
                    generated = generate(self.family, prompts, options, self.pruner, self.per, prefixes)
        except BudgetError:
            raise
        except Exception as error:
            if len(batch) == 1:
                return dict.fromkeys(batch[0].indices, Answer.failed(error))
            if out_of_memory(error):
                self.batch_size = len(batch) // 2
                torch.cuda.empty_cache()
            middle = len(batch) // 2
            first, second = batch[:middle], batch[middle:]
            return self._generate(first, window, generation) | self._generate(second, window, generation)
        self.encoder.clock.move(generated.prefill_seconds, "decode", "prefill")
        self.seconds["first_token"] += sum(len(ready.indices) for ready in batch) * generated.prefill_seconds
        answers = [self._answer(ready, generated, row, generation) for row, ready in enumerate(batch)]
        return {index: own for ready, own in zip(batch, answers, strict=True) for index in ready.indices}

    def _answer(self, ready: Ready, generated: Generated, row: int, generation: Generation) -> Answer:
        prompt, output = ready.prompt, generated.output_tokens[row]
        if not generated.finite[row]:
            return Answer(error="the language model's logits are not finite numbers")
        if self.prompts.context is not None and prompt.end + output > self.prompts.context:
            return Answer.failed(self.prompts.too_long(f"a prompt of {len(prompt)} tokens and an answer of {output}"))
        steps, kept = generated.steps[row], ready.kept
        if steps:
            kept = (pack_kept(generated.layer_kept[row].tolist(), prompt.retained),)
        own = ledger_row(prompt, output, self.shape, self.pruner, steps, shares(prompt, self.per), kept)
        return Answer(generation.cut(generated.texts[row]), own, asked=ready.asked)

    # What was kept

    def trace(self, question: Question) -> Trace:
        """Show what the method keeps of a question's images; a layer method is run on its prompt, once.

        Raises:
            UserError: an image cannot be read, or a budget cannot be met.
        """
        import torch

        messages, visuals = question.load(self.family)
        views, selections = self.encoder.choices(visuals, self.pruner, said(messages))
        layer_kept, layer_scores = {}, {}
        if self.pruner.stage == "layers" and visuals:
            prompt = self.family.embed(self.family.chat(messages), self.encoder.packed(visuals, self.pruner))
            steps = layer_steps(self.pruner, prompt, self.family.layers, self.per)
            embeds, mask, _ = left_pad([prompt])
            with (
                torch.inference_mode(),
                prune_prompts(self.family.model, self.pruner, [steps], [list(prompt.spans)]) as pruning,
            ):
                self.family.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False, logits_to_keep=1)
            for step in pruning.steps:
                layer_kept[step.layer] = among_visual(prompt, step.kept[0])
                layer_scores[step.layer] = step.scores[0]
        return Trace(views, selections, layer_kept, layer_scores)
