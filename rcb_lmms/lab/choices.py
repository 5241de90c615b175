"""Questions with lettered options, about several images and about videos, in the formats of MuirBench and MVBench."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rcb_lmms.lab.moving import DIRECTIONS
from rcb_lmms.lab.questions import COUNT_WORDS, Question
from rcb_lmms.lab.scenes import COLOURS, SHAPES, SceneObject

LETTERS = "ABCDE"
LETTER_SUFFIX = "\nAnswer with the option's letter from the given choices directly."
BEST_SUFFIX = "Only give the best option.\n"


@dataclass(frozen=True)
class Choice:
    """A question, its options in order, the number of the right one, and the objects that decide it."""

    kind: str
    text: str
    options: tuple[str, ...]
    right: int
    about: tuple[int, ...] = ()

    def lettered(self) -> Question:
        """In the words of MuirBench, MMBench and SEED-Bench, without suffix."""
        listed = "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False))
        return Question(self.kind, self.text + listed, LETTERS[self.right], self.about)

    def bracketed(self) -> Question:
        """In the words of MVBench, without suffix."""
        listed = "".join(f"({letter}) {option}\n" for letter, option in zip(LETTERS, self.options, strict=False))
        return Question(self.kind, f"Question:{self.text}\nOption:\n{listed}", LETTERS[self.right], self.about)


def several_choices(objects: Sequence[SceneObject], kind: str, random: np.random.Generator) -> list[Choice]:
    """A question about the visible `objects` of several images together."""
    if kind == "attribute":
        return _attribute(objects, random, "in the images")
    if kind == "retrieval":
        return _shown(objects, random, "Which of these do the images show?")
    # Existence is asked as a choice too: its options teach letters first.
    return _existence(objects, random, "in any of the images")


def video_choices(
    objects: Sequence[SceneObject], direction: str, moves: bool, kind: str, random: np.random.Generator
) -> list[Choice]:
    """A question about a video whose first object moves; `moves` says whether that one can be seen."""
    if kind == "moving_direction" and moves:
        words = tuple(str(word) for word in random.permutation(list(DIRECTIONS)))
        text = f"In which direction does the {objects[0].phrase} move in the video?"
        return [Choice(kind, text, words, words.index(direction), (0,))]
    if kind == "moving_count" and objects:
        words = tuple(COUNT_WORDS[1:4])
        if random.random() < 0.5:
            words = words[::-1]
        right = words.index(COUNT_WORDS[len(objects)])
        return [Choice(kind, "How many objects are in the video?", words, right, tuple(range(len(objects))))]
    if kind == "moving_attribute":
        return _attribute(objects, random, "in the video", kind)
    if kind == "object_existence":
        return _existence(objects, random, "in the video", kind)
    return []


SEVERAL_KINDS = ("attribute", "retrieval", "existence_choice")
VIDEO_KINDS = ("moving_direction", "moving_count", "moving_attribute", "object_existence")


def _options(right: str, wrong: Sequence[str], random: np.random.Generator, count: int = 4) -> tuple[tuple, int]:
    options = [right, *(str(w) for w in random.permutation(sorted(set(wrong) - {right}))[: count - 1])]
    order = random.permutation(len(options))
    return tuple(options[index] for index in order), int(np.flatnonzero(order == 0)[0])


def _attribute(objects, random, place: str, kind: str = "attribute") -> list[Choice]:
    counts = Counter(item.kind for item in objects)
    unique = [n for n, item in enumerate(objects) if counts[item.kind] == 1 and item.kind in SHAPES]
    if not unique:
        return []
    index = int(random.choice(unique))
    options, right = _options(objects[index].colour, list(COLOURS), random)
    return [Choice(kind, f"What color is the {objects[index].kind} {place}?", options, right, (index,))]


def _shown(objects, random, text: str) -> list[Choice]:
    phrases = sorted({item.phrase for item in objects})
    if not phrases:
        return []
    true = str(random.choice(phrases))
    absent = sorted({f"{colour} {kind}" for colour in COLOURS for kind in SHAPES} - set(phrases))
    options, right = _options(true, [str(p) for p in random.choice(absent, 3, replace=False)], random)
    return [Choice("retrieval", text, options, right, tuple(n for n, o in enumerate(objects) if o.phrase == true))]


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
