"""One training example of the second stage: which tokens of which pictures are seen, and what is asked about them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from rcb_lmms.lab.choices import BEST_SUFFIX, LETTER_SUFFIX, SEVERAL_KINDS, VIDEO_KINDS, several_choices, video_choices
from rcb_lmms.lab.examples import Example
from rcb_lmms.lab.packing import Prompted
from rcb_lmms.lab.pointing import option_places, points_of
from rcb_lmms.lab.questions import (
    COUNT_WORDS,
    KINDS_OF_QUESTION,
    ONE_WORD_SUFFIX,
    PHRASE_SUFFIX,
    YES_NO_SUFFIX,
    Question,
    blind,
    caption,
    probe,
)
from rcb_lmms.lab.scenes import GRID, Scene, SceneObject

# Slots that hold no visual token: the newline embedding, and tokens of text.
NEWLINE, TEXT = -1, -2
_SUFFIX_WEIGHTS = {PHRASE_SUFFIX: 0.25, ONE_WORD_SUFFIX: 0.1, YES_NO_SUFFIX: 0.1, "": 0.55}


@dataclass(frozen=True)
class View:
    """An example as one step sees it, slot by slot between the words before the images and the question.

    `panel (k,)` is a panel or one of `NEWLINE`, `TEXT`; `sources (k, r)` tower tokens; `owner (k,)` the object or -1;
    `taught (k,)`; `places (k, 2)`; `blanked (k,)`; `words (k,)` the token of a text slot. `points` holds for every
    question where its words should look: see `pointing`.
    """

    example: Example
    panel: np.ndarray
    sources: np.ndarray
    owner: np.ndarray
    taught: np.ndarray
    places: np.ndarray
    blanked: np.ndarray
    words: np.ndarray
    questions: list[Prompted]
    points: list[list]

    def __len__(self) -> int:
        return len(self.panel)

    @property
    def shown(self) -> np.ndarray:
        """Slots that show an object well enough to be asked about it, `(k,)` bool."""
        return (self.panel >= 0) & ~self.blanked & self.taught & (self.owner >= 0)


def choose_tokens(owner: np.ndarray, count: int, random: np.random.Generator, early: bool) -> np.ndarray:
    """Indices of `count` of the tokens, ascending: at random, objects first, or background first."""
    order = random.random(owner.size)
    taste = random.random()
    on_object = owner.ravel() >= 0
    if taste < (0.8 if early else 0.4):
        order -= on_object
    elif taste > (1.0 if early else 0.9):
        order += on_object
    return np.sort(np.argsort(order, kind="stable")[:count])


def make_view(example: Example, count: int, wording, random: np.random.Generator, progress: float) -> View:
    """Draw what one training example keeps and asks; `progress` in [0, 1] goes from easy to everything.

    Answers hold of what is visible, not of the whole scene: the truth about objects without tokens would only teach
    the model to guess.
    """
    # `count` is of a whole panel of 144; pooled panels are a quarter as large.
    share = -(-count * len(example.panels[0]) // (GRID * GRID)) if count < GRID * GRID else GRID * GRID
    kept = [choose_tokens(panel.owner, min(share, len(panel)), random, progress < 0.2) for panel in example.panels]
    slots = lay_out(example, kept, wording, random)
    panel, token, words = (np.array(column) for column in zip(*slots, strict=True))
    sight = panel >= 0

    def of(name: str, other):
        rows = [getattr(example.panels[p], name)[t] if p >= 0 else other for p, t in zip(panel, token, strict=True)]
        return np.array(rows)

    sources = of("sources", np.zeros_like(example.panels[0].sources[0]))
    blanked = sight & (random.random(len(panel)) < (random.choice([0.03, 0.1, 0.3]) if random.random() < 0.15 else 0))
    view = View(
        example, panel, sources, of("owner", -1), of("taught", False), of("places", np.zeros(2)), blanked, words, [], []
    )
    pairs = 5 if count > 8 else 3
    asked = _ask(view, pairs, random, progress)
    questions = [wording(question, suffix) for question, suffix in asked]
    visible = np.unique(view.owner[view.shown])
    slots_of = {index: np.flatnonzero(view.shown & (view.owner == index)) for index in visible}
    points = []
    for (question, _), prompted in zip(asked, questions, strict=True):
        looks = [
            ("noun", place, np.concatenate([slots_of[i] for i in meant]))
            for place, meant in points_of(prompted.prompt, example.objects, visible, wording)
        ]
        if looks and question.kind not in ("position", "where"):  # which have two names
            looks.append(("name", len(prompted.prompt) - 1, np.array([looks[0][1]])))
        points.append(looks + option_places(prompted.prompt, question.answer, wording))
    return dataclasses.replace(view, questions=questions, points=points)


def lay_out(example: Example, kept: list[np.ndarray], wording, random: np.random.Generator) -> list[tuple]:
    """Slots `(panel, token, word)` of an example in one of the packings that its family knows."""
    slots: list[tuple[int, int, int]] = []
    rows = [[(number, int(token), 0) for token in tokens] for number, tokens in enumerate(kept)]
    newline = (NEWLINE, 0, 0)
    if example.medium == "several":
        marked = random.random() < 0.5
        for number, row in enumerate(rows):
            before = wording.text(f" image {COUNT_WORDS[number + 1]}: " if marked else "")
            between = wording.text("\n") if number else []
            slots += [(TEXT, 0, word) for word in [*between, *before]] + [*row, newline]
        return slots
    if example.medium == "video":
        return [slot for row in rows for slot in row] + [newline]
    whole = all(len(tokens) == len(panel) for tokens, panel in zip(kept, example.panels, strict=True))
    tiled = example.medium in ("doubled", "tiled")
    if tiled and len(rows) > 1 and whole and random.random() < 0.6:
        # The native packing: the rows of all tiles side by side, a newline behind each.
        columns = example.scene.size[0] // (GRID * 14)
        for top in range(0, len(rows) - 1, columns):
            for line in range(GRID):
                for tile in range(1 + top, 1 + top + columns):
                    slots += rows[tile][line * GRID : (line + 1) * GRID]
                slots.append(newline)
        return rows[0] + slots
    slots = [slot for row in rows for slot in row]
    return slots + [newline] * (tiled and (len(rows) == 1 or random.random() < 0.5))


def _ask(view: View, pairs: int, random: np.random.Generator, progress: float) -> list[tuple[Question, str]]:
    """Questions with their suffixes, about what the view shows."""
    visible = np.unique(view.owner[view.shown])
    objects = [view.example.objects[index] for index in visible]
    medium = view.example.medium
    if medium in ("several", "video"):
        return _choices(view, objects, pairs - 1, random) + _loose(view, objects, random)
    scene = dataclasses.replace(view.example.scene, objects=tuple(objects))
    if not objects:
        return [(question, _suffix(question, random)) for question in blind(view.example.scene, random, pairs)]
    weights = KIND_WEIGHTS[medium]
    asked = probe(scene, random) if random.random() < 0.4 else []
    for kind in random.choice(list(weights), size=pairs, p=list(weights.values())):
        asked += KINDS_OF_QUESTION[str(kind)](scene, random)
    if progress > 0.3 and random.random() < 0.12:
        asked += caption(scene, random)
    return [(question, _suffix(question, random)) for question in asked or probe(scene, random)]


# How often a pair of questions of each kind is drawn; probe and caption are drawn per scene instead.
KIND_WEIGHTS = {
    "plain": {
        "pope": 0.13, "existence": 0.02, "color": 0.07, "count": 0.14, "position": 0.20, "side": 0.12, "OCR": 0.05,
        "open": 0.07, "where": 0.20,
    },
    "doubled": {"pope": 0.25, "existence": 0.05, "color": 0.15, "open": 0.1, "side": 0.1, "where": 0.35},
    "tiled": {"pope": 0.5, "existence": 0.1, "color": 0.25, "open": 0.15},
}  # fmt: skip


def _choices(view: View, objects, number: int, random) -> list[tuple[Question, str]]:
    asked, example = [], view.example
    if example.medium == "video":
        for kind in random.choice(VIDEO_KINDS, size=number, p=(0.55, 0.2, 0.15, 0.1)):
            found = video_choices(objects, example.scene.direction, _moves(view), str(kind), random)
            asked += [(choice.bracketed(), BEST_SUFFIX) for choice in found]
        return asked
    for kind in random.choice(SEVERAL_KINDS, size=number, p=(0.45, 0.35, 0.2)):
        found = several_choices(objects, str(kind), random)
        asked += [(choice.lettered(), LETTER_SUFFIX) for choice in found]
    return asked


def _moves(view: View) -> bool:
    """Whether the moving object of a video is seen through most of it."""
    frames = np.unique(view.panel[view.shown & (view.owner == 0)])
    return bool(len(frames)) and 2 * (frames[-1] - frames[0] + 1) > len(view.example.panels)


def _loose(view: View, objects, random: np.random.Generator) -> list[tuple[Question, str]]:
    """What single images are asked too, here of all pictures together, and choices without their letters.

    It keeps what is known and teaches the rest: a letter is learned quickly once the word it stands for is.
    """
    scene = Scene("", 0, "plain", tuple(objects))
    if view.example.medium == "video" and objects:
        count = COUNT_WORDS[len(objects)]
        asked = [Question("open_count", "How many objects are in the video?", count)]
        if _moves(view):
            text = f"In which direction does the {objects[0].phrase} move in the video?"
            asked.append(Question("open_direction", text, view.example.scene.direction))
        still = tuple(item for item in objects if item is not view.example.objects[0])
        if still:
            asked += KINDS_OF_QUESTION["where"](dataclasses.replace(scene, objects=still), random)
        return [(question, PHRASE_SUFFIX) for question in asked]
    asked = probe(scene, random) if random.random() < 0.3 else []
    if objects:
        kinds = ("open", "pope") if len(objects) > 1 else ("open",)
        asked += KINDS_OF_QUESTION[str(random.choice(kinds))](scene, random)
    return [(question, "" if question.kind == "probe" else PHRASE_SUFFIX) for question in asked]


def _suffix(question: Question, random: np.random.Generator) -> str:
    if question.kind in ("probe", "caption"):
        return ""
    suffix = str(random.choice(list(_SUFFIX_WEIGHTS), p=list(_SUFFIX_WEIGHTS.values())))
    return PHRASE_SUFFIX if question.kind in ("open", "where") and suffix == YES_NO_SUFFIX else suffix


def objects_of(view: View) -> list[tuple[int, SceneObject]]:
    """Slots that show an object, and the object."""
    return [(int(slot), view.example.objects[view.owner[slot]]) for slot in np.flatnonzero(view.shown)]
