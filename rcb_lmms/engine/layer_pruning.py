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
from collections.abc import Callable, Iterator, Sequence
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
from rcb_lmms.engine.layer_steps import Keep, Step
from rcb_lmms.engine.layer_views import Watch
from rcb_lmms.errors import UserError
from rcb_lmms.pruners.tokens import LayerChoice, LayerView

Spans = Span | Sequence[Span | Sequence[Span]]
Select = Callable[[int, int, LayerView], LayerChoice]


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
    select: Select | None = None,
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
        select: `select(row, step, view)` chooses what stays of one prompt at a step; without it the attention of the
            last token in the layer before decides. It needs `drop`.

    Yields:
        LayerPruning: what the latest prefill kept, and why.

    Raises:
        UserError: here for layers, modes or an unknown decoder; in the forward pass for spans, counts, masks and
            caches that do not fit.
    """
    decoder = find_decoder(model)
    check_schedule(decoder, [layer for layer, _ in steps], mode, positions)
    pruning = LayerPruning(decoder, [Step(*step) for step in steps], spans, mode, positions, select)
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


class LayerPruning:
    """What the latest prefill under `prune_in_layers` kept.

    Attributes:
        steps: the schedule, with what each step kept.
    """

    def __init__(
        self,
        decoder: nn.Module,
        steps: list[Step],
        spans: Spans,
        mode: str,
        positions: str,
        select: Select | None = None,
    ):
        self.steps, self._select, self._watch = steps, select, Watch()
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
            if self._select is None:
                hooks.append((layers[step.layer - 1].self_attn, functools.partial(self._on_attention, index)))
            else:
                hooks += self._watch.hooks(self._decoder, step.layer, index == 0)
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
        where_each, stays, valid, queries = self._left(index, hidden)
        row = last_row_attention(attention, hidden, kwargs["position_embeddings"], valid).cpu()
        row = torch.zeros(stays.shape).scatter_add_(1, queries, row)  # (b, n); padding adds nothing
        step = self.steps[index]
        step.scores = [scores[where] for scores, where in zip(row, where_each, strict=True)]
        step.kept = step.slots = step.origins = [
            where[scores.argsort(descending=True, stable=True)[:count]].sort().values
            for scores, where, count in zip(step.scores, where_each, counts(step.keep, where_each), strict=True)
        ]
        step.plan(stays.clone(), where_each, self._padding, self._mode)

    def _left(self, index: int, hidden: Tensor) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """What the step before left: candidates of each row, `stays (b, n)`, and `valid`, `queries (b, r)`."""
        if index:
            before = self.steps[index - 1]
            return before.slots, before.stays, before.valid, before.queries
        batch, self._length = hidden.shape[:2]
        if self._padding is None:
            self._padding = torch.ones(batch, self._length, dtype=torch.bool)
        check_left_padding(self._padding)
        everything = torch.arange(self._length).expand(batch, -1)
        return candidates(self._spans, self._padding), self._padding, self._padding, everything

    def _choose(self, index: int, hidden: Tensor) -> None:
        """Have the method choose among what the step before left, row by row."""
        step = self.steps[index]
        where_each, stays, valid, queries = self._left(index, hidden)
        visual = candidates(self._spans, self._padding)  # also those that steps before dropped
        step.forget()
        for row, where in enumerate(where_each):
            if not len(where):  # a prompt without images
                choice = LayerChoice(where, torch.zeros(0))
            else:
                columns = valid[row].nonzero().squeeze(1)
                padding = int((~self._padding[row]).sum())
                positions = queries[row, columns]
                view = self._watch.view(
                    self._decoder, step.layer, hidden, row, columns, torch.searchsorted(positions, where),
                    positions - padding, visual[row] - padding,
                )  # fmt: skip
                choice = self._select(row, index, view)
            known = where if index == 0 else self.steps[index - 1].origins[row]
            step.take(where, known, choice, hidden[row], queries[row], valid[row])
        step.plan(stays.clone(), where_each, self._padding, self._mode)

    def _on_first_pruned_layer(
        self, index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict]:
        hidden, *rest = args if args else (kwargs["hidden_states"],)
        kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        step = self.steps[index]
        if self._prefill:
            self._cache = kwargs.get("past_key_values")
            if self._select is not None:
                self._choose(index, hidden)
            keys, valid, queries = step.queries, step.valid, step.queries
        else:
            keys, valid, queries = self._decoded(step, hidden.shape[1])
        implementation = self._decoder.config._attn_implementation
        step.changed = {"attention_mask": causal_mask(keys, valid, queries, hidden, implementation)}
        if self._prefill and self._mode == "drop":
            hidden = step.moved(gather(hidden, self._places(index)))
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
