"""Pruning between layers of a decoder, on one model instance, through hooks that leave with the `with` block.

The decoder runs its first layers on the whole prompt. The attention of the last prompt token in the last of them
scores the candidates (the visual tokens); the later layers see, and cache, only what stays. A schedule of several steps
does so again among what the step before has left. Tokens keep the rotary positions that they had, so the later layers'
caches are shorter but speak of the same places; or each step renumbers what it leaves.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rcb_lmms.engine.layer_attention import causal_mask, gather, last_row_attention
from rcb_lmms.engine.layer_inputs import (
    Span,
    candidates,
    check_inputs,
    check_left_padding,
    check_schedule,
    counts,
    find_decoder,
)
from rcb_lmms.errors import UserError

Spans = Span | Sequence[Span | Sequence[Span]]
Keep = int | Sequence[int]


@contextlib.contextmanager
def prune_at_layer(
    model: nn.Module, *, layer: int, keep: Keep, spans: Spans, mode: str = "drop"
) -> Iterator[LayerPruning]:
    """Prune every prefill inside the block once, behind `layer` layers; see `prune_in_layers`."""
    with prune_in_layers(model, steps=[(layer, keep)], spans=spans, mode=mode) as pruning:
        yield pruning


@contextlib.contextmanager
def prune_in_layers(
    model: nn.Module,
    *,
    steps: Sequence[tuple[int, Keep]],
    spans: Spans,
    mode: str = "drop",
    positions: str = "original",
) -> Iterator[LayerPruning]:
    """Prune every prefill inside the block; works for `forward` and `generate`, batched with left padding.

    A cached decode step continues what its prefill kept. Without a cache every step is a prefill and prunes anew from
    its newest token, as the original FastV did. A block inside another on the same model suspends the outer one.

    Args:
        model: a Llama- or Qwen2-like decoder, or any Hugging Face model that has one (`get_decoder()`).
        steps: by rising layer, `(layer, keep)`: how many layers have run when the step prunes, 1 to one less than the
            decoder has, and how many candidates stay then, for all rows or one number per row.
        spans: the candidates, as `(start, stop)` in the padded sequence: one for all rows, one per row, or a list of
            several (or none) per row.
        mode: `drop` gathers the remaining tokens, so logits are returned for these alone; `mask` keeps the length and
            hides the pruned keys from later layers.
        positions: `original` keeps every token's rotary position, `contiguous` renumbers at every step what it leaves,
            so that decoded tokens follow without a gap; the latter needs `drop`.

    Yields:
        LayerPruning: what the latest prefill kept, and why.

    Raises:
        UserError: here for layers, modes or an unknown decoder; in the forward pass for spans, counts, masks and
            caches that do not fit.
    """
    decoder = find_decoder(model)
    check_schedule(decoder, [layer for layer, _ in steps], mode, positions)
    pruning = LayerPruning(decoder, [Step(*step) for step in steps], spans, mode, positions)
    outer = _active_on(decoder)
    try:
        if outer is not None:
            outer._detach()
        pruning._attach()
        yield pruning
    finally:
        pruning._detach()
        if outer is not None:
            outer._attach()


@dataclass
class Step:
    """One step of a schedule, and what it did in the latest prefill; the lists hold one CPU tensor per row.

    Attributes:
        layer: layers that have run when it prunes.
        keep: candidates that stay, for all rows or one number per row.
        kept: `(keep,)` int64 positions, in the padded sequence, of the candidates that stayed, ascending.
        scores: `(candidates,)` float32 attention of the last token to each candidate that was left, by rising position.
    """

    layer: int
    keep: Keep
    kept: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    # Positions in the padded prompt that the layers from here on see as queries, and whether they see them as keys.
    queries: Tensor | None = None  # (b, r)
    valid: Tensor | None = None  # (b, r)
    stays: Tensor | None = None  # (b, n)
    lost: Tensor | None = None  # (b,) tokens that this step and those before it dropped
    changed: dict[str, Any] = field(default_factory=dict)  # arguments of these layers


class LayerPruning:
    """What the latest prefill under `prune_in_layers` kept.

    Attributes:
        steps: the schedule, with what each step kept.
    """

    def __init__(self, decoder: nn.Module, steps: list[Step], spans: Spans, mode: str, positions: str):
        self.steps = steps
        self._decoder, self._spans, self._mode, self._positions = decoder, spans, mode, positions
        self._handles: list[Any] = []
        self._start(None)

    @property
    def kept(self) -> list[Tensor]:
        """What stayed behind the last step; see `Step.kept`."""
        return self.steps[-1].kept

    @property
    def scores(self) -> list[Tensor]:
        """What the last step decided by; see `Step.scores`."""
        return self.steps[-1].scores

    def _start(self, attention_mask: Tensor | None) -> None:
        self._prefill = True
        self._cache: Any = None
        self._padding = None if attention_mask is None else attention_mask.bool().cpu()  # (b, n), False for padding
        self._length = 0

    def _attach(self) -> None:
        layers, ends = self._decoder.layers, [step.layer for step in self.steps[1:]] + [len(self._decoder.layers)]
        hooks = [(self._decoder, self._on_decoder)]
        for index, (step, end) in enumerate(zip(self.steps, ends, strict=True)):
            hooks.append((layers[step.layer - 1].self_attn, functools.partial(self._on_attention, index)))
            hooks.append((layers[step.layer], functools.partial(self._on_first_pruned_layer, index)))
            hooks += [(layers[later], functools.partial(_on_later_layer, step)) for later in range(step.layer + 1, end)]
        self._handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _on_decoder(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        mask, cache = given.get("attention_mask"), given.get("past_key_values")
        check_inputs(mask, cache)
        if cache is None or cache.get_seq_length() == 0:
            self._start(mask)
            return
        if cache is not self._cache:
            raise UserError(
                wanted="a decode step that continues a pruned prompt",
                found=f"a cache of {cache.get_seq_length()} positions that was filled elsewhere",
                allowed="prompts whose prefill ran inside the same block, in one piece",
                next_step="run the whole prompt inside `prune_at_layer`",
            )
        self._prefill = False
        self._padding = None if mask is None else mask.bool().cpu()

    def _on_attention(self, index: int, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self._prefill:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        if index == 0:
            batch, self._length = hidden.shape[:2]
            if self._padding is None:
                self._padding = torch.ones(batch, self._length, dtype=torch.bool)
            check_left_padding(self._padding)
            where_each, stays, valid = candidates(self._spans, self._padding), self._padding, self._padding
            queries = torch.arange(self._length).expand(batch, -1)
        else:
            before = self.steps[index - 1]
            where_each, stays, valid, queries = before.kept, before.stays, before.valid, before.queries
        row = last_row_attention(attention, hidden, kwargs["position_embeddings"], valid).cpu()
        row = torch.zeros(stays.shape).scatter_add_(1, queries, row)  # (b, n); padding adds nothing
        step = self.steps[index]
        step.scores = [scores[where] for scores, where in zip(row, where_each, strict=True)]
        step.kept = [
            where[scores.argsort(descending=True, stable=True)[:count]].sort().values
            for scores, where, count in zip(step.scores, where_each, counts(step.keep, where_each), strict=True)
        ]
        self._plan(step, stays.clone(), where_each)

    def _plan(self, step: Step, stays: Tensor, candidates: list[Tensor]) -> None:
        """Which positions the later layers see: padding and pruned candidates go, rows are left-padded again."""
        for row, where, kept in zip(stays, candidates, step.kept, strict=True):
            row[where] = False
            row[kept] = True
        step.stays, step.lost = stays, self._padding.sum(1) - stays.sum(1)
        if self._mode == "mask":
            step.queries, step.valid = torch.arange(self._length).expand(len(stays), -1), stays
            return
        longest = int(stays.sum(dim=1).max())
        step.queries = torch.zeros(len(stays), longest, dtype=torch.long)
        step.valid = torch.zeros(len(stays), longest, dtype=torch.bool)
        for row, queries, valid in zip(stays, step.queries, step.valid, strict=True):
            positions = row.nonzero().squeeze(1)
            queries[longest - len(positions) :] = positions
            valid[longest - len(positions) :] = True

    def _on_first_pruned_layer(
        self, index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict]:
        hidden, *rest = args if args else (kwargs["hidden_states"],)
        kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        step = self.steps[index]
        if self._prefill:
            self._cache = kwargs.get("past_key_values")
            keys, valid, queries = step.queries, step.valid, step.queries
        else:
            keys, valid, queries = self._decoded(step, hidden.shape[1])
        implementation = self._decoder.config._attn_implementation
        step.changed = {"attention_mask": causal_mask(keys, valid, queries, hidden, implementation)}
        if self._prefill and self._mode == "drop":
            hidden = gather(hidden, self._places(index))
        if self._mode == "drop" and (self._prefill or self._positions == "contiguous"):
            step.changed |= self._placed(step, hidden, kwargs)
        return (hidden, *rest), {**kwargs, **step.changed}

    def _places(self, index: int) -> Tensor:
        """Where the layers before had the positions that a step leaves, `(b, r)`."""
        queries = self.steps[index].queries
        if index == 0:
            return queries
        before = self.steps[index - 1]
        rows, columns = before.valid.nonzero(as_tuple=True)
        places = torch.zeros(before.stays.shape, dtype=torch.long)
        places[rows, before.queries[rows, columns]] = columns
        return places.gather(1, queries)

    def _placed(self, step: Step, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Rotary positions of a step's tokens, as arguments of the layers behind it."""
        cosine, sine = kwargs["position_embeddings"]
        given = kwargs.get("position_ids")
        if self._positions == "original":
            placed = {"position_embeddings": (gather(cosine, step.queries), gather(sine, step.queries))}
            return placed if given is None else {**placed, "position_ids": gather(given, step.queries)}
        lost = step.lost.to(given.device)[:, None]
        if self._prefill:  # the last token lies as many places lower as were lost, the others just before it
            back = torch.arange(hidden.shape[1] - 1, -1, -1, device=given.device)
            ids = (given[:, -1:] - lost - back).clamp(min=0)
        else:
            ids = given - lost
        return {"position_embeddings": self._decoder.rotary_emb(hidden, position_ids=ids), "position_ids": ids}

    def _decoded(self, step: Step, new: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, their validity, and queries when `new` positions follow the prompt and what was decoded so far."""
        batch = len(step.queries)
        total = self._cache.get_seq_length()  # of layer 0, which has this step's tokens already
        after = torch.arange(self._length, total).expand(batch, -1)
        seen = torch.ones_like(after, dtype=torch.bool) if self._padding is None else self._padding[:, self._length :]
        return torch.cat([step.queries, after], 1), torch.cat([step.valid, seen], 1), after[:, -new:]


def _on_later_layer(step: Step, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    return args, {**kwargs, **step.changed}


def _active_on(decoder: nn.Module) -> LayerPruning | None:
    for hook in decoder._forward_pre_hooks.values():
        if isinstance(owner := getattr(hook, "__self__", None), LayerPruning):
            return owner
    return None
