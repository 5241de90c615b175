"""Questions about images and videos, and how their media are opened."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from rcb_lmms.errors import UserError
from rcb_lmms.families.base import Family
from rcb_lmms.families.images import Visual, whole_images_only
from rcb_lmms.families.prompts import interleave
from rcb_lmms.families.video import placed

if TYPE_CHECKING:
    from torch import Tensor

    from rcb_lmms.engine.ledger import LedgerRow
    from rcb_lmms.pruners.base import Selection, VisualTokens

logger = logging.getLogger(__name__)

Turns = list[dict[str, Any]]
Item, Result = TypeVar("Item"), TypeVar("Result")

READERS = 2  # threads that open images and videos while the model works


@dataclass(frozen=True)
class Question:
    """One question: text with images and videos before it, or a whole conversation.

    Attributes:
        text: what is asked.
        images: paths, open files, PIL images, or a `Visual` that was opened before.
        videos: files, or folders of frames.
        name: says which question it is where answers are drawn at random, so that order and company do not matter.
        messages: in place of the three, turns `{"role": "user", "content": [{"type": "image", "url": IMAGE}, ...]}`.
    """

    text: str = ""
    images: Sequence[Any] = ()
    videos: Sequence[Any] = ()
    name: str = ""
    messages: Turns | None = None

    @property
    def turns(self) -> Turns:
        """The conversation, media by path or as they were given."""
        if self.messages is not None:
            return self.messages
        media = [("image", item) for item in self.images] + [("video", item) for item in self.videos]
        content = [{"type": kind, "url": item} for kind, item in media]
        return [{"role": "user", "content": [*content, {"type": "text", "text": self.text}]}]

    def load(self, family: Family) -> tuple[Turns, list[Visual]]:
        """Chat messages with media marks in place, and the opened images and videos in their order.

        Raises:
            UserError: an image or a video cannot be read, or the conversation holds another medium.
        """
        with whole_images_only():
            return load_turns(family, self.name or "a question", self.turns)

    @property
    def draw_seed(self) -> int:
        """A seed that depends on the question's name alone."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Answer:
    """What became of a question.

    Attributes:
        text: the answer, cut and stripped; empty if there is none.
        row: what it cost; `None` if there is no answer.
        error: why there is no answer.
        asked: names the conversation and its images and videos by their content.
    """

    text: str = ""
    row: LedgerRow | None = None
    error: str | None = None
    asked: str = ""

    @classmethod
    def failed(cls, error: Exception) -> Answer:
        """The answer of a question that raised an error."""
        if not isinstance(error, UserError):
            logger.debug("a question failed", exc_info=error)
            return cls(error=f"{type(error).__name__}: {error}")
        return cls(error=f"{error.wanted}: {error.found}; allowed: {error.allowed}")


def content_of(messages: Turns, visuals: Sequence[Visual]) -> str:
    """A hash of what was asked: the conversation, and its images and videos by their content."""
    keys = [visual.key for visual in visuals]
    return hashlib.sha256(json.dumps([messages, keys]).encode()).hexdigest()[:32]


def said(messages: Turns) -> str:
    """The text of a conversation: what a method that reads the question is given."""
    return "\n".join(item["text"] for turn in messages for item in turn["content"] if item["type"] == "text")


def load_turns(family: Family, name: str, turns: Turns) -> tuple[Turns, list[Visual]]:
    """Chat turns as `Question.load` gives them; files are checked inside `whole_images_only` alone."""
    media = [[(medium(item), item) for item in turn["content"] if item["type"] != "text"] for turn in turns]
    kinds = [kind for own in media for kind, _ in own]
    if other := sorted(set(kinds) - {"image", "video"}):
        raise UserError(
            wanted=f"answer {name} with {family.name}",
            found=f"a document with {', '.join(other)}",
            allowed="images, videos and text",
            next_step="choose a task over images or videos",
        )
    role = family.several if kinds.count("image") > 1 else "image"
    messages, visuals = [], []
    for turn, own in zip(turns, media, strict=True):
        opened = [visual for kind, item in own for visual in _open(family, kind, item, role)]
        text = "\n".join(_text_of(name, item) for item in turn["content"] if item["type"] == "text")
        marks = ["video" if visual.role == "video" else "image" for visual in opened]
        messages.append({"role": turn["role"], "content": interleave(text, marks)})
        visuals += opened
    return messages, visuals


def medium(item: dict[str, Any]) -> str:
    """`image`, `video` or another type; lmms-eval, going by the ending, takes `.webm` videos for audio."""
    webm = item["type"] == "audio" and str(item["url"]).lower().endswith(".webm")
    return "video" if webm else item["type"]


def _text_of(name: str, item: dict[str, Any]) -> str:
    if not isinstance(item["text"], str):
        raise UserError(
            wanted=f"the question of {name}",
            found=f"{item['text']!r} in the place of its text",
            allowed="text",
            next_step="mend the document, or leave it out",
        )
    return item["text"]


def _open(family: Family, kind: str, item: dict[str, Any], role: str) -> list[Visual]:
    if isinstance(item["url"], Visual):  # opened before, in a role of its own
        return [item["url"]]
    if kind == "image":
        return [family.open(item["url"], role)]
    return family.open_video(*placed(item))


@dataclass(frozen=True)
class Trace:
    """What a method kept of one question.

    Attributes:
        views: of each image or video.
        selections: one for each view; whole views under a layer method.
        layer_kept: for a layer method, by layer: kept positions among the prompt's visual tokens, `(k,)` ascending.
        layer_scores: by layer: the score of each of these visual tokens, `(n,)` float32.
    """

    views: list[list[VisualTokens]]
    selections: list[list[Selection]]
    layer_kept: dict[int, Tensor]
    layer_scores: dict[int, Tensor]


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int, most: int | None = None
) -> Iterator[Result]:
    """`map` in order, with `threads` working at the next `most` items while the caller uses a result.

    `most` is by default two for each thread.
    """
    if not threads:
        yield from map(function, items)
        return
    items = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque(pool.submit(function, item) for item in itertools.islice(items, most or 2 * threads))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
                yield result
        finally:
            for future in waiting:
                future.cancel()
