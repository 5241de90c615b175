"""One training example of the second stage: which tokens of which pictures are seen, and what is asked about them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from rcb_lmms.lab.scene_questions import COUNT_WORDS
from rcb_lmms.lab.scenes import GRID, SceneObject
from training import asking
from training.examples import Example
from training.packing import Prompted
from training.pointing import option_places, points_of

# Slots that hold no visual token: the newline embedding, and tokens of text.
NEWLINE, TEXT = -1, -2


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


def make_view(
    example: Example, count: int, wording, random: np.random.Generator, progress: float, ask=asking.first
) -> View:
    """Draw what one training example keeps and asks; `progress` in [0, 1] goes from easy to everything.

    `ask` is a stage's mix of questions, one of `asking`.

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
    asked = ask(view, pairs, random, progress)
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


def objects_of(view: View) -> list[tuple[int, SceneObject]]:
    """Slots that show an object, and the object."""
    return [(int(slot), view.example.objects[view.owner[slot]]) for slot in np.flatnonzero(view.shown)]
