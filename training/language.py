"""Second stage of the laboratory's training: projector and language model, on a frozen vision tower.

The language model sees the image whole, thinned at random, by its objects, by its background, down to a single token,
so that missing tokens are nothing new to it when a method under test removes them. The tower stays frozen: trained
along, it would smear the objects over all tokens and the background alone would answer everything.
"""

from __future__ import annotations

import functools

import numpy as np

from rcb_lmms.lab.scene_questions import plural
from rcb_lmms.lab.scenes import COLOURS, GRID, KINDS
from rcb_lmms.lab.wordings import LETTERS, Question
from training import examples
from training.examples import Example
from training.packing import Packed, Prompted, pack
from training.views import NEWLINE, TEXT, View, make_view, objects_of

__all__ = ["FeaturePool", "Wording", "answer_loss", "draw_examples", "make_view", "naming_loss", "pack_views"]

TOKENS = GRID * GRID
# Pictures that go through the tower together when features are first asked for.
CHUNK = 64
_OPPOSITES = (("left", "right"), ("top", "bottom"), ("above", "below"), ("up", "down"))
_THINNED = (96, 72, 48, 36, 36, 28, 28, 20, 16, 8, 1)


class Wording:
    """Turns questions into tokens the way processor and chat template do."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._encode = functools.lru_cache(50_000)(self._encode_text)
        self.prefix = [tokenizer.bos_token_id, *self._encode("USER: ")]
        self.pad = tokenizer.pad_token_id
        self.nouns = {self.word(form): noun for noun in (*KINDS, "object") for form in (noun, plural(noun))}
        self.colours = {self.word(colour): colour for colour in COLOURS}
        self.before_letter = {self.text(mark)[0] for mark in ("\n", "(", " (")}
        self.after_letter = {self.text(".")[0], self.text(")")[0]}
        self.option_ends = {self.text(mark)[0] for mark in ("\n", "'")}
        self._bare = {letter: self.text(letter)[0] for letter in LETTERS}

    def _encode_text(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, text: str) -> list[int]:
        """Tokens of a text as it is."""
        return [*self._encode(text)] if text else []

    def bare(self, letter: str) -> int:
        """The token of an option's letter, which no space precedes."""
        return self._bare[letter]

    def word(self, word: str) -> int:
        """The token of a word that follows a space."""
        return self._encode(f" {word}")[0]

    def __call__(self, question: Question, suffix: str = "") -> Prompted:
        """Tokens of the turn from after the image to the end of the answer."""
        prompt = [*self._encode("\n"), *self._encode(f"{question.text}{suffix} ASSISTANT:")]
        answer = [*self._encode(f" {question.answer}"), self._tokenizer.eos_token_id]
        return Prompted(prompt, answer, question.kind)


class FeaturePool:
    """Tower features of pictures, computed once in chunks of neighbours and kept in half precision.

    Chunks do not depend on what is asked for first, so that a resumed training sees the same numbers.
    """

    def __init__(self, tower, device: str = "cpu"):
        self._tower, self._device = tower, device
        self._known: dict[tuple, np.ndarray] = {}

    def features(self, example: Example) -> np.ndarray:
        """What the projector reads of each panel, `(p, 144, width)` float16."""
        if not all(key in self._known for key in example.keys):
            for key in _neighbours(example):
                self._known.setdefault(key, None)
            missing = [key for key, value in self._known.items() if value is None]
            for first in range(0, len(missing), CHUNK):
                part = missing[first : first + CHUNK]
                self._known |= zip(part, self._compute(part), strict=True)
        return np.stack([self._known[key] for key in example.keys])

    def _compute(self, keys: list[tuple]) -> np.ndarray:
        import torch

        from training.vision import preprocess, read_tower

        pixels = preprocess(np.stack([examples.pixels_of(key) for key in keys])).to(self._device)
        with torch.no_grad():
            return read_tower(self._tower, pixels)[0].to(torch.float16).cpu().numpy()


