"""Many questions about one image in one sequence: [USER: <image tokens>] [question 1] [question 2] ...

A four-dimensional mask hides the questions from each other and positions of every question go on from the image, so
each question sees exactly what it would see alone, at a fraction of the cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IGNORED = -100


@dataclass(frozen=True)
class Prompted:
    """A question as tokens: its text from after the image to "ASSISTANT:", and its answer; and its kind."""

    prompt: list[int]
    answer: list[int]
    kind: str = ""


@dataclass(frozen=True)
class Packed:
    """A batch of packed sequences of length s = prefix + image slots + text.

    `tokens`, `segments`, `positions`, `labels` are `(b, s)` int64; segment 0 is the shared prefix, -1 is padding, n the
    nth question; `weights (b, s)` float32 gives every question the same weight however long its answer is.
    """

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    image_start: int
    image_slots: int

    def mask(self, device):
        """Additive attention mask, `(b, 1, s, s)` float32."""
        import torch

        segments = torch.from_numpy(self.segments).to(device)
        column, row = segments[:, None, :], segments[:, :, None]
        causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=device).tril()
        seen = causal & ((column == 0) | (column == row)) & (column >= 0)
        # A row that sees nothing would be NaN: padding looks at itself.
        seen |= torch.eye(segments.shape[1], dtype=torch.bool, device=device)
        return torch.zeros(seen.shape, device=device).masked_fill_(~seen, torch.finfo(torch.float32).min)[:, None]


def pack(prefix: list[int], kept: list[int], questions: list[list[Prompted]], pad: int) -> Packed:
    """Lay out a batch: `kept[i]` image tokens and `questions[i]` for scene i, behind a common prefix."""
    slots, start = max(kept), len(prefix)
    lengths = [sum(len(q.prompt) + len(q.answer) for q in asked) for asked in questions]
    shape = (len(kept), start + slots + max(lengths))
    tokens, segments = np.full(shape, pad), np.full(shape, -1)
    positions, labels, weights = np.zeros(shape, np.int64), np.full(shape, IGNORED), np.zeros(shape, np.float32)
    tokens[:, :start], segments[:, :start], positions[:, :start] = prefix, 0, np.arange(start)
    positions[:, start : start + slots] = start + np.arange(slots)
    for row, asked in enumerate(questions):
        segments[row, start : start + kept[row]] = 0
        at = start + slots
        for number, question in enumerate(asked, 1):
            ids = question.prompt + question.answer
            end, answer = at + len(ids), len(question.answer)
            tokens[row, at:end], segments[row, at:end] = ids, number
            positions[row, at:end] = start + kept[row] + np.arange(len(ids))
            labels[row, end - answer - 1 : end - 1] = question.answer
            weights[row, end - answer - 1 : end - 1] = 1 / answer
            at = end
    return Packed(tokens, segments, positions, labels, weights, start, slots)


def run_packed(model, packed: Packed, features):
    """Last hidden states `(b, s, d)` of a packed batch; `features (b, slots, d)` are projected image tokens."""
    import torch

    device = features.device
    tokens = torch.from_numpy(packed.tokens).to(device)
    embedded = model.get_input_embeddings()(tokens)
    start, end = packed.image_start, packed.image_start + packed.image_slots
    embedded = torch.cat([embedded[:, :start], features.to(embedded.dtype), embedded[:, end:]], 1)
    return model.model.language_model(
        inputs_embeds=embedded,
        attention_mask=packed.mask(device),
        position_ids=torch.from_numpy(packed.positions).to(device),
        use_cache=False,
    ).last_hidden_state
