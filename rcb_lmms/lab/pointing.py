"""A hint for the second stage: where a question names an object, one head should look at that object's image tokens.

Retrieving what one named object among several looks like, or where it lies, is the step that answers alone teach too
slowly for a short training: left alone, the model averages over all objects for a long time.
"""

from __future__ import annotations

import numpy as np

from rcb_lmms.lab.packing import Packed
from rcb_lmms.lab.questions import Question

# The second layer is the first in which a noun can know its adjective.
_LAYER = 1


def named_objects(question: Question, prompt: list[int], nouns: frozenset[int]) -> list[tuple[int, tuple[int, ...]]]:
    """Places of a prompt's nouns and the objects (indices) each of them means."""
    if question.kind in ("probe", "caption") or not question.about:
        return []
    places = [place for place, token in enumerate(prompt) if token in nouns]
    meant = [(index,) for index in question.about] if question.kind in ("position", "where") else [question.about]
    return list(zip(places, meant, strict=False))


class Pointing:
    """Watches one attention layer of a language model, and says how far its first head is from pointing."""

    def __init__(self, language_model):
        self._attention = language_model.layers[_LAYER].self_attn
        self._attention.register_forward_pre_hook(self._watch, with_kwargs=True)

    def _watch(self, module, args, kwargs):
        self._hidden, self._rotation = kwargs["hidden_states"], kwargs["position_embeddings"]
        self._mask = kwargs["attention_mask"]

    def loss(self, packed: Packed, points: list[list[list[tuple[int, np.ndarray]]]]):
        """Mean of -log(attention on the meant tokens) of the last forward pass.

        `points[row][question]` lists (place in the prompt, image slots meant).
        """
        import torch

        rows, columns, targets = [], [], []
        for row, asked in enumerate(points):
            for number, pairs in enumerate(asked, 1):
                start = int(np.argmax(packed.segments[row] == number)) if pairs else 0
                for place, slots in pairs:
                    rows.append(row)
                    columns.append(start + place)
                    targets.append(packed.image_start + slots)
        if not rows:
            return self._hidden.sum() * 0
        wanted = torch.full((len(rows), self._hidden.shape[1]), -torch.inf, device=self._hidden.device)
        for point, slots in enumerate(targets):
            wanted[point, torch.from_numpy(slots)] = 0
        scores = self._scores(torch.tensor(rows), torch.tensor(columns))
        return (scores.logsumexp(-1) - (scores + wanted).logsumexp(-1)).mean()

    def _scores(self, rows, columns):
        """Attention logits of the first head at the given places, `(p, s)`."""
        from torch.nn.functional import linear
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        attention, size = self._attention, self._attention.head_dim
        query = linear(self._hidden, attention.q_proj.weight[:size])[:, None]
        key = linear(self._hidden, attention.k_proj.weight[:size])[:, None]
        query, key = apply_rotary_pos_emb(query, key, *self._rotation)
        scores = (query[rows, 0, columns][:, None] @ key[rows, 0].transpose(1, 2))[:, 0] * attention.scaling
        return scores.float() + self._mask[rows, 0, columns]
