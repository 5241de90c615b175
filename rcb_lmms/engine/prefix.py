"""Keys and values of what questions about one image have in common, computed once.

The image stands before the question, and a method before the language model chooses its tokens without the question:
all that precedes the question's words is the same for all questions about an image. Under a causal mask its keys and
values are too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cachetools import LRUCache

from rcb_lmms.engine.generation import left_pad, positions_of
from rcb_lmms.engine.layer_inputs import find_decoder
from rcb_lmms.families.packed import Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from rcb_lmms.families.base import Family

# 64 tokens of a 7B model with full attention heads take 32 MiB.
STORE_BYTES = 1 << 30


@dataclass(frozen=True)
class Continued:
    """A batch whose beginnings are known, as arguments of `generate`: every row is `[padding, prefix, padding, rest]`.

    Attributes:
        embeds: `(b, p + r, d)`; transformers reads the last `r` columns, the others are zeros.
        mask: `(b, p + r)`, 0 for padding.
        positions: `(b, p + r)` of the rotary embedding.
        cache: transformers' cache, filled with the prefixes.
    """

    embeds: Tensor
    mask: Tensor
    positions: Tensor
    cache: Any


class PrefixCache:
    """Prefixes of prompts by the name they have in common; the least recently used ones go.

    Args:
        family: the loaded model.
        always: use it also where no two questions share a prefix.
        store_bytes: bound on what is remembered between batches.

    Attributes:
        computed: prefixes computed so far.
    """

    def __init__(self, family: Family, always: bool = False, store_bytes: int = STORE_BYTES):
        self.family, self.always, self.computed = family, always, 0
        self._stored: LRUCache[Hashable, list[Tensor]] = LRUCache(
            store_bytes, lambda states: sum(own.nbytes for own in states)
        )

    def shared(self, names: Sequence[Hashable]) -> set[Hashable]:
        """Which of the names of prompts that are to be answered now stand for prefixes worth computing apart.

        Those that two of the prompts have, and those that are remembered; `None` names nothing.
        """
        return {
            name
            for name, count in Counter(names).items()
            if name is not None and (self.always or count > 1 or name in self._stored)
        }

    def continued(self, prompts: Sequence[Prompt]) -> Continued:
        """A batch of prompts behind their prefixes."""
        import torch
        from transformers import DynamicCache

        states = self._states(prompts)
        before = max(own.prefix for own in prompts)
        rest = max(len(own) - own.prefix for own in prompts)
        first = prompts[0].embeds
        embeds = first.new_zeros(len(prompts), before + rest, first.shape[1])
        mask = torch.zeros(len(prompts), before + rest, dtype=torch.long, device=first.device)
        positions = torch.zeros_like(mask)
        for row, prompt in enumerate(prompts):
            places = torch.arange(len(prompt)) if prompt.places is None else prompt.places
            places, begin, left = places.to(mask.device), before - prompt.prefix, prompt.prefix - len(prompt)
            embeds[row, left:] = prompt.embeds[prompt.prefix :]
            for columns in (slice(begin, before), slice(before + rest + left, None)):
                mask[row, columns] = 1
            positions[row, begin:before], positions[row, left:] = places[: prompt.prefix], places[prompt.prefix :]
        cache = DynamicCache()
        for layer, own in enumerate(zip(*states, strict=True)):
            _, heads, _, width = own[0].shape
            joined = own[0].new_zeros(2, len(prompts), heads, before, width)
            for row, rows in enumerate(own):
                joined[:, row, :, before - rows.shape[2] :] = rows
            cache.update(*joined, layer)
        return Continued(embeds, mask, positions, cache)

    def _states(self, prompts: Sequence[Prompt]) -> list[list[Tensor]]:
        """Keys and values of each prompt's prefix, `(2, heads, n, e)` for every layer, on the layer's own device.

        Those that are not remembered are computed in one batch.
        """
        found = {prompt.prefix_name: self._stored.get(prompt.prefix_name) for prompt in prompts}
        missing = {own.prefix_name: own for own in prompts if found[own.prefix_name] is None}
        if missing:
            for name, states in zip(missing, self._compute([own.head for own in missing.values()]), strict=True):
                found[name] = states
                if self._stored.getsizeof(states) <= self._stored.maxsize:
                    self._stored[name] = states
        return [found[prompt.prefix_name] for prompt in prompts]

    def _compute(self, heads: Sequence[Prompt]) -> list[list[Tensor]]:
        import torch
        from transformers import DynamicCache

        embeds, mask, starts = left_pad(heads)
        cache, decoder = DynamicCache(), find_decoder(self.family.model)
        decoder(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions_of(heads, starts, mask),
            past_key_values=cache,
            use_cache=True,
        )
        self.computed += len(heads)
        return [
            [torch.stack([layer.keys[row, :, start:], layer.values[row, :, start:]]) for layer in cache.layers]
            for row, start in enumerate(starts)
        ]
