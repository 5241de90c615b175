"""Second stage of the laboratory's training: projector and language model, on a frozen vision tower.

The language model sees the image whole, thinned at random, by its objects, by its background, down to a single token,
so that missing tokens are nothing new to it when a method under test removes them. The tower stays frozen: trained
along, it would smear the objects over all tokens and the background alone would answer everything.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np

from rcb_lmms.lab.packing import Packed, Prompted, pack
from rcb_lmms.lab.questions import (
    KINDS_OF_QUESTION,
    ONE_WORD_SUFFIX,
    PHRASE_SUFFIX,
    YES_NO_SUFFIX,
    Question,
    blind,
    caption,
    probe,
)
from rcb_lmms.lab.scenes import GRID, Scene, make_scene
from rcb_lmms.lab.tower import patch_labels

TOKENS = GRID * GRID
# Scenes that go through the tower together when features are first asked for.
CHUNK = 64
# How often a pair of questions of each kind is drawn; probe and caption are drawn per scene instead.
_KIND_WEIGHTS = {
    "pope": 0.13, "existence": 0.02, "color": 0.07, "count": 0.14, "position": 0.20, "side": 0.12, "OCR": 0.05,
    "open": 0.07, "where": 0.20,
}  # fmt: skip
_SUFFIX_WEIGHTS = {PHRASE_SUFFIX: 0.25, ONE_WORD_SUFFIX: 0.1, YES_NO_SUFFIX: 0.1, "": 0.55}
_OPPOSITES = (("left", "right"), ("top", "bottom"), ("above", "below"))
_THINNED = (96, 72, 48, 36, 36, 28, 28, 20, 16, 8, 1)


class Wording:
    """Turns questions into tokens the way processor and chat template do."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._encode = functools.lru_cache(50_000)(self._encode_text)
        self.prefix = [tokenizer.bos_token_id, *self._encode("USER: ")]
        self.pad = tokenizer.pad_token_id

    def _encode_text(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def word(self, word: str) -> int:
        """The token of a word that follows a space."""
        return self._encode(f" {word}")[0]

    def __call__(self, question: Question, suffix: str = "") -> Prompted:
        """Tokens of the turn from after the image to the end of the answer."""
        prompt = [*self._encode("\n"), *self._encode(f"{question.text}{suffix} ASSISTANT:")]
        return Prompted(prompt, [*self._encode(f" {question.answer}"), self._tokenizer.eos_token_id])


class FeaturePool:
    """Tower features of scenes, computed once in chunks and kept in half precision."""

    def __init__(self, tower, split: str, first: int = 0, device: str = "cpu"):
        self._tower, self._split, self._first, self._device = tower, split, first, device
        self._chunks: dict[int, np.ndarray] = {}

    def scene(self, index: int) -> Scene:
        """The scene number `index` of the pool."""
        return make_scene(self._split, self._first + index)

    def features(self, index: int) -> np.ndarray:
        """What the projector reads of that scene, `(144, width)` float16."""
        number, offset = divmod(index, CHUNK)
        if number not in self._chunks:
            self._chunks[number] = self._compute(range(number * CHUNK, (number + 1) * CHUNK))
        return self._chunks[number][offset]

    def _compute(self, indices) -> np.ndarray:
        import torch

        from rcb_lmms.lab.checkpoint import preprocess, read_tower

        pixels = preprocess(np.stack([self.scene(index).pixels() for index in indices])).to(self._device)
        with torch.no_grad():
            return read_tower(self._tower, pixels)[0].to(torch.float16).cpu().numpy()


@dataclass(frozen=True)
class View:
    """A scene as one training example sees it: indices of kept tokens, which of those are blanked, what is asked."""

    scene: Scene
    kept: np.ndarray
    blanked: np.ndarray
    questions: list[Prompted]


def choose_tokens(owner: np.ndarray, count: int, random: np.random.Generator, early: bool) -> np.ndarray:
    """Indices of `count` of the tokens, ascending: at random, objects first, or background first."""
    order = random.random(TOKENS)
    taste = random.random()
    on_object = owner.ravel() >= 0
    if taste < (0.8 if early else 0.4):
        order -= on_object
    elif taste > (1.0 if early else 0.9):
        order += on_object
    return np.sort(np.argsort(order, kind="stable")[:count])


def make_view(scene: Scene, count: int, wording: Wording, random: np.random.Generator, progress: float) -> View:
    """Draw what one training example keeps and asks; `progress` in [0, 1] goes from easy to everything.

    Answers hold of what is visible, not of the whole scene: the truth about objects without tokens would only teach
    the model to guess.
    """
    owner, taught = scene.patch_owner().ravel(), patch_labels(scene)["kind"] >= 0
    kept = choose_tokens(owner, count, random, early=progress < 0.2)
    blanked = random.random(len(kept)) < (random.choice([0.03, 0.1, 0.3]) if random.random() < 0.15 else 0)
    shown = np.unique(owner[kept[~blanked & taught[kept]]])
    visible = dataclasses.replace(scene, objects=tuple(scene.objects[index] for index in shown if index >= 0))
    pairs = 5 if count > 8 else 3
    asked = _ask(visible, pairs, random, progress) if visible.objects else blind(scene, random, pairs)
    questions = [wording(question, _suffix(question, random)) for question in asked]
    return View(scene, kept, blanked, questions)


def _ask(scene: Scene, pairs: int, random: np.random.Generator, progress: float) -> list[Question]:
    asked = probe(scene, random) if random.random() < 0.4 else []
    for kind in random.choice(list(_KIND_WEIGHTS), size=pairs, p=list(_KIND_WEIGHTS.values())):
        asked += KINDS_OF_QUESTION[str(kind)](scene, random)
    if progress > 0.3 and random.random() < 0.12:
        asked += caption(scene, random)
    return asked or probe(scene, random)


def _suffix(question: Question, random: np.random.Generator) -> str:
    if question.kind in ("probe", "caption"):
        return ""
    suffix = str(random.choice(list(_SUFFIX_WEIGHTS), p=list(_SUFFIX_WEIGHTS.values())))
    return PHRASE_SUFFIX if question.kind in ("open", "where") and suffix == YES_NO_SUFFIX else suffix


def token_count(random: np.random.Generator, progress: float) -> int:
    """How many image tokens a batch keeps: few and telling ones at first, later anything up to all."""
    if progress < 0.2:
        return int(random.choice([20, 28, 36]))
    whole = 0.1 if progress < 0.75 else 0.4
    return TOKENS if random.random() < whole else int(random.choice(_THINNED))


def pack_views(views: list[View], wording: Wording) -> Packed:
    """Lay the views out as one batch."""
    return pack(wording.prefix, [len(v.kept) for v in views], [v.questions for v in views], wording.pad)


def projected(model, views: list[View], features: list[np.ndarray]):
    """Image tokens of the views after the projector, zero in blanked and unused slots, `(b, slots, d)`."""
    import torch

    slots = max(len(view.kept) for view in views)
    raw = np.zeros((len(views), slots, features[0].shape[-1]), np.float32)
    alive = np.zeros((len(views), slots, 1), np.float32)
    for row, view in enumerate(views):
        raw[row, : len(view.kept)] = features[row][view.kept]
        alive[row, : len(view.kept), 0] = ~view.blanked
    device = model.device
    return model.model.multi_modal_projector(torch.from_numpy(raw).to(device)) * torch.from_numpy(alive).to(device)


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
    from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

    rows, slots, words, places = [], [], [], []
    for row, view in enumerate(views):
        owner, taught = view.scene.patch_owner().ravel(), patch_labels(view.scene)["kind"] >= 0
        for slot in np.flatnonzero(~view.blanked & (owner[view.kept] >= 0) & taught[view.kept]):
            item = view.scene.objects[owner[view.kept[slot]]]
            rows.append(row)
            slots.append(slot)
            name = item.kind if item.digit is None else str(item.digit)
            words.append([wording.word(word) for word in (item.colour, item.kind, name)])
            places.append([view.kept[slot] % GRID, view.kept[slot] // GRID, view.kept[slot] // GRID])
    if not rows:
        return features.sum() * 0
    chosen = random.permutation(len(rows))[:sample]
    tokens = features[np.array(rows)[chosen], np.array(slots)[chosen]]
    logits = model.lm_head(model.model.language_model.norm(tokens))
    wanted = torch.from_numpy(np.array(words)[chosen]).to(logits.device)
    named = sum(cross_entropy(logits, wanted[:, column]) for column in range(3)) / 3
    low, high = ([wording.word(word) for word in side] for side in zip(*_OPPOSITES, strict=True))
    # A soft target makes the words a scale, so that places can be compared and not only told apart.
    offsets = torch.from_numpy(np.array(places)[chosen]).to(logits) - (GRID - 1) / 2
    return named + 2 * binary_cross_entropy_with_logits(logits[:, high] - logits[:, low], offsets.sigmoid())
