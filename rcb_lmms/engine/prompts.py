"""From questions to prompts in embedding space: their media opened, encoded, pruned and packed, a window at a time."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rcb_lmms.engine.questions import Answer, Question, Turns, content_of, said
from rcb_lmms.errors import BudgetError, UserError

if TYPE_CHECKING:
    from rcb_lmms.engine.encoding import ImageEncoder
    from rcb_lmms.families.base import Family
    from rcb_lmms.families.images import Visual
    from rcb_lmms.families.packed import PackedImage, Prompt
    from rcb_lmms.pruners.base import Pruner

logger = logging.getLogger(__name__)

# A conversation with its media and `asked`, as in `Answer`; or why it could not be opened.
Opened = tuple[Turns, "list[Visual]", str] | Answer


@dataclass(frozen=True)
class Loaded:
    """What is asked, once, by the questions with these `indices`, media opened; `asked` as in `Answer`."""

    indices: list[int]
    messages: Turns
    visuals: list[Visual]
    asked: str


@dataclass(frozen=True)
class Ready:
    """The same with its prompt in embedding space, and what was kept of its images.

    `shared` says whether keys and values of the prompt's beginning are looked up.
    """

    indices: list[int]
    prompt: Prompt
    kept: tuple[str, ...]
    asked: str
    shared: bool = False


class Prompts:
    """Makes prompts of questions; a question that fails costs the others nothing.

    Args:
        family: a loaded model.
        encoder: of its images.
        pruner: the method.
        positions: `contiguous` or `original`, see `Session`.

    Attributes:
        context: tokens of a prompt and its answer that the model has room for; `None` if it does not say.
    """

    def __init__(self, family: Family, encoder: ImageEncoder, pruner: Pruner, positions: str):
        self.family, self.encoder, self.pruner, self.positions = family, encoder, pruner, positions
        self.context: int | None = getattr(family.model.config.get_text_config(), "max_position_embeddings", None)

    def open(self, question: Question) -> Opened:
        """A question with its media opened and hashed, or the answer that says why that failed."""
        try:
            messages, visuals = question.load(self.family)
            return messages, visuals, content_of(messages, visuals)
        except Exception as error:  # whatever a damaged document raises
            return Answer.failed(error)

    def of(
        self, window: Iterable[int], opened: Iterator[Opened], alike: bool = True
    ) -> tuple[list[Ready], dict[int, Answer]]:
        """Prompts of the questions with these indices, and failures by index.

        Args:
            window: indices of questions.
            opened: gives what `open` made of each of them next.
            alike: make one prompt of questions in the same words about the same images: POPE asks after each present
                object in three categories.

        Raises:
            BudgetError: a budget that cannot be met, or a method that broke its own.
        """
        loaded, failed = self._distinct(window, opened, alike)
        packed = self._pack_all(loaded)
        ready = []
        with self.encoder.clock.timed("pack"):
            for own, images in zip(loaded, packed, strict=True):
                try:
                    if isinstance(images, Exception):
                        raise images
                    ready.append(self._embed(own, images))
                except BudgetError:
                    raise
                except Exception as error:
                    failed |= dict.fromkeys(own.indices, Answer.failed(error))
        return ready, failed

    def _distinct(
        self, window: Iterable[int], opened: Iterator[Opened], alike: bool
    ) -> tuple[list[Loaded], dict[int, Answer]]:
        loaded: dict[Hashable, Loaded] = {}
        failed = {}
        with self.encoder.clock.timed("open"):
            for index in window:
                found = next(opened)
                if isinstance(found, Answer):
                    failed[index] = found
                else:
                    own = loaded.setdefault(found[2] if alike else index, Loaded([], *found))
                    own.indices.append(index)
        return list(loaded.values()), failed

    def _pack_all(self, loaded: list[Loaded]) -> list[list[PackedImage] | Exception]:
        """Pruned images of each question: of all in one go or, where that fails, question by question."""
        try:
            if not self.pruner.sees_question or self.pruner.stage != "view":
                every = [visual for own in loaded for visual in own.visuals]
                packed = iter(self.encoder.packed(every, self.pruner))
                return [[next(packed) for _ in own.visuals] for own in loaded]
        except BudgetError:
            raise
        except Exception as error:
            logger.debug("encoding a window failed, so its questions are encoded one by one: %s", error)
        found: list[list[PackedImage] | Exception] = []
        for own in loaded:
            try:
                found.append(self.encoder.packed(own.visuals, self.pruner, said(own.messages)))
            except BudgetError:
                raise
            except Exception as error:
                found.append(error)
        return found

    def _embed(self, loaded: Loaded, packed: list[PackedImage]) -> Ready:
        words = said(loaded.messages)
        # A text is at least as long as its tokens, up to many letters each: refused before it is cut into tokens.
        if len(words) > 64 * (self.context or 1 << 20):
            raise self.too_long(f"a text of {len(words)} characters")
        ids = self.family.chat(loaded.messages)
        whole = self.positions == "original"  # then pruned tokens take up positions too
        length = len(ids) + sum((own.extent if whole and own.extent else len(own.rows)) - 1 for own in packed)
        if self.context is not None and length >= self.context:
            raise self.too_long(f"a prompt of {length} tokens")
        kept = tuple(view for own in packed for view in own.kept)
        prompt = self.family.embed(ids, packed, original=whole)
        before = prompt.prefix - sum(len(own.rows) - 1 for own in packed)  # ids up to the last image, each one id
        name = (*ids[:before], *(visual.key for visual in loaded.visuals)) if loaded.visuals else None
        return Ready(loaded.indices, replace(prompt, prefix_name=name), kept, loaded.asked)

    def too_long(self, found: str) -> UserError:
        """The error of a prompt or an answer that the model has no room for."""
        return UserError(
            wanted="an answer",
            found=found,
            allowed=f"prompts and answers of {self.context} tokens together, the model's context",
            next_step="shorten the question, keep fewer visual tokens, or show fewer images",
        )