def _neighbours(example: Example) -> list[tuple]:
    """Names of the pictures that are computed together with an example's."""
    if example.medium in ("video", "tiled") and len(example.keys[0]) > 2:
        split, index, *rest = example.keys[0]
        if rest[0] == "frame":
            numbers = sorted({key[3] for key in example.keys} | set(range(1, examples.FRAMES, 2)))
            return [(split, index, "frame", number) for number in numbers]
        return list(examples.large(split, index).keys)
    return [
        (split, number)
        for split, index in example.keys
        for number in range(index // CHUNK * CHUNK, (index // CHUNK + 1) * CHUNK)
    ]


def token_count(random: np.random.Generator, progress: float) -> int:
    """How many image tokens a batch keeps: few and telling ones at first, later anything up to all."""
    if progress < 0.2:
        return int(random.choice([20, 28, 36]))
    whole = 0.1 if progress < 0.5 else 0.25
    return TOKENS if random.random() < whole else int(random.choice(_THINNED))


def draw_examples(family: str, split: str, indices, random: np.random.Generator, first: int = 0) -> list[Example]:
    """Examples of one medium for a batch; `first` is the first plain scene that the tower was not trained on."""
    if family == "llava":
        return [examples.plain(split, first + int(index)) for index in indices]
    if family == "llava_next":
        tiles = random.random() < 0.75
        return [examples.large(split, LARGE_FIRST + int(index) % LARGE_POOL, tiles) for index in indices]
    medium = random.choice(["doubled", "several", "video"], p=[0.35, 0.35, 0.3])
    if medium == "doubled":
        return [examples.plain(split, first + int(index), panels=2) for index in indices]
    if medium == "video":
        frames = int(random.choice([4, 8, 16], p=[0.5, 0.4, 0.1]))
        pool = VIDEO_POOL // 4 if frames == 16 else VIDEO_POOL
        return [examples.video(split, int(index) % pool, frames) for index in indices]
    neighbours = random.integers(0, CHUNK, (len(indices), int(random.integers(1, 4))))
    return [
        examples.several(split, [first + int(index), *(first + int(index) // CHUNK * CHUNK + other).tolist()])
        for index, other in zip(indices, neighbours, strict=True)
    ]


# Large scenes the tower was not trained on, and pools small enough to be rendered in minutes.
LARGE_FIRST, LARGE_POOL, VIDEO_POOL = 30_000, 1500, 400


def pack_views(views: list[View], wording: Wording) -> Packed:
    """Lay the views out as one batch."""
    return pack(wording.prefix, [len(view) for view in views], [view.questions for view in views], wording.pad)


def projected(model, views: list[View], features: list[np.ndarray]):
    """Rows of the views before the question, `(b, slots, d)`: visual tokens behind the projector, newlines and words.

    Zero in blanked and unused slots. A pooled token is the mean of its sources behind the projector.
    """
    import torch

    slots, spread = max(map(len, views)), views[0].sources.shape[1]
    raw = np.zeros((len(views), slots, spread, features[0].shape[-1]), np.float32)
    alive = np.zeros((len(views), slots, 1), np.float32)
    newline, words = np.zeros((len(views), slots, 1), np.float32), np.zeros((len(views), slots), np.int64)
    for row, view in enumerate(views):
        sight = view.panel >= 0
        raw[row, : len(view)][sight] = features[row][view.panel[sight, None], view.sources[sight]]
        alive[row, : len(view), 0] = sight & ~view.blanked
        newline[row, : len(view), 0] = view.panel == NEWLINE
        words[row, : len(view)] = np.where(view.panel == TEXT, view.words, 0)
    alive, newline, words, raw = (torch.from_numpy(value).to(model.device) for value in (alive, newline, words, raw))
    rows = model.model.multi_modal_projector(raw).mean(2) * alive
    if newline.any():
        rows = rows + newline * model.model.image_newline
    # Row 0 of the embedding is zero, so that slots without a word add nothing.
    return rows + model.get_input_embeddings()(words) if words.any() else rows


def right_answers(model, hidden, packed: Packed, views: list[View]) -> list[tuple[str, bool]]:
    """Kind of every question of a batch, and whether the first token of its answer is the likeliest."""
    found = []
    answers = model.lm_head(hidden).argmax(-1).cpu().numpy()
    for row, view in enumerate(views):
        answered = packed.weights[row] > 0
        starts = np.flatnonzero(answered & ~np.roll(answered, 1))
        for question, at in zip(view.questions, starts, strict=True):
            found.append((question.kind, bool(answers[row, at] == question.answer[0])))
    return found


def answer_loss(model, hidden, packed: Packed):
    """Mean loss per question and the fraction of answer tokens that are right."""
    import torch
    from torch.nn.functional import cross_entropy

    labels = torch.from_numpy(packed.labels).to(hidden.device)
    asked = labels >= 0
    logits, wanted = model.lm_head(hidden[asked]), labels[asked]
    weights = torch.from_numpy(packed.weights).to(hidden.device)[asked]
    losses = cross_entropy(logits, wanted, reduction="none")
    right = (logits.argmax(-1) == wanted).float()
    return (losses * weights).sum() / weights.sum(), (right * weights).sum() / weights.sum()


def naming_loss(model, features, views: list[View], wording: Wording, random: np.random.Generator, sample: int = 256):
    """Each projected object token, read out by the head, should say its colour, its noun (or digit) and its place.

    Without this the projector and the word embeddings take most of the training to find a common language.
    """
    import torch
    from torch.nn.functional import cross_entropy, smooth_l1_loss

    rows, slots, words, places = [], [], [], []
    for row, view in enumerate(views):
        for slot, item in objects_of(view):
            rows.append(row)
            slots.append(slot)
            name = item.kind if item.digit is None else str(item.digit)
            words.append([wording.word(word) for word in (item.colour, item.kind, name)])
            column, line = view.places[slot]
            places.append([column, line, line, line])
    if not rows:
        return features.sum() * 0
    chosen = random.permutation(len(rows))[:sample]
    tokens = features[np.array(rows)[chosen], np.array(slots)[chosen]]
    logits = model.lm_head(model.model.language_model.norm(tokens))
    wanted = torch.from_numpy(np.array(words)[chosen]).to(logits.device)
    named = sum(cross_entropy(logits, wanted[:, column]) for column in range(3)) / 3
    low, high = ([wording.word(word) for word in side] for side in zip(*_OPPOSITES, strict=True))
    # A scale from low to high, as strong as the names, lets places be compared and not only told apart.
    offsets = torch.from_numpy(np.array(places)[chosen]).to(logits) - (GRID - 1) / 2
    return named + 0.5 * smooth_l1_loss(logits[:, high] - logits[:, low], 1.5 * offsets)


def place_loss(model, states, found, packed: Packed, views: list[View], wording: Wording):
    """The name of an object, once it has looked at the object, should say where that lies, as its tokens do."""
    import torch
    from torch.nn.functional import smooth_l1_loss

    if not found:
        return states.sum() * 0
    low, high = ([wording.word(word) for word in side] for side in zip(*_OPPOSITES, strict=True))
    logits = model.lm_head(states)
    middles = [views[row].places[meant - packed.image_start].mean(0) for row, _, meant in found]
    offsets = torch.from_numpy(np.array([[x, y, y, y] for x, y in middles])).to(logits) - (GRID - 1) / 2
    return smooth_l1_loss(logits[:, high] - logits[:, low], 1.5 * offsets)


def word_loss(model, states, found, packed: Packed):
    """Before it becomes a letter, the answer should be the word that the letter stands for."""
    import torch
    from torch.nn.functional import cross_entropy

    if not found:
        return states.sum() * 0
    words = torch.from_numpy(np.array([packed.tokens[row, meant[0]] for row, _, meant in found])).to(states.device)
    return cross_entropy(model.lm_head(states), words)
