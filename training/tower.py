"""First stage of the laboratory's training: the vision tower learns what lies under each of its patches.

The tokens that LLaVA reads (the last hidden state but one) are taught kind, colour and place of their own patch, and
nothing is asked of a background token but to say so: tokens that carry no object stay redundant. The class token of
the last block is taught what the whole image holds, so that its attention, which PruMerge ranks by, means something.
"""

from __future__ import annotations

import functools

import numpy as np

from rcb_lmms.lab.scenes import COLOURS, GRID, PATCH_PX, SHAPES, Scene, make_large_scene, make_scene
from training.vision import read_tower

# What a patch can show: a shape, one of ten digits, or (last) nothing.
PATCH_KINDS = (*SHAPES, *(str(digit) for digit in range(10)))
_BACKGROUND = len(PATCH_KINDS)
_COLOUR_NAMES = tuple(COLOURS)
# A patch that an object only grazes teaches neither the object nor the background.
GRAZED = 0.25
_BACKGROUND_WEIGHT = 0.3


def make_heads(width: int):
    """Linear read-outs of patch tokens (kind, colour, centre, column, row) and of the class token (contents)."""
    from torch import nn

    sizes = {"kind": _BACKGROUND + 1, "colour": len(COLOURS) + 1, "centre": 1, "column": GRID, "row": GRID}
    sizes["contents"] = _BACKGROUND + len(COLOURS)
    return nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})


@functools.lru_cache(maxsize=30_000)
def training_example(split: str, index: int, tiled: bool = False) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Pixels and labels of a scene, or of one panel of a large one; kept, since every scene is seen several times."""
    if not tiled:
        scene = make_scene(split, index)
        return scene.pixels(), patch_labels(scene)
    scene = make_large_scene(split, index)
    views, panels = scene.views(), scene.panel_pixels()
    # Most tiles are empty, and the base view is the harder one: it is every second panel.
    chosen = [number for number, view in enumerate(views) if (view.patch_owner() >= 0).any()]
    number = 0 if index % 2 else chosen[index // 2 % len(chosen)]
    return panels[number], patch_labels(views[number])


def patch_labels(scene: Scene) -> dict[str, np.ndarray]:
    """Labels of the 144 patches (`kind`, `colour` int64, -100 where not taught; `centre` float32) and `contents`."""
    owner, coverage = scene.patch_owner(), scene.patch_coverage()
    kind = np.where(owner < 0, _BACKGROUND, -100)
    colour = np.where(owner < 0, len(COLOURS), -100)
    centre = np.full((GRID, GRID), -1, np.float32)
    contents = np.zeros(_BACKGROUND + len(COLOURS), np.float32)
    for number, item in enumerate(scene.objects):
        if item.box[0] == item.box[2]:  # in another tile
            continue
        name = item.kind if item.digit is None else str(item.digit)
        kind_label, colour_label = PATCH_KINDS.index(name), _COLOUR_NAMES.index(item.colour)
        shown = (owner == number) & (coverage >= GRAZED)
        kind[shown], colour[shown] = kind_label, colour_label
        centre[owner == number] = 0
        x, y = item.centre
        centre[int(y) // PATCH_PX, int(x) // PATCH_PX] = 1
        contents[[kind_label, _BACKGROUND + colour_label]] = 1
    return {"kind": kind.ravel(), "colour": colour.ravel(), "centre": centre.ravel(), "contents": contents}


def tower_loss(tower, heads, pixel_values, labels):
    """Summed loss of a batch and its accuracies, `pixel_values (b, 3, 168, 168)`, labels as arrays of `(b, ...)`."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

    tokens, pooled = read_tower(tower, pixel_values)
    tokens = tokens.flatten(0, 1)
    kind, colour = labels["kind"].flatten(), labels["colour"].flatten()
    weights = torch.ones(_BACKGROUND + 1, device=tokens.device)
    weights[-1] = _BACKGROUND_WEIGHT
    kind_logits, colour_logits = heads["kind"](tokens), heads["colour"](tokens)
    loss = cross_entropy(kind_logits, kind, weights)
    loss = loss + cross_entropy(colour_logits, colour, weights[-len(COLOURS) - 1 :])
    centre, on_object = labels["centre"].flatten(), labels["centre"].flatten() >= 0
    loss = loss + binary_cross_entropy_with_logits(heads["centre"](tokens)[on_object, 0], centre[on_object])
    places = torch.arange(GRID * GRID, device=tokens.device).repeat(len(pixel_values))
    loss = loss + 0.3 * cross_entropy(heads["column"](tokens), places % GRID)
    loss = loss + 0.3 * cross_entropy(heads["row"](tokens), places // GRID)
    if pooled is not None:
        loss = loss + binary_cross_entropy_with_logits(heads["contents"](pooled), labels["contents"])
    shown = (kind >= 0) & (kind < _BACKGROUND)
    digits = shown & (kind >= len(SHAPES))
    right = kind_logits.argmax(-1) == kind
    accuracy = {
        "kind": right[shown].float().mean().item(),
        "digit": right[digits].float().mean().item() if digits.any() else 1.0,
        "background": right[kind == _BACKGROUND].float().mean().item(),
        "colour": (colour_logits.argmax(-1) == colour)[shown].float().mean().item(),
        "column": (heads["column"](tokens).argmax(-1) == places % GRID).float().mean().item(),
        "centre": ((heads["centre"](tokens)[:, 0] > 0) == (centre > 0))[on_object].float().mean().item(),
    }
    return loss, accuracy


def batch_of(split: str, indices, preprocess, device, tiled: int = 0):
    """Stack scenes, of which `tiled` are panels of large ones; labels become tensors.

    `preprocess` maps uint8 `(b, 168, 168, 3)` to pixel values.
    """
    import torch

    examples = [training_example(split, int(index), number < tiled) for number, index in enumerate(indices)]
    pixels = preprocess(np.stack([pixels for pixels, _ in examples]))
    labels = {name: torch.from_numpy(np.stack([row[name] for _, row in examples])) for name in examples[0][1]}
    return pixels.to(device), {name: value.to(device) for name, value in labels.items()}
