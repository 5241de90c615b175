"""Questions with lettered options: about one image, several images, and videos."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rcb_lmms.lab.moving import DIRECTIONS
from rcb_lmms.lab.scene_questions import COUNT_WORDS
from rcb_lmms.lab.scenes import COLOURS, SHAPES, SceneObject
from rcb_lmms.lab.wordings import LETTERS, Question


@dataclass(frozen=True)
class Choice:
    """A question, its options in order, the number of the right one, and the objects that decide it."""

    kind: str
    text: str
    options: tuple[str, ...]
    right: int
    about: tuple[int, ...] = ()

    @property
    def letter(self) -> str:
        """The letter of the right option."""
        return LETTERS[self.right]

    def asked(self, wording: Callable[[Choice], str]) -> Question:
        """The question in a benchmark's words, one of `wordings`."""
        return Question(self.kind, wording(self), self.letter, self.about)


def image_choices(
    objects: Sequence[SceneObject], kind: str, random: np.random.Generator, options: int = 4
) -> list[Choice]:
    """A question about the visible `objects` of one image, with at most so many options."""
    if kind == "attribute":
        return _property(objects, random, "colour", "What color is the {} in the image?", kind, options)
    if kind == "identity":
        return _property(objects, random, "kind", "What is the {} object?", kind, options)
    if kind == "retrieval":
        return _shown(objects, random, "Which of the options does the image show?", options)
    return _existence(objects, random, "in the image")


def several_choices(objects: Sequence[SceneObject], kind: str, random: np.random.Generator) -> list[Choice]:
    """A question about the visible `objects` of several images together."""
    if kind == "attribute":
        return _property(objects, random, "colour", "What color is the {} in the images?", kind)
    if kind == "retrieval":
        return _shown(objects, random, "Which of these do the images show?")
    # Existence is asked as a choice too: its options teach letters first.
    return _existence(objects, random, "in any of the images")


def video_choices(
    objects: Sequence[SceneObject],
    direction: str,
    moves: bool,
    kind: str,
    random: np.random.Generator,
    options: int = 4,
) -> list[Choice]:
    """A question about a video whose first object moves; `moves` says whether that one can be seen."""
    if kind == "moving_direction" and moves:
        # Two options are opposites.
        words = next(pair for pair in _AXES if direction in pair) if options == 2 else tuple(DIRECTIONS)
        words = tuple(str(word) for word in random.permutation(words))
        text = f"In which direction does the {objects[0].phrase} move in the video?"
        return [Choice(kind, text, words, words.index(direction), (0,))]
    if kind == "moving_count" and objects:
        words = tuple(COUNT_WORDS[1:4])
        if random.random() < 0.5:
            words = words[::-1]
        right = words.index(COUNT_WORDS[len(objects)])
        return [Choice(kind, "How many objects are in the video?", words, right, tuple(range(len(objects))))]
    if kind == "moving_attribute":
        return _property(objects, random, "colour", "What color is the {} in the video?", kind, options)
    if kind == "object_existence":
        return _existence(objects, random, "in the video", kind)
    return []


IMAGE_KINDS = ("attribute", "identity", "retrieval", "existence_choice")
SEVERAL_KINDS = ("attribute", "retrieval", "existence_choice")
VIDEO_KINDS = ("moving_direction", "moving_count", "moving_attribute", "object_existence")
_AXES = (("left", "right"), ("up", "down"))


def _options(right: str, wrong: Sequence[str], random: np.random.Generator, count: int = 4) -> tuple[tuple, int]:
    options = [right, *(str(w) for w in random.permutation(sorted(set(wrong) - {right}))[: count - 1])]
    order = random.permutation(len(options))
    return tuple(options[index] for index in order), int(np.flatnonzero(order == 0)[0])


def _property(objects, random, asked: str, text: str, kind: str, options: int = 4) -> list[Choice]:
    """The `asked` property of an object, its `colour` or `kind`, that the other one names among all `objects`."""
    known, answers = {"colour": ("kind", COLOURS), "kind": ("colour", SHAPES)}[asked]
    counts = Counter(getattr(item, known) for item in objects)
    unique = [n for n, item in enumerate(objects) if counts[getattr(item, known)] == 1 and item.kind in SHAPES]
    if not unique:
        return []
    index = int(random.choice(unique))
    words, right = _options(getattr(objects[index], asked), list(answers), random, options)
    return [Choice(kind, text.format(getattr(objects[index], known)), words, right, (index,))]


def _shown(objects, random, text: str, options: int = 4) -> list[Choice]:
    phrases = sorted({item.phrase for item in objects if item.kind in SHAPES})
    if not phrases:
        return []
    true = str(random.choice(phrases))
    absent = sorted({f"{colour} {kind}" for colour in COLOURS for kind in SHAPES} - set(phrases))
    wrong = [str(phrase) for phrase in random.choice(absent, options - 1, replace=False)]
    words, right = _options(true, wrong, random, options)
    return [Choice("retrieval", text, words, right, tuple(n for n, o in enumerate(objects) if o.phrase == true))]


def _existence(objects, random, place: str, kind: str = "existence_choice") -> list[Choice]:
    present = sorted({phrase for item in objects for phrase in (item.phrase, item.kind) if item.kind in SHAPES})
    absent = sorted({*SHAPES, *(f"{colour} {kind}" for colour in COLOURS for kind in SHAPES)} - set(present))
    if random.random() < 0.5 and present:
        phrase, answer = str(random.choice(present)), "yes"
    else:
        phrase, answer = str(random.choice(absent)), "no"
    options = ("yes", "no") if random.random() < 0.5 else ("no", "yes")
    about = tuple(n for n, item in enumerate(objects) if phrase in (item.kind, item.phrase))
    return [Choice(kind, f"Is there a {phrase} {place}?", options, options.index(answer), about)]
