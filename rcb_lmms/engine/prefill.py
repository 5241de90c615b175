"""Logits of the next token behind prompts that begin like one that was computed before."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from rcb_lmms.engine.layer_inputs import find_decoder

if TYPE_CHECKING:
    from rcb_lmms.families.base import Family

# Computed at a time: enough to keep a device busy, and few enough that prompts of unlike beginnings stay apart.
POSITIONS = 1024


class Prefill:
    """A prompt whose keys and values are kept for prompts that begin like it.

    Args:
        family: the loaded model.
        embeds: `(s, d)`.

    Attributes:
        logits: `(v,)` float32 behind the last position.
    """

    def __init__(self, family: Family, embeds: Tensor):
        self.family, self.embeds = family, embeds
        cache = DynamicCache()
        self.logits = self._forward(embeds[None], cache)[0]
        self._layers = [(layer.keys, layer.values) for layer in cache.layers]

    def continued(
        self,
        shared: Sequence[int],
        rests: Sequence[Tensor],
        batch_size: int,
        more: Callable[[list[int], list[int]], list[bool]] = lambda rows, tokens: [False] * len(rows),
    ) -> Tensor:
        """`(p, v)` float32 logits behind prompts that are the first rows of this one and then something else.

        Args:
            shared: how many rows of this prompt each begins with.
            rests: what follows in each, `(r, d)`.
            batch_size: prompts per forward pass.
            more: told which prompts have which likeliest next token, says which of them are read one token later.
        """
        logits: list[Any] = [None] * len(rests)
        with torch.inference_mode():
            for rows in _batches(shared, list(map(len, rests)), batch_size):
                begin = min(shared[row] for row in rows)
                cache = Cache([_Shared(keys[..., :begin, :], values[..., :begin, :]) for keys, values in self._layers])
                embeds = [torch.cat([self.embeds[begin : shared[row]], rests[row]]) for row in rows]
                found = self._forward(torch.stack(embeds), cache)
                tokens = found.argmax(-1)
                if later := [at for at, read in enumerate(more(rows, tokens.tolist())) if read]:
                    cache.batch_select_indices(torch.tensor(later, device=found.device))
                    following = self.family.model.get_input_embeddings()(tokens[later])
                    found[later] = self._forward(following[:, None].to(self.embeds), cache)
                for row, own in zip(rows, found, strict=True):
                    logits[row] = own
        return torch.stack(logits)

    def _forward(self, embeds: Tensor, cache: Cache) -> Tensor:
        model = self.family.model
        with torch.inference_mode(), _last_position_alone(find_decoder(model).layers[-1:]):
            output = model(inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return output.logits[:, -1].float()


@contextlib.contextmanager
def _last_position_alone(layers: Iterable[Any]) -> Iterator[None]:
    """Spare the last decoder layer all that stands behind its keys and values, at every position but the last.

    Only the last position's output is read; it is added to the states of all others too, which are thrown away.
    """
    modules = [module for layer in layers for module in (layer.self_attn.o_proj, layer.mlp)]
    hooks = [module.register_forward_pre_hook(lambda _, given: (given[0][:, -1:],)) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Shared(DynamicLayer):
    """Keys and values of a batch whose rows all begin with `(1, heads, n, e)`, which stands in memory once."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self._beginning = (keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        own = super().update(key_states, value_states, *args, **kwargs)
        keys, values = (
            torch.cat([first.expand(len(more), -1, -1, -1), more], dim=-2)
            for first, more in zip(self._beginning, own, strict=True)
        )
        return keys, values

    def get_seq_length(self) -> int:
        return self._beginning[0].shape[-2] + super().get_seq_length()

    def batch_select_indices(self, indices: Tensor) -> None:
        self.keys, self.values = self.keys[indices], self.values[indices]


def _batches(shared: Sequence[int], lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Rows of one length in all, which need no padding, and of like beginnings: the shortest is what all share."""
    order = sorted(range(len(shared)), key=lambda row: (shared[row] + lengths[row], shared[row]))
    for length, rows in itertools.groupby(order, key=lambda row: shared[row] + lengths[row]):
        batch: list[int] = []
        for row in rows:
            if batch and (len(batch) == most or (len(batch) + 1) * (length - shared[batch[0]]) > POSITIONS):
                yield batch
                batch = []
            batch.append(row)
        yield batch
