"""Keys and values of what questions about one image have in common, computed once.

The image stands before the question, and a method before the language model chooses its tokens without the question:
all that precedes the question's words is the same for all questions about an image. Under a causal mask its keys and
values are too.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cachetools import LRUCache

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
        self._stored: LRUCache[Hashable, Tensor] = LRUCache(store_bytes, lambda states: states.nbytes)

    def serves(self, prompts: Sequence[Prompt], options: Mapping[str, Any]) -> bool:
        """Whether prompts that all have images share prefixes with each other, or with those before them.

        Beams are left out: transformers does not spread a given cache over them.
        """
        names = {prompt.prefix_name for prompt in prompts}
        if None in names or options.get("num_beams", 1) > 1:
            return False
        return self.always or len(names) < len(prompts) or any(name in self._stored for name in names)

    def continued(self, prompts: Sequence[Prompt]) -> Continued:
        """A batch of prompts behind their prefixes."""
        import torch
        from transformers import DynamicCache

        states = self._states(prompts)  # each (layers, 2, heads, n, e)
        before = max(own.prefix for own in prompts)
        rest = max(len(own) - own.prefix for own in prompts)
        first = prompts[0].embeds
        embeds = first.new_zeros(len(prompts), before + rest, first.shape[1])
        mask = torch.zeros(len(prompts), before + rest, dtype=torch.long, device=first.device)
        positions = torch.zeros_like(mask)
        joined = states[0].new_zeros(*states[0].shape[:2], len(prompts), states[0].shape[2], before, states[0].shape[4])
        for row, (prompt, own) in enumerate(zip(prompts, states, strict=True)):
            places = torch.arange(len(prompt)) if prompt.places is None else prompt.places
            places, begin, left = places.to(mask.device), before - prompt.prefix, prompt.prefix - len(prompt)
            embeds[row, left:] = prompt.embeds[prompt.prefix :]
            for columns in (slice(begin, before), slice(before + rest + left, None)):
                mask[row, columns] = 1
            positions[row, begin:before], positions[row, left:] = places[: prompt.prefix], places[prompt.prefix :]
            joined[:, :, row, :, begin:] = own
        cache = DynamicCache()
        for index, (keys, values) in enumerate(joined):
            cache.update(keys, values, index)
        return Continued(embeds, mask, positions, cache)

    def _states(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        """Keys and values of each prompt's prefix; those that are not remembered are computed in one batch."""
        found = {prompt.prefix_name: self._stored.get(prompt.prefix_name) for prompt in prompts}
        missing = {own.prefix_name: own for own in prompts if found[own.prefix_name] is None}
        if missing:
            for name, states in zip(missing, self._compute(list(missing.values())), strict=True):
                found[name] = states
                if states.nbytes <= self._stored.maxsize:
                    self._stored[name] = states
        return [found[prompt.prefix_name] for prompt in prompts]

    def _compute(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        import torch
        from transformers import DynamicCache

        longest = max(prompt.prefix for prompt in prompts)
        first = prompts[0].embeds
        embeds = first.new_zeros(len(prompts), longest, first.shape[1])
        mask = torch.zeros(len(prompts), longest, dtype=torch.long, device=first.device)
        positions = torch.zeros_like(mask)
        for row, prompt in enumerate(prompts):
            places = torch.arange(prompt.prefix) if prompt.places is None else prompt.places[: prompt.prefix]
            embeds[row, longest - prompt.prefix :] = prompt.embeds[: prompt.prefix]
            mask[row, longest - prompt.prefix :] = 1
            positions[row, longest - prompt.prefix :] = places.to(mask.device)
        cache, decoder = DynamicCache(), find_decoder(self.family.model)
        decoder(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        self.computed += len(prompts)
        every = torch.stack([torch.stack([layer.keys, layer.values]) for layer in cache.layers])
        return [every[:, :, row, :, longest - prompt.prefix :].clone() for row, prompt in enumerate(prompts)]
