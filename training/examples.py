"""What the laboratory's models are shown: one scene, a large scene in tiles, several scenes, or a moving scene.

An example is a list of panels, pictures of the tower's size, and knows for every token of a panel which object lies
there.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from rcb_lmms.lab.moving import FRAMES, MovingScene, make_moving_scene
from rcb_lmms.lab.scenes import GRID, Scene, SceneObject, make_large_scene, make_scene
from training.tower import GRAZED

POOLED = GRID // 2


@dataclass(frozen=True)
class Panel:
    """Tokens of one picture: `owner (n,)` is the object on each, -1 for none; `taught (n,)` if it can be recognised.

    `places (n, 2)` are column and row; `sources (n, r)` the tower's tokens of which each is the mean (r = 4 if pooled).
    """

    owner: np.ndarray
    taught: np.ndarray
    places: np.ndarray
    sources: np.ndarray

    def __len__(self) -> int:
        return len(self.owner)


@dataclass(frozen=True)
class Example:
    """Objects (those of all pictures, in order), and the panels with the names of their pictures.

    `medium` is `plain` (one view), `doubled` (base view and one tile), `tiled` (a large scene's base view and tiles),
    `several` (images) or `video`.
    """

    medium: str
    scene: Scene | MovingScene
    objects: tuple[SceneObject, ...]
    panels: tuple[Panel, ...]
    keys: tuple[tuple, ...]


_SOURCES = np.arange(GRID * GRID)[:, None]
_PLACES = np.stack([np.arange(GRID * GRID) % GRID, np.arange(GRID * GRID) // GRID], 1)


def panel_of(scene: Scene) -> Panel:
    """The one panel of a scene of the tower's size."""
    owner = scene.patch_owner().ravel()
    return Panel(owner, (owner < 0) | (scene.patch_coverage().ravel() >= GRAZED), _PLACES, _SOURCES)


def plain(split: str, index: int, panels: int = 1) -> Example:
    """One scene, seen in one panel or (as a base view and a tile of the same size) in two."""
    scene = make_scene(split, index)
    keys = ((split, index),) * panels
    medium = "plain" if panels == 1 else "doubled"
    return Example(medium, scene, scene.objects, (panel_of(scene),) * panels, keys)


def large(split: str, index: int, tiles: bool = True) -> Example:
    """A large scene: the base view, and with `tiles` all its tiles."""
    scene = make_large_scene(split, index)
    views = scene.views()[: None if tiles else 1]
    panels = tuple(panel_of(view) for view in views)
    keys = tuple((split, index, number) for number in range(len(views)))
    return Example("tiled", scene, scene.objects, panels, keys)


def several(split: str, indices: list[int]) -> Example:
    """Several scenes, a panel each; an object's index counts on from scene to scene."""
    scenes = [make_scene(split, index) for index in indices]
    panels, objects = [], []
    for scene in scenes:
        panel = panel_of(scene)
        panels.append(dataclasses.replace(panel, owner=np.where(panel.owner < 0, -1, panel.owner + len(objects))))
        objects += scene.objects
    keys = tuple((split, index) for index in indices)
    return Example("several", scenes[0], tuple(objects), tuple(panels), keys)


def video(split: str, index: int, frames: int = FRAMES) -> Example:
    """A moving scene in evenly spread frames, pooled to 6 x 6 tokens each."""
    moving = make_moving_scene(split, index)
    # Fewer frames are some of more frames, so that features computed for one serve the other.
    numbers = range(FRAMES // frames - 1, FRAMES, FRAMES // frames)
    panels = tuple(_pooled(panel_of(moving.frame(number))) for number in numbers)
    keys = tuple((split, index, "frame", number) for number in numbers)
    return Example("video", moving, moving.objects, panels, keys)


def pixels_of(key: tuple) -> np.ndarray:
    """The picture behind one of an example's keys, `(168, 168, 3)` uint8."""
    split, index, *rest = key
    if not rest:
        return make_scene(split, index).pixels()
    if rest[0] == "frame":
        return make_moving_scene(split, index).frame(rest[1]).pixels()
    return make_large_scene(split, index).panel_pixels()[rest[0]]


def _pooled(panel: Panel) -> Panel:
    """Tokens of a frame after bilinear pooling to half the side, which is the mean of two by two."""

    def blocks(values: np.ndarray) -> np.ndarray:
        shaped = values.reshape(POOLED, 2, POOLED, 2, -1)
        return shaped.transpose(0, 2, 1, 3, 4).reshape(POOLED * POOLED, 4, -1)

    owner, taught = blocks(panel.owner)[..., 0], blocks(panel.taught)[..., 0]
    # An object is seen in a pooled token if half of it is the object's.
    shown = ((owner >= 0) & taught).sum(1) >= 2
    return Panel(
        owner.max(1),
        shown | (owner < 0).all(1),
        blocks(panel.places).mean(1),
        blocks(panel.sources)[..., 0],
    )
