"""A hint for the second stage: words are told where to look.

Where a question names an object, one head should look at that object's image tokens; from the end of the question one
head of the next layer should look at that name; and where the answer is a letter, one head of the last layer at the
option it stands for.
Retrieving what one named object among several looks like, and which option says so, are steps that answers alone teach
too slowly for a short training: left alone, the model averages over all objects for a long time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rcb_lmms.lab.scenes import SceneObject
from rcb_lmms.lab.wordings import LETTERS
from training.packing import Packed

# The second layer is the first in which a noun can know its adjective.
NOUN_LAYER, NAME_LAYER, OPTION_LAYER = 1, 2, 3


def points_of(prompt: list[int], objects: Sequence[SceneObject], visible, wording) -> list[tuple[int, list[int]]]:
    """Places of a prompt's nouns and the visible objects (indices) each of them means."""
    found = []
    for place, token in enumerate(prompt):
        if (noun := wording.nouns.get(token)) is None:
            continue
        colour = wording.colours.get(prompt[place - 1]) if place else None
        meant = [
            int(index)
            for index in visible
            if noun in ("object", objects[index].kind) and colour in (None, objects[index].colour)
        ]
        if meant:
            found.append((place, meant))
    return found


def option_places(prompt: list[int], answer: str, wording) -> list[tuple[str, int, np.ndarray]]:
    """From the end of a prompt to the words of the option that a letter stands for, as `points` of a view."""
    if answer not in LETTERS:
        return []
    letter, ends = wording.bare(answer), wording.option_ends
    for place in range(1, len(prompt) - 2):
        if (
            prompt[place] == letter
            and prompt[place - 1] in wording.before_letter
            and prompt[place + 1] in wording.after_letter
        ):
            stop = next(end for end in range(place + 2, len(prompt)) if prompt[end] in ends or end == len(prompt) - 1)
            return [("option", len(prompt) - 1, np.arange(place + 2, stop))]
    return []


class Pointing:
    """Watches one attention layer of a language model, and says how far its first head is from pointing."""

    def __init__(self, language_model, layer: int):
        self._attention = language_model.layers[layer].self_attn
        self.remove = self._attention.register_forward_pre_hook(self._watch, with_kwargs=True).remove

    def _watch(self, module, args, kwargs):
        self._hidden, self._rotation = kwargs["hidden_states"], kwargs["position_embeddings"]
        self._mask = kwargs["attention_mask"]

    def loss(self, packed: Packed, points: list[list[list[tuple[str, int, np.ndarray]]]], what: str):
        """Mean of -log(attention on the meant tokens) of the last forward pass, over the points of kind `what`.

        `points[row][question]` lists (kind, place in the prompt, what is meant): slots for a noun, places in the same
        prompt for the others.
        """
        import torch

        found = placed(packed, points, what)
        if not found:
            return self._hidden.sum() * 0
        wanted = torch.full((len(found), self._hidden.shape[1]), -torch.inf, device=self._hidden.device)
        for point, (_, _, meant) in enumerate(found):
            wanted[point, torch.from_numpy(meant)] = 0
        rows, columns = (torch.tensor(values) for values in list(zip(*found, strict=True))[:2])
        scores = self._scores(rows, columns)
        return (scores.logsumexp(-1) - (scores + wanted).logsumexp(-1)).mean()

    def states(self, found: list[tuple[int, int, np.ndarray]]):
        """What this layer reads at the places that `placed` found, `(p, d)`."""
        rows, columns, _ = zip(*found, strict=True)
        return self._hidden[list(rows), list(columns)]

    def _scores(self, rows, columns):
        """Attention logits of the first head at the given places, `(p, s)`."""
        from torch.nn.functional import linear
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        attention, size = self._attention, self._attention.head_dim
        query, key = (
            linear(self._hidden, part.weight[:size], None if part.bias is None else part.bias[:size])[:, None]
            for part in (attention.q_proj, attention.k_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *self._rotation)
        scores = (query[rows, 0, columns][:, None] @ key[rows, 0].transpose(1, 2))[:, 0] * attention.scaling
        return scores.float() + self._mask[rows, 0, columns]


def placed(packed: Packed, points, what: str) -> list[tuple[int, int, np.ndarray]]:
    """Row, column and meant columns of the points of kind `what` in a packed batch."""
    found = []
    for row, asked in enumerate(points):
        for number, looks in enumerate(asked, 1):
            own = [look for look in looks if look[0] == what]
            start = int(np.argmax(packed.segments[row] == number)) if own else 0
            for _, place, meant in own:
                found.append((row, start + place, meant + (packed.image_start if what == "noun" else start)))
    return found
