"""Deterministic scenes: coloured shapes and handwritten digits on quiet textures.

A scene is a pure function of the name of its split and an index, so the same call gives the same pixels everywhere,
and no scene (and no handwritten digit) of one split occurs in another:

    scene = make_scene("test", 7)
    image, owners = scene.image(), scene.patch_owner()
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import numpy as np

IMAGE_SIZE_PX = 168
PATCH_PX = 14
GRID = IMAGE_SIZE_PX // PATCH_PX
SHAPES = ("circle", "square", "triangle", "cross", "star", "ring")
NUMBER = "number"
KINDS = (*SHAPES, NUMBER)
COLOURS = {
    "red": (215, 30, 35),
    "green": (25, 150, 55),
    "blue": (35, 70, 215),
    "yellow": (240, 215, 40),
    "white": (250, 250, 250),
    "black": (12, 12, 12),
}
TEXTURES = ("plain", "stripes", "checks", "dots", "gradient", "waves")
# Which handwritten digits a split may use: index modulo five. Any other split name draws from the test digits.
_DIGIT_RESIDUES = {"train": (0, 1, 2), "codebook": (3,)}
# Thirteen pixels between two boxes make sure that no patch of fourteen touches both.
_GAP_PX = 13
_MARGIN_PX = 3


@dataclass(frozen=True)
class SceneObject:
    """One object; `box` is (left, top, right, bottom) in pixels, right and bottom exclusive; `sample` names a digit."""

    kind: str
    colour: str
    box: tuple[int, int, int, int]
    digit: int | None = None
    sample: int | None = None

    @property
    def phrase(self) -> str:
        """Colour and noun, as in "red circle"."""
        return f"{self.colour} {self.kind}"

    @property
    def centre(self) -> tuple[float, float]:
        """Centre of the box, (x, y) in pixels."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Scene:
    """Objects on a texture, in the order they were placed."""

    split: str
    index: int
    texture: str
    objects: tuple[SceneObject, ...]

    def pixels(self) -> np.ndarray:
        """The rendered scene, `(168, 168, 3)` uint8."""
        canvas = _background(self.texture, _generator(self.split, self.index, "background"))
        for item in self.objects:
            left, top, right, bottom = item.box
            alpha = _alpha(item)[..., None]
            patch = canvas[top:bottom, left:right]
            patch += alpha * (np.array(COLOURS[item.colour], np.float32) - patch)
        return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)

    def image(self):
        """The rendered scene as a `PIL.Image`."""
        from PIL import Image

        return Image.fromarray(self.pixels())

    def patch_owner(self) -> np.ndarray:
        """Index of the object whose box overlaps each patch, `(12, 12)` int64, -1 for the background."""
        owner = np.full((GRID, GRID), -1, np.int64)
        for number, item in enumerate(self.objects):
            left, top, right, bottom = item.box
            owner[top // PATCH_PX : -(-bottom // PATCH_PX), left // PATCH_PX : -(-right // PATCH_PX)] = number
        return owner

    def patch_coverage(self) -> np.ndarray:
        """Fraction of each patch that an object's box covers, `(12, 12)` float32."""
        covered = np.zeros((IMAGE_SIZE_PX, IMAGE_SIZE_PX), np.float32)
        for item in self.objects:
            left, top, right, bottom = item.box
            covered[top:bottom, left:right] = 1
        return covered.reshape(GRID, PATCH_PX, GRID, PATCH_PX).mean((1, 3))


def make_scene(split: str, index: int) -> Scene:
    """The scene number `index` of a split ("train", "codebook", "test", or any other name)."""
    random = _generator(split, index, "layout")
    boxes = _place(random, int(random.integers(1, 5)))
    # Scenes of few kinds are needed, or "how many circles" would nearly always be answered by one.
    kinds = random.permutation(SHAPES)[: 2 if random.random() < 0.4 else len(SHAPES)]
    number_slot = int(random.integers(len(boxes))) if random.random() < 0.6 else -1
    objects = []
    for slot, box in enumerate(boxes):
        colour = str(random.choice(list(COLOURS)))
        if slot == number_slot:
            digit, sample = _pick_digit(split, random)
            objects.append(SceneObject(NUMBER, colour, box, digit, sample))
        else:
            objects.append(SceneObject(str(random.choice(kinds)), colour, box))
    return Scene(split, index, str(random.choice(TEXTURES)), tuple(objects))


def _generator(split: str, index: int, purpose: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{split}/{index}/{purpose}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def _place(random: np.random.Generator, count: int) -> list[tuple[int, int, int, int]]:
    while True:
        boxes: list[tuple[int, int, int, int]] = []
        for _ in range(40):
            size = int(random.integers(30, 43))
            left, top = (int(v) for v in random.integers(_MARGIN_PX, IMAGE_SIZE_PX - size - _MARGIN_PX + 1, 2))
            box = (left, top, left + size, top + size)
            if all(_apart(box, other) for other in boxes):
                boxes.append(box)
            if len(boxes) == count:
                return boxes


def _apart(one: tuple[int, int, int, int], two: tuple[int, int, int, int]) -> bool:
    gap_x = max(one[0] - two[2], two[0] - one[2])
    gap_y = max(one[1] - two[3], two[1] - one[3])
    return max(gap_x, gap_y) >= _GAP_PX


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images.astype(np.float32), data.target.astype(np.int64)


def _pick_digit(split: str, random: np.random.Generator) -> tuple[int, int]:
    _, labels = _digits()
    residues = _DIGIT_RESIDUES.get(split, (4,))
    digit = int(random.integers(10))
    candidates = np.flatnonzero((labels == digit) & np.isin(np.arange(len(labels)) % 5, residues))
    return digit, int(random.choice(candidates))


@functools.cache
def _coordinates() -> np.ndarray:
    return np.mgrid[:IMAGE_SIZE_PX, :IMAGE_SIZE_PX].astype(np.float32)


def _background(texture: str, random: np.random.Generator) -> np.ndarray:
    """A grey, slightly tinted texture of low contrast, `(168, 168, 3)` float32 around 100 to 150."""
    y, x = _coordinates()
    base = random.uniform(105, 150) + random.uniform(-10, 10, 3)
    period, angle, phase = random.uniform(9, 30), random.uniform(0, np.pi), random.uniform(0, 6.28)
    along, across = x * np.cos(angle) + y * np.sin(angle), -x * np.sin(angle) + y * np.cos(angle)
    wave = 2 * np.pi / period
    pattern = {
        "plain": lambda: np.zeros_like(x),
        "stripes": lambda: np.sign(np.sin(along * wave + phase)),
        "checks": lambda: np.sign(np.sin(along * wave + phase) * np.sin(across * wave)),
        "dots": lambda: ((np.sin(along * wave + phase) * np.sin(across * wave)) > 0.5) * 2.0 - 0.5,
        "gradient": lambda: along / IMAGE_SIZE_PX - 0.5,
        "waves": lambda: np.sin(along * wave + 2 * np.sin(across * wave / 2) + phase),
    }[texture]()
    contrast = random.uniform(6, 13)
    noise = 3 * random.standard_normal((IMAGE_SIZE_PX, IMAGE_SIZE_PX), np.float32)
    return (base + (contrast * pattern + noise)[..., None]).astype(np.float32)


def _alpha(item: SceneObject) -> np.ndarray:
    """Opacity of an object inside its box, `(height, width)` in [0, 1]."""
    from PIL import Image

    left, top, right, bottom = item.box
    size = (right - left, bottom - top)
    if item.kind == NUMBER:
        image = Image.fromarray(_digits()[0][item.sample]).resize(size, Image.Resampling.BICUBIC)
        return np.clip((np.asarray(image) - 4) / 5, 0, 1)
    return np.asarray(_stencil(item.kind).resize(size, Image.Resampling.BOX), np.float32) / 255


@functools.cache
def _stencil(kind: str):
    from PIL import Image, ImageDraw

    side = 168
    image = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(image)
    if kind in ("circle", "ring"):
        draw.ellipse((0, 0, side - 1, side - 1), fill=255)
        if kind == "ring":
            draw.ellipse((44, 44, side - 45, side - 45), fill=0)
    elif kind == "square":
        draw.rectangle((8, 8, side - 9, side - 9), fill=255)
    elif kind == "triangle":
        draw.polygon([(side / 2, 0), (side - 1, side - 1), (0, side - 1)], fill=255)
    elif kind == "cross":
        draw.rectangle((56, 0, side - 57, side - 1), fill=255)
        draw.rectangle((0, 56, side - 1, side - 57), fill=255)
    else:
        turns = [np.pi * (step / 5 - 0.5) for step in range(10)]
        radii = [side / 2 if step % 2 == 0 else side / 4.6 for step in range(10)]
        draw.polygon(
            [(side / 2 + r * np.cos(t), side / 2 + r * np.sin(t)) for r, t in zip(radii, turns, strict=True)], fill=255
        )
    return image
