"""Pruning between two layers of a decoder, on one model instance, through hooks that leave with the `with` block.

The decoder runs its first `layer` layers on the whole prompt. The attention of the last prompt token in the last of
them scores the candidates (FastV's visual tokens); the later layers see, and cache, only what stays. Tokens keep the
rotary positions that they had, so the later layers' caches are shorter but speak of the same places.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rcb_lmms.engine.layer_inputs import (
    Span,
    candidates,
    check_decoder,
    check_inputs,
    check_left_padding,
    counts,
    find_decoder,
)
from rcb_lmms.errors import UserError


@contextlib.contextmanager
def prune_at_layer(
    model: nn.Module,
    *,
    layer: int,
    keep: int | Sequence[int],
    spans: Span | Sequence[Span | Sequence[Span]],
    mode: str = "drop",
) -> Iterator[LayerPruning]:
    """Prune every prefill inside the block; works for `forward` and `generate`, batched with left padding.

    A cached decode step continues what its prefill kept. Without a cache every step is a prefill and prunes anew from
    its newest token, as the original FastV did. A block inside another on the same model suspends the outer one.

    Args:
        model: a Llama- or Qwen2-like decoder, or any Hugging Face model that has one (`get_decoder()`).
        layer: layers that see everything, 1 to one less than the decoder has.
        keep: candidates that stay, for all rows or one number per row.
        spans: the candidates, as `(start, stop)` in the padded sequence: one for all rows, one per row, or a list of
            several (or none) per row.
        mode: `drop` gathers the remaining tokens, so logits are returned for these alone; `mask` keeps the length and
            hides the pruned keys from later layers.

    Yields:
        LayerPruning: what the latest prefill kept, and why.

    Raises:
        UserError: here for `layer`, `mode` or an unknown decoder; in the forward pass for spans, counts, masks and
            caches that do not fit.
    """
    decoder = find_decoder(model)
    check_decoder(decoder, layer, mode)
    pruning = LayerPruning(decoder, layer, keep, spans, mode)
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
    """What the latest prefill under `prune_at_layer` kept; both lists hold one CPU tensor per row.

    Attributes:
        kept: `(keep,)` int64 positions, in the padded sequence, of the candidates that stayed, ascending.
        scores: `(candidates,)` float32 attention of the last token to each candidate, by rising position.
    """

    def __init__(self, decoder: nn.Module, layer: int, keep: int | Sequence[int], spans: Any, mode: str):
        self.kept: list[Tensor] = []
        self.scores: list[Tensor] = []
        self._decoder, self._layer, self._keep, self._spans, self._mode = decoder, layer, keep, spans, mode
        self._handles: list[Any] = []
        self._start(None)

    # All positions below refer to the padded prompt; `valid` is False for padding.

    def _start(self, attention_mask: Tensor | None) -> None:
        self._prefill = True
        self._cache: Any = None
        self._padding = None if attention_mask is None else attention_mask.bool().cpu()  # (b, n)
        self._queries: Tensor | None = None  # (b, r) positions that later layers see as queries
        self._valid: Tensor | None = None  # (b, r) whether they see them as keys
        self._length = 0
        self._changed: dict[str, Any] = {}

    def _attach(self) -> None:
        layers = self._decoder.layers
        self._handles = [
            self._decoder.register_forward_pre_hook(self._on_decoder, with_kwargs=True),
            layers[self._layer - 1].self_attn.register_forward_pre_hook(self._on_attention, with_kwargs=True),
            layers[self._layer].register_forward_pre_hook(self._on_first_pruned_layer, with_kwargs=True),
        ]
        for later in layers[self._layer + 1 :]:
            self._handles.append(later.register_forward_pre_hook(self._on_later_layer, with_kwargs=True))

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

    def _on_attention(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self._prefill:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        batch, self._length = hidden.shape[:2]
        if self._padding is None:
            self._padding = torch.ones(batch, self._length, dtype=torch.bool)
        check_left_padding(self._padding)
        where_each = candidates(self._spans, self._padding)
        row = last_row_attention(attention, hidden, kwargs["position_embeddings"], self._padding).cpu()
        self.scores = [scores[where] for scores, where in zip(row, where_each, strict=True)]
        self.kept = [
            where[scores.argsort(descending=True, stable=True)[:count]].sort().values
            for scores, where, count in zip(self.scores, where_each, counts(self._keep, where_each), strict=True)
        ]
        self._plan(where_each)

    def _plan(self, candidates: list[Tensor]) -> None:
        """Which positions the later layers see: padding and pruned candidates go, rows are left-padded again."""
        stays = self._padding.clone()
        for row, where, kept in zip(stays, candidates, self.kept, strict=True):
            row[where] = False
            row[kept] = True
        if self._mode == "mask":
            self._queries = torch.arange(self._length).expand(len(stays), -1)
            self._valid = stays
            return
        longest = int(stays.sum(dim=1).max())
        self._queries = torch.zeros(len(stays), longest, dtype=torch.long)
        self._valid = torch.zeros(len(stays), longest, dtype=torch.bool)
        for row, queries, valid in zip(stays, self._queries, self._valid, strict=True):
            positions = row.nonzero().squeeze(1)
            queries[longest - len(positions) :] = positions
            valid[longest - len(positions) :] = True

    def _on_first_pruned_layer(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        hidden, *rest = args if args else (kwargs["hidden_states"],)
        kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        implementation = self._decoder.config._attn_implementation
        if self._prefill:
            self._cache = kwargs.get("past_key_values")
            keys, valid, queries = self._queries, self._valid, self._queries
        else:
            keys, valid, queries = self._decoded(hidden.shape[1])
        self._changed = {"attention_mask": _mask(keys, valid, queries, hidden, implementation)}
        if self._prefill and self._mode == "drop":
            hidden = _gather(hidden, queries)
            cosine, sine = kwargs["position_embeddings"]
            self._changed["position_embeddings"] = _gather(cosine, queries), _gather(sine, queries)
            if kwargs.get("position_ids") is not None:
                self._changed["position_ids"] = _gather(kwargs["position_ids"], queries)
        return (hidden, *rest), {**kwargs, **self._changed}

    def _decoded(self, new: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, their validity, and queries when `new` positions follow the prompt and what was decoded so far."""
        batch = len(self._queries)
        total = self._cache.get_seq_length()  # of layer 0, which has this step's tokens already
        after = torch.arange(self._length, total).expand(batch, -1)
        seen = torch.ones_like(after, dtype=torch.bool) if self._padding is None else self._padding[:, self._length :]
        return torch.cat([self._queries, after], 1), torch.cat([self._valid, seen], 1), after[:, -new:]

    def _on_later_layer(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        return args, {**kwargs, **self._changed}


def last_row_attention(
    attention: nn.Module, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], valid: Tensor
) -> Tensor:
    """Softmax attention of the last position to all, mean over query heads, `(b, n)` float32.

    The row that eager attention would return, at the cost of one key projection instead of all `n` rows.

    Args:
        attention: a Llama-like attention module, with optional biases and query and key norms.
        hidden: `(b, n, d)` its input, after the layer's norm.
        position_embeddings: cosine and sine, `(b or 1, n, head width)`.
        valid: `(b, n)` False for padding.
    """
    queries = _heads(attention, "q", hidden[:, -1:])  # (b, h, 1, e)
    keys = _heads(attention, "k", hidden)  # (b, g, n, e)
    cosine, sine = (part[:, None] for part in position_embeddings)
    queries = _rotate(queries, cosine[:, :, -1:], sine[:, :, -1:]).float()
    keys = _rotate(keys, cosine, sine).float()
    queries = queries.reshape(len(keys), keys.shape[1], -1, keys.shape[3])  # query heads grouped by their key head
    logits = queries @ keys.transpose(2, 3) * attention.scaling
    logits = logits.masked_fill(~valid.to(logits.device)[:, None, None], -torch.inf)
    return logits.softmax(dim=-1).mean(dim=(1, 2))


