"""Pairs of scenes with known differences, for the task `rcb_spot_the_difference`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rcb_lmms.files import write_atomic
from rcb_lmms.lab.scenes import COLOURS, Scene, SceneObject, generator, make_scene
from rcb_lmms.lab.tree import png

FOLDER = Path("spot_the_difference", "test")


@dataclass(frozen=True)
class ScenePair:
    """Two scenes and what differs: each difference by phrases of which an answer has to name one, as `A|B`."""

    first: Scene
    second: Scene
    differences: tuple[str, ...]


def make_pair(split: str, index: int) -> ScenePair:
    """The pair number `index` of a split: one or two objects of a scene are of another colour or gone in the other."""
    random = generator(split, index, "pair")
    scene = make_scene(f"{split}-pair", index)
    count = min(len(scene.objects), int(random.integers(1, 3)))
    changed = {int(slot) for slot in random.permutation(len(scene.objects))[:count]}
    objects, differences = [], []
    for slot, item in enumerate(scene.objects):
        # Something has to be left.
        gone = slot in changed and len(scene.objects) > 1 and not differences and bool(random.integers(2))
        if slot not in changed:
            objects.append(item)
        elif gone:
            differences.append(item.phrase)
        else:
            other = _recoloured(item, [*scene.objects, *objects], random)
            objects.append(other)
            differences.append(f"{item.phrase}|{other.phrase}")
    return ScenePair(scene, replace(scene, objects=tuple(objects)), tuple(differences))


def _recoloured(item: SceneObject, others: Sequence[SceneObject], random: np.random.Generator) -> SceneObject:
    """The object in a colour in which no other one of its shape is: two that swap colours would differ in nothing."""
    taken = {other.phrase for other in others}
    free = [new for colour in COLOURS if (new := replace(item, colour=colour)).phrase not in taken]
    return free[random.integers(len(free))]


def write_pairs(out: Path, count: int, split: str = "test") -> Path:
    """Write pairs as an image folder that `datasets` reads: PNG files and `metadata.jsonl`.

    Raises:
        UserError: the folder cannot be written.
    """
    folder, rows = Path(out) / FOLDER, []
    for index in range(count):
        pair = make_pair(split, index)
        names = [f"pair-{index:04d}-{side}.png" for side in ("first", "second")]
        for name, scene in zip(names, (pair.first, pair.second), strict=True):
            write_atomic(folder / name, png(scene)["bytes"])
        row = {"first_file_name": names[0], "second_file_name": names[1], "differences": list(pair.differences)}
        rows.append(json.dumps(row))
    write_atomic(folder / "metadata.jsonl", "\n".join(rows) + "\n")
    return folder
