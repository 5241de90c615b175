"""Deterministic scenes: coloured shapes and handwritten digits on quiet textures.

A scene is a pure function of the name of its split and an index, so the same call gives the same pixels everywhere,
and no scene (and no handwritten digit) of one split occurs in another:

    scene = make_scene("test", 7)
    image, owners = scene.image(), scene.patch_owner()
"""

from __future__ import annotations

import dataclasses
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
    """Objects on a texture, in the order they were placed; `size` is (width, height) in pixels."""

    split: str
    index: int
    texture: str
    objects: tuple[SceneObject, ...]
    size: tuple[int, int] = (IMAGE_SIZE_PX, IMAGE_SIZE_PX)

    def pixels(self) -> np.ndarray:
        """The rendered scene, `(height, width, 3)` uint8."""
        canvas = _background(self.texture, generator(self.split, self.index, "background"), self.size)
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
        """Index of the object whose box overlaps each patch, `(12, 12)` int64 (or larger), -1 for the background."""
        owner = np.full((self.size[1] // PATCH_PX, self.size[0] // PATCH_PX), -1, np.int64)
        for number, item in enumerate(self.objects):
            left, top, right, bottom = item.box
            owner[top // PATCH_PX : -(-bottom // PATCH_PX), left // PATCH_PX : -(-right // PATCH_PX)] = number
        return owner

    def patch_coverage(self) -> np.ndarray:
        """Fraction of each patch that an object's box covers, `(12, 12)` float32 (or larger)."""
        width, height = self.size
        covered = np.zeros((height, width), np.float32)
        for item in self.objects:
            left, top, right, bottom = item.box
            covered[top:bottom, left:right] = 1
        return covered.reshape(height // PATCH_PX, PATCH_PX, width // PATCH_PX, PATCH_PX).mean((1, 3))

    def views(self) -> list[Scene]:
        """Base view and tiles as scenes of 168 x 168 px whose objects lie where they are seen; only for their labels.

        An object that is not in a tile keeps its number there and gets an empty box.
        """
        width, height = self.size
        scaled = [
            dataclasses.replace(
                item, box=tuple(round(v * IMAGE_SIZE_PX / s) for v, s in zip(item.box, self.size * 2, strict=True))
            )
            for item in self.objects
        ]
        views = [dataclasses.replace(self, objects=tuple(scaled), size=(IMAGE_SIZE_PX, IMAGE_SIZE_PX))]
        for top in range(0, height, IMAGE_SIZE_PX):
            for left in range(0, width, IMAGE_SIZE_PX):
                inside = []
                for item in self.objects:
                    x0, y0, x1, y1 = item.box
                    here = left <= x0 < left + IMAGE_SIZE_PX and top <= y0 < top + IMAGE_SIZE_PX
                    box = (x0 - left, y0 - top, x1 - left, y1 - top) if here else (0, 0, 0, 0)
                    inside.append(dataclasses.replace(item, box=box))
                views.append(dataclasses.replace(views[0], objects=tuple(inside)))
        return views

    def panel_pixels(self) -> list[np.ndarray]:
        """Base view and tiles as the image processor cuts them, each `(168, 168, 3)` uint8."""
        from PIL import Image

        whole, (width, height) = self.pixels(), self.size
        base = Image.fromarray(whole).resize((IMAGE_SIZE_PX, IMAGE_SIZE_PX), Image.Resampling.BICUBIC)
        return [np.asarray(base)] + [
            whole[top : top + IMAGE_SIZE_PX, left : left + IMAGE_SIZE_PX]
            for top in range(0, height, IMAGE_SIZE_PX)
            for left in range(0, width, IMAGE_SIZE_PX)
        ]


def make_scene(split: str, index: int) -> Scene:
    """The scene number `index` of a split ("train", "codebook", "test", or any other name)."""
    random = generator(split, index, "layout")
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


# Grids of tiles (columns, rows), those of LLaVA-NeXT.
LARGE_GRIDS = ((2, 1), (1, 2), (2, 2), (3, 1), (1, 3))
# Sizes that a tile shows well and the base view, two or three times smaller, hardly.
_SMALL_PX = (24, 40)
# In the base view too, no patch touches two objects.
_LARGE_GAP_PX = 30


@functools.lru_cache(maxsize=4096)
def make_large_scene(split: str, index: int) -> Scene:
    """A scene of two to four tiles with one to five small objects, none of them cut by a tile's edge."""
    random = generator(split, index, "large")
    columns, rows = LARGE_GRIDS[random.integers(len(LARGE_GRIDS))]
    size = (columns * IMAGE_SIZE_PX, rows * IMAGE_SIZE_PX)
    boxes: list[tuple[int, int, int, int]] = []
    wanted = int(random.integers(1, 6))
    for _ in range(60):
        side = int(random.integers(*_SMALL_PX))
        corner = [
            int(random.integers(tiles)) * IMAGE_SIZE_PX
            + int(random.integers(_MARGIN_PX, IMAGE_SIZE_PX - side - _MARGIN_PX + 1))
            for tiles in (columns, rows)
        ]
        box = (*corner, corner[0] + side, corner[1] + side)
        # The base view shrinks long sides more, so the gap grows with them.
        if all(apart(box, other, (_LARGE_GAP_PX * columns // 2, _LARGE_GAP_PX * rows // 2)) for other in boxes):
            boxes.append(box)
        if len(boxes) == wanted:
            break
    kinds = random.permutation(SHAPES)[: 3 if random.random() < 0.4 else len(SHAPES)]
    objects = tuple(SceneObject(str(random.choice(kinds)), str(random.choice(list(COLOURS))), box) for box in boxes)
    return Scene(split, index, str(random.choice(TEXTURES)), objects, size)


def generator(split: str, index: int, purpose: str) -> np.random.Generator:
    """Random numbers that depend on a scene and a purpose alone."""
    digest = hashlib.sha256(f"{split}/{index}/{purpose}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def _place(random: np.random.Generator, count: int) -> list[tuple[int, int, int, int]]:
    while True:
        boxes: list[tuple[int, int, int, int]] = []
        for _ in range(40):
            size = int(random.integers(30, 43))
            left, top = (int(v) for v in random.integers(_MARGIN_PX, IMAGE_SIZE_PX - size - _MARGIN_PX + 1, 2))
            box = (left, top, left + size, top + size)
            if all(apart(box, other) for other in boxes):
                boxes.append(box)
            if len(boxes) == count:
                return boxes


def apart(one: tuple[int, ...], two: tuple[int, ...], gaps: tuple[int, int] = (_GAP_PX, _GAP_PX)) -> bool:
    """Whether two boxes are `gaps` pixels apart in one of the two directions."""
    gap_x = max(one[0] - two[2], two[0] - one[2])
    gap_y = max(one[1] - two[3], two[1] - one[3])
    return gap_x >= gaps[0] or gap_y >= gaps[1]


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
def _coordinates(width: int, height: int) -> np.ndarray:
    return np.mgrid[:height, :width].astype(np.float32)


def _background(texture: str, random: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A grey, slightly tinted texture of low contrast, `(height, width, 3)` float32 around 100 to 150."""
    y, x = _coordinates(*size)
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
    noise = 3 * random.standard_normal(size[::-1], np.float32)
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
