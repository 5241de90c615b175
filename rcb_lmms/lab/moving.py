"""Moving scenes: one object travels from the middle to a side, up to two others stand still."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np

from rcb_lmms.lab.scenes import COLOURS, IMAGE_SIZE_PX, KINDS, NUMBER, TEXTURES, Scene, SceneObject, apart, generator

FRAMES = 16
# Direction -> (column, row) of a step; the words are those of the answers.
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_MARGIN_PX = 3
# No pooled token of 28 px touches two objects.
_GAP_PX = 28


@dataclass(frozen=True)
class MovingScene:
    """Objects of which the first moves; `path` are its left and top in the first and the last frame."""

    split: str
    index: int
    texture: str
    objects: tuple[SceneObject, ...]
    direction: str
    path: tuple[tuple[int, int], tuple[int, int]]

    def at(self, time: float) -> Scene:
        """The scene at a time from 0 to 1."""
        (x0, y0), (x1, y1) = self.path
        first, *others = self.objects
        left, top = round(x0 + time * (x1 - x0)), round(y0 + time * (y1 - y0))
        size = first.box[2] - first.box[0]
        moved = dataclasses.replace(first, box=(left, top, left + size, top + size))
        return Scene(self.split, self.index, self.texture, (moved, *others))

    def frame(self, number: int, frames: int = FRAMES) -> Scene:
        """The scene in the middle of one of `frames` equal stretches of time."""
        return self.at((number + 0.5) / frames)


@functools.lru_cache(maxsize=2048)
def make_moving_scene(split: str, index: int) -> MovingScene:
    """The moving scene number `index` of a split: colours and kinds are all different within a scene."""
    random = generator(split, index, "motion")
    kinds = random.permutation([kind for kind in KINDS if kind != NUMBER])
    colours = random.permutation(list(COLOURS))
    wanted = int(random.integers(1, 4))
    while True:
        size = int(random.integers(30, 43))
        direction = str(random.choice(list(DIRECTIONS)))
        path = _path(random, size, DIRECTIONS[direction])
        swept = [min(path[0][0], path[1][0]), min(path[0][1], path[1][1])]
        swept += [max(path[0][0], path[1][0]) + size, max(path[0][1], path[1][1]) + size]
        boxes = [tuple(swept)]
        for _ in range(60):
            if len(boxes) == wanted:
                break
            other = int(random.integers(30, 43))
            left, top = (int(v) for v in random.integers(_MARGIN_PX, IMAGE_SIZE_PX - other - _MARGIN_PX + 1, 2))
            box = (left, top, left + other, top + other)
            if all(apart(box, known, (_GAP_PX, _GAP_PX)) for known in boxes):
                boxes.append(box)
        if len(boxes) == wanted:
            break
    start = (*path[0], path[0][0] + size, path[0][1] + size)
    objects = tuple(
        SceneObject(str(kinds[number]), str(colours[number]), box) for number, box in enumerate([start, *boxes[1:]])
    )
    return MovingScene(split, index, str(random.choice(TEXTURES)), objects, direction, path)


def _path(random: np.random.Generator, size: int, step: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    low, high = _MARGIN_PX, IMAGE_SIZE_PX - size - _MARGIN_PX
    middle = (low + high) // 2
    ends = []
    for axis in range(2):
        if step[axis] == 0:
            place = middle + int(random.integers(-14, 15))
            ends.append((place, place))
        else:
            start = middle - step[axis] * int(random.integers(0, 22))
            ends.append((start, high if step[axis] > 0 else low))
    return (ends[0][0], ends[1][0]), (ends[0][1], ends[1][1])
