"""Questions about where objects lie: which side of the image, and how two of them lie to each other."""

from __future__ import annotations

from collections import Counter

import numpy as np

from rcb_lmms.lab.scenes import IMAGE_SIZE_PX, Scene
from rcb_lmms.lab.wordings import Question

OPPOSITE = {"to the left of": "to the right of", "above": "below"}
SIDES = {"on the left side": "on the right side", "at the top": "at the bottom"}
# A relation is asked only where the centres differ by two patches, a side only one patch off the middle.
_CLEAR_RELATION_PX, _CLEAR_SIDE_PX = 28, 14


def position(scene: Scene, random: np.random.Generator) -> list[Question]:
    """MME position: how two objects lie to each other."""
    relations = _relations(scene, _named_objects(scene, random))
    if not relations:
        return []
    about, name, other, true, false = relations[random.integers(len(relations))]
    return [
        Question("position", f"Is the {name} {relation} the {other} in the image?", answer, about)
        for relation, answer in ((true, "Yes"), (false, "No"))
    ]


def side(scene: Scene, random: np.random.Generator) -> list[Question]:
    """On which side of the image an object lies."""
    sides = _sides(scene, _named_objects(scene, random))
    if not sides:
        return []
    about, name, true, false = sides[random.integers(len(sides))]
    return [
        Question("side", f"Is the {name} {which} of the image?", answer, about)
        for which, answer in ((true, "Yes"), (false, "No"))
    ]


def where(scene: Scene, random: np.random.Generator) -> list[Question]:
    """Side and relation as a choice of two; no benchmark has it, but yes and no alone hardly teach places."""
    named, asked = _named_objects(scene, random), []
    if sides := _sides(scene, named):
        about, name, true, false = sides[random.integers(len(sides))]
        one, two = random.permutation([true, false])
        asked.append(Question("where", f"Is the {name} {one} or {two} of the image?", _place_word(true), about))
    if relations := _relations(scene, named):
        about, name, other, true, false = relations[random.integers(len(relations))]
        one, two = random.permutation([true, false])
        text = f"Is the {name} {one} or {two} the {other} in the image?"
        asked.append(Question("where", text, _place_word(true), about))
    return asked


def _relations(scene: Scene, named: dict[int, str]) -> list[tuple[tuple[int, int], str, str, str, str]]:
    """All clear relations as (objects, name, name of the other, true relation, its opposite)."""
    found = []
    for one, name in named.items():
        for two, other in named.items():
            for axis, (low, high) in enumerate(OPPOSITE.items()):
                if scene.objects[two].centre[axis] - scene.objects[one].centre[axis] >= _CLEAR_RELATION_PX:
                    found += [((one, two), name, other, low, high), ((two, one), other, name, high, low)]
    return found


def _sides(scene: Scene, named: dict[int, str]) -> list[tuple[tuple[int], str, str, str]]:
    """All clear sides as (object, name, true side, its opposite)."""
    found = []
    for index, name in named.items():
        for axis, (low, high) in enumerate(SIDES.items()):
            offset = scene.objects[index].centre[axis] - IMAGE_SIZE_PX / 2
            if abs(offset) >= _CLEAR_SIDE_PX:
                found.append(((index,), name, *((low, high) if offset < 0 else (high, low))))
    return found


def _place_word(place: str) -> str:
    return next(word for word in ("left", "right", "top", "bottom", "above", "below") if word in place)


def _named_objects(scene: Scene, random: np.random.Generator) -> dict[int, str]:
    """A name for each object that one can be told by: "circle" if unique (half the time), else "red circle"."""
    kinds = Counter(item.kind for item in scene.objects)
    phrases = Counter(item.phrase for item in scene.objects)
    names = {}
    for index, item in enumerate(scene.objects):
        if kinds[item.kind] == 1 and random.random() < 0.5:
            names[index] = item.kind
        elif phrases[item.phrase] == 1:
            names[index] = item.phrase
    return names