def _heads(attention: nn.Module, kind: str, hidden: Tensor) -> Tensor:
    states = getattr(attention, f"{kind}_proj")(hidden)
    states = states.view(*hidden.shape[:2], -1, attention.head_dim)
    norm = getattr(attention, f"{kind}_norm", None)
    return (states if norm is None else norm(states)).transpose(1, 2)


def _rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cosine + torch.cat([-second, first], dim=-1) * sine


def _gather(states: Tensor, index: Tensor) -> Tensor:
    """Positions `index (b, r)` of `states (b or 1, n, ...)`."""
    index = index.to(states.device)
    rows = torch.arange(len(index), device=index.device)[:, None]
    return states.expand(len(index), *states.shape[1:])[rows, index]


def _mask(keys: Tensor, valid: Tensor, queries: Tensor, hidden: Tensor, implementation: str) -> Tensor | None:
    """The mask `(b, 1, q, k)` in the form the attention wants: causal by original position, padding unseen."""
    plain = bool(valid.all()) and queries.shape[1] in (1, keys.shape[1])
    if plain and implementation == "sdpa":
        return None  # its kernels are faster with no mask, and causal by themselves
    keys, valid, queries = (part.to(hidden.device) for part in (keys, valid, queries))
    allowed = valid[:, None] & (keys[:, None] <= queries[:, :, None])
    # A padding query sees nothing, and a softmax over nothing is NaN in some kernels; nobody reads what it sees.
    allowed |= ~allowed.any(dim=2, keepdim=True)
    allowed = allowed[:, None]
    if implementation == "sdpa":
        return allowed
    return torch.zeros_like(allowed, dtype=hidden.dtype).masked_fill(~allowed, torch.finfo(hidden.dtype).min)


def _active_on(decoder: nn.Module) -> LayerPruning | None:
    for hook in decoder._forward_pre_hooks.values():
        if isinstance(owner := getattr(hook, "__self__", None), LayerPruning):
            return owner
    return None
