"""Which questions a training example is asked: the mixes of the two stages of the language model."""

from __future__ import annotations

import dataclasses

import numpy as np

from rcb_lmms.lab import wordings
from rcb_lmms.lab.choices import (
    IMAGE_KINDS,
    SEVERAL_KINDS,
    VIDEO_KINDS,
    image_choices,
    several_choices,
    video_choices,
)
from rcb_lmms.lab.scene_questions import (
    COUNT_WORDS,
    KINDS_OF_QUESTION,
    ONE_WORD_SUFFIX,
    PHRASE_SUFFIX,
    YES_NO_SUFFIX,
    blind,
    caption,
    open_question,
    probe,
)
from rcb_lmms.lab.scenes import Scene
from rcb_lmms.lab.wordings import Question

_SUFFIX_WEIGHTS = {PHRASE_SUFFIX: 0.25, ONE_WORD_SUFFIX: 0.1, YES_NO_SUFFIX: 0.1, "": 0.55}
_IMAGE_PROBABILITIES = (0.3, 0.2, 0.3, 0.2)
_SEVERAL_PROBABILITIES = (0.45, 0.35, 0.2)
_VIDEO_PROBABILITIES = (0.55, 0.2, 0.15, 0.1)


def first(view, pairs: int, random: np.random.Generator, progress: float) -> list[tuple[Question, str]]:
    """Questions with their suffixes, about what a `View` shows: yes and no, single words, and options for media."""
    objects, medium = _visible(view), view.example.medium
    if medium in ("several", "video"):
        wording = wordings.mvbench if medium == "video" else wordings.lettered
        return _choices(view, objects, pairs - 1, random, (wording,)) + _loose(view, objects, random)
    scene = dataclasses.replace(view.example.scene, objects=tuple(objects))
    if not objects:
        return [(question, _suffix(question, random)) for question in blind(view.example.scene, random, pairs)]
    asked = probe(scene, random) if random.random() < 0.4 else []
    asked += _of_kinds(KIND_WEIGHTS[medium], pairs, scene, random)
    if progress > 0.3 and random.random() < 0.12:
        asked += caption(scene, random)
    return [(question, _suffix(question, random)) for question in asked or probe(scene, random)]


def benchmarks(view, pairs: int, random: np.random.Generator, progress: float) -> list[tuple[Question, str]]:
    """The prompts of all ten benchmarks, with enough of the first stage's questions to keep what is known."""
    objects, medium = _visible(view), view.example.medium
    if medium == "video":
        return _choices(view, objects, 4, random, wordings.VIDEO) + _loose(view, objects, random)
    if medium == "several":
        asked = _choices(view, objects, 3, random, wordings.SEVERAL_IMAGES) + _loose(view, objects, random)
        return asked + [(_reworded(q, wordings.mantis_short), "") for q in _short_questions(objects, random)]
    if not objects:
        asked = [(question, _suffix(question, random)) for question in blind(view.example.scene, random, 2)]
        return asked + _choices(view, view.example.objects, 2, random, wordings.ONE_IMAGE, guess=True)
    scene = dataclasses.replace(view.example.scene, objects=tuple(objects))
    asked = _choices(view, objects, 3, random, wordings.ONE_IMAGE)
    asked += [(_reworded(q, wordings.realworldqa_open), "") for q in open_question(scene, random)]
    loose = probe(scene, random) if random.random() < 0.3 else []
    loose += _of_kinds(KEPT_WEIGHTS[medium], 2, scene, random)
    loose += caption(scene, random) if random.random() < 0.6 else []
    return asked + [(question, _suffix(question, random)) for question in loose]


def _visible(view) -> list:
    return [view.example.objects[index] for index in np.unique(view.owner[view.shown])]


def _of_kinds(weights: dict[str, float], pairs: int, scene: Scene, random: np.random.Generator) -> list[Question]:
    kinds = random.choice(list(weights), size=pairs, p=list(weights.values()))
    return [question for kind in kinds for question in KINDS_OF_QUESTION[str(kind)](scene, random)]


def _reworded(question: Question, wording) -> Question:
    return dataclasses.replace(question, text=wording(question.text))


def _short_questions(objects, random: np.random.Generator) -> list[Question]:
    return open_question(Scene("", 0, "plain", tuple(objects)), random) if objects and random.random() < 0.5 else []


# How often a pair of questions of each kind is drawn; probe and caption are drawn per scene instead.
KIND_WEIGHTS = {
    "plain": {
        "pope": 0.13, "existence": 0.02, "color": 0.07, "count": 0.14, "position": 0.20, "side": 0.12, "OCR": 0.05,
        "open": 0.07, "where": 0.20,
    },
    "doubled": {"pope": 0.25, "existence": 0.05, "color": 0.15, "open": 0.1, "side": 0.1, "where": 0.35},
    "tiled": {"pope": 0.5, "existence": 0.1, "color": 0.25, "open": 0.15},
}  # fmt: skip
KEPT_WEIGHTS = {
    "plain": {"pope": 0.4, "existence": 0.05, "color": 0.2, "count": 0.15, "OCR": 0.1, "open": 0.1},
    "doubled": {"pope": 0.4, "existence": 0.1, "color": 0.2, "open": 0.1, "where": 0.2},
    "tiled": {"pope": 0.5, "existence": 0.1, "color": 0.25, "open": 0.15},
}


def _choices(view, objects, number: int, random, wordings, guess: bool = False) -> list[tuple[Question, str]]:
    """`number` questions with options, as many as can be asked, each in one of the wordings.

    With `guess` their objects cannot be seen: a letter is right by lot, or the model would read traces of the objects
    that attention leaves in the background.
    """
    medium, found = view.example.medium, []
    for _ in range(number):
        options = int(random.choice([2, 3, 4, 4]))
        if medium == "video":
            kind = str(random.choice(VIDEO_KINDS, p=_VIDEO_PROBABILITIES))
            found += video_choices(objects, view.example.scene.direction, _moves(view), kind, random, options)
        elif medium == "several":
            found += several_choices(objects, str(random.choice(SEVERAL_KINDS, p=_SEVERAL_PROBABILITIES)), random)
        else:
            kind = str(random.choice(IMAGE_KINDS, p=_IMAGE_PROBABILITIES))
            found += image_choices(objects, kind, random, options)
    if guess:
        found = [dataclasses.replace(choice, right=int(random.integers(len(choice.options)))) for choice in found]
    return [(choice.asked(wordings[random.integers(len(wordings))]), "") for choice in found]


def _moves(view) -> bool:
    """Whether the moving object of a video is seen through most of it."""
    frames = np.unique(view.panel[view.shown & (view.owner == 0)])
    return bool(len(frames)) and 2 * (frames[-1] - frames[0] + 1) > len(view.example.panels)


def _loose(view, objects, random: np.random.Generator) -> list[tuple[Question, str]]:
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
