"""A model and a method that answer questions: in a notebook, in pictures and regressions, and under lmms-eval."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rcb_lmms.cost import DecoderShape
from rcb_lmms.engine.encoding import ImageEncoder
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
from rcb_lmms.engine.questions import Answer, Question, Trace, Turns, content_of, said
from rcb_lmms.errors import BudgetError, UserError
from rcb_lmms.families.clip import space_of

if TYPE_CHECKING:

    from rcb_lmms.families.base import Family
    from rcb_lmms.families.images import Visual
    from rcb_lmms.families.packed import PackedImage, Prompt
    from rcb_lmms.pruners.base import Pruner

logger = logging.getLogger(__name__)

# Batches whose prompts are made ready together, so that they can be sorted by length.
WINDOW_BATCHES = 8


@dataclass
class _Ready:
    """A question whose prompt is in embedding space, and what was kept of its images."""

    prompt: Prompt
    kept: tuple[str, ...]
    asked: str


class Session:
    """Answers questions with one method on one model; a question that fails costs the others nothing.

    Args:
        family: a loaded model (`rcb_lmms.families.load_family`).
        pruner: the method, fitted if its budget is a mean.
        engine: `auto` or `transformers`, in this process.
        batch_size: questions per forward pass; halved for good when memory runs out.
        per: `view` or `image`: what the budget is spent on.
        positions: `contiguous` numbers what stays; `original` leaves every token of the prompt and the answer at the
            rotary position that it would have without pruning before the language model.
        prefix_cache: `auto` computes what questions about one image have in common once, where it may and where
            questions share it; `on` demands it, `off` never does. In float32 answers are the same.
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
        engine: str = "auto",
        batch_size: int = 8,
        per: str = "view",
        positions: str = "contiguous",
        prefix_cache: str = "auto",
        seed: int = 0,
        encoder: ImageEncoder | None = None,
    ):
        if engine not in ("auto", "transformers"):
            raise UserError(
                wanted=f"engine={engine}",
                found="no such engine",
                allowed="auto, transformers",
                next_step="engine=auto",
            )
        self.family, self.pruner, self.batch_size, self.per, self.seed = family, pruner, batch_size, per, seed
        space_of(family, pruner)  # refused here rather than at every question
        self.prefixes = PrefixCache(family, prefix_cache == "on") if shares_prefix(pruner, prefix_cache) else None
        self.prefix_cache, self.positions = prefix_cache, positions
        self.encoder = encoder or ImageEncoder(family, pruner.needs, per=per)
        self.shape = DecoderShape.of(family.model.config)
        self.context: int | None = getattr(family.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def seconds(self) -> Counter[str]:
        """See the class."""
        return self.encoder.clock.seconds

    def with_pruner(self, pruner: Pruner) -> Session:
        """Another method on the same model and the same encoded images."""
        self.encoder.add_needs(pruner.needs)
        own = ("batch_size", "per", "positions", "prefix_cache", "seed")
        return Session(self.family, pruner, encoder=self.encoder, **{name: getattr(self, name) for name in own})

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
        begin = 0
        while begin < len(questions):
            window = dict(enumerate(questions[begin : begin + WINDOW_BATCHES * self.batch_size], begin))
            begin += len(window)
            before = self.encoder.clock.before_prefill()
            ready, failed = self._prepare(window)
            self.seconds["first_token"] += self.encoder.clock.before_prefill() - before
            yield from failed.items()
            for batch in self._batches(ready, 1 if generation.sampled else None):
                yield from self._generate(batch, window, generation).items()

    def _batches(self, ready: dict[int, _Ready], size: int | None) -> Iterator[dict[int, _Ready]]:
        """Prompts of like lengths together; those without images share nothing, and keep others from it."""
        by_length = sorted(ready, key=lambda index: len(ready[index].prompt))
        for alike in (True, False):
            own = [index for index in by_length if (ready[index].prompt.prefix_name is not None) == alike]
            begin = 0
            while begin < len(own):  # the size may have been halved since
                chosen = own[begin : begin + (size or self.batch_size)]
                begin += len(chosen)
                yield {index: ready[index] for index in chosen}

    # From questions to prompts

    def _prepare(self, window: dict[int, Question]) -> tuple[dict[int, _Ready], dict[int, Answer]]:
        loaded, ready, failed = {}, {}, {}
        with self.encoder.clock.timed("open"):
            for index, question in window.items():
                try:
                    loaded[index] = question.load(self.family)
                except Exception as error:  # whatever a damaged document raises
                    failed[index] = _failed(error)
        packed = self._pack_all(loaded)
        with self.encoder.clock.timed("pack"):
            for index, (messages, visuals) in loaded.items():
                try:
                    if isinstance(packed[index], Exception):
                        raise packed[index]
                    ready[index] = self._embed(messages, visuals, packed[index])
                except BudgetError:
                    raise
                except Exception as error:
                    failed[index] = _failed(error)
        return ready, failed

    def _pack_all(self, loaded: dict[int, Any]) -> dict[int, list[PackedImage] | Exception]:
        """Pruned images of each question: of all in one go or, where that fails, question by question."""
        try:
            if not self.pruner.sees_question or self.pruner.stage != "view":
                every = [visual for _, visuals in loaded.values() for visual in visuals]
                packed = iter(self.encoder.packed(every, self.pruner))
                return {index: [next(packed) for _ in visuals] for index, (_, visuals) in loaded.items()}
        except BudgetError:
            raise
        except Exception as error:
            logger.debug("encoding a window failed, so its questions are encoded one by one: %s", error)
        found: dict[int, list[PackedImage] | Exception] = {}
        for index, (messages, visuals) in loaded.items():
            try:
                found[index] = self.encoder.packed(visuals, self.pruner, said(messages))
            except BudgetError:
                raise
            except Exception as error:
                found[index] = error
        return found

    def _embed(self, messages: Turns, visuals: list[Visual], packed: list[PackedImage]) -> _Ready:
        # A text is at least as long as its tokens, up to many letters each: refused before it is cut into tokens.
        longest = 64 * (self.context or 1 << 20)
        if len(said(messages)) > longest:
            raise self._too_long(f"a text of {len(said(messages))} characters")
        ids = self.family.chat(messages)
        whole = self.positions == "original"  # then pruned tokens take up positions too
        length = len(ids) + sum((own.extent if whole and own.extent else len(own.rows)) - 1 for own in packed)
        if self.context is not None and length >= self.context:
            raise self._too_long(f"a prompt of {length} tokens")
        kept = tuple(view for own in packed for view in own.kept)
        prompt = self.family.embed(ids, packed, original=whole)
        words = prompt.prefix - sum(len(own.rows) - 1 for own in packed)  # up to the last image, each one word
        name = (*ids[:words], *(visual.key for visual in visuals)) if visuals else None
        return _Ready(replace(prompt, prefix_name=name), kept, content_of(messages, visuals))

    def _too_long(self, found: str) -> UserError:
        return UserError(
            wanted="an answer",
            found=found,
            allowed=f"prompts and answers of {self.context} tokens together, the model's context",
            next_step="shorten the question, keep fewer visual tokens, or show fewer images",
        )

    # From prompts to answers

    def _generate(
        self, batch: dict[int, _Ready], window: dict[int, Question], generation: Generation
    ) -> dict[int, Answer]:
        """Answers of one batch; halved where it fails, until it fits or the failing question stands alone."""
        import torch

        if generation.sampled:
            torch.manual_seed(window[next(iter(batch))].draw_seed)
        try:
            prompts = [ready.prompt for ready in batch.values()]
            options = dict(generation.options)
            prefixes = self.prefixes if self.prefixes and self.prefixes.serves(prompts, options) else None
            with self.encoder.clock.timed("decode"):
                generated = generate(self.family, prompts, options, self.pruner, self.per, prefixes)
            self.seconds["decode"] -= generated.prefill_seconds
            self.seconds["prefill"] += generated.prefill_seconds
            self.seconds["first_token"] += len(batch) * generated.prefill_seconds
        except BudgetError:
            raise
        except Exception as error:
            if len(batch) == 1:
                return dict.fromkeys(batch, _failed(error))
            if out_of_memory(error):
                self.batch_size = len(batch) // 2
                torch.cuda.empty_cache()
            items, middle = list(batch.items()), len(batch) // 2
            first, second = dict(items[:middle]), dict(items[middle:])
            return self._generate(first, window, generation) | self._generate(second, window, generation)
        return {
            index: self._answer(ready, generated, row, generation) for row, (index, ready) in enumerate(batch.items())
        }

    def _answer(self, ready: _Ready, generated: Generated, row: int, generation: Generation) -> Answer:
        prompt, output = ready.prompt, generated.output_tokens[row]
        if not generated.finite[row]:
            return Answer(error="the language model's logits are not finite numbers")
        if self.context is not None and prompt.end + output > self.context:
            return _failed(self._too_long(f"a prompt of {len(prompt)} tokens and an answer of {output}"))
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


def _failed(error: Exception) -> Answer:
    if not isinstance(error, UserError):
        logger.debug("a question failed", exc_info=error)
        return Answer(error=f"{type(error).__name__}: {error}")
    return Answer(error=f"{error.wanted}: {error.found}; allowed: {error.allowed}")
