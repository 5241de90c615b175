"""Attention of one row, and masks, computed as the decoder's own layers do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rcb_lmms.engine.layer_inputs import check_attention, find_decoder, takes_padding


def last_token_attention(model: nn.Module, embeds: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """Attention of a prompt's last position, which decodes the answer's first token, in some decoder layers.

    Source: paper Eq. 3 and 4, mean over query heads as in 7.4. The softmax is the layer's own, over the whole prompt;
    Eq. 4 writes the keys of the visual tokens alone, which scales each head's scores by a number of its own.

    Args:
        model: any Hugging Face model with a Llama- or Qwen2-like decoder.
        embeds: `(s, d)` one prompt in embedding space.
        layers: counted from 1.

    Returns:
        layer -> `(s,)` float32 on the CPU, summing to 1.

    Raises:
        UserError: a decoder of another kind.
    """
    decoder, found = find_decoder(model), {}

    def keep(layer: int) -> Any:
        def hook(attention: nn.Module, args: tuple, given: dict[str, Any]) -> None:
            hidden = given["hidden_states"] if "hidden_states" in given else args[0]
            valid = torch.ones(hidden.shape[:2], dtype=torch.bool)
            found[layer] = last_row_attention(attention, hidden, given["position_embeddings"], valid)[0].cpu()

        return hook

    attentions = {layer: check_attention(decoder.layers[layer - 1]) for layer in layers}
    handles = [own.register_forward_pre_hook(keep(layer), with_kwargs=True) for layer, own in attentions.items()]
    try:
        with torch.inference_mode():
            model(inputs_embeds=embeds[None], use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return found


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
    queries = heads_of(attention, "q", hidden[:, -1:])  # (b, h, 1, e)
    keys = heads_of(attention, "k", hidden)  # (b, g, n, e)
    cosine, sine = (part[:, None] for part in position_embeddings)
    queries = rotate(queries, cosine[:, :, -1:], sine[:, :, -1:]).float()
    keys = rotate(keys, cosine, sine).float()
    queries = queries.reshape(len(keys), keys.shape[1], -1, keys.shape[3])  # query heads grouped by their key head
    logits = queries @ keys.transpose(2, 3) * attention.scaling
    logits = logits.masked_fill(~valid.to(logits.device)[:, None, None], -torch.inf)
    return logits.softmax(dim=-1).mean(dim=(1, 2))


def heads_of(attention: nn.Module, kind: str, hidden: Tensor) -> Tensor:
    """Queries (`q`) or keys (`k`) of a Llama-like attention module, `(b, heads, n, e)`, before they are rotated."""
    states = getattr(attention, f"{kind}_proj")(hidden)
    states = states.view(*hidden.shape[:2], -1, attention.head_dim)
    norm = getattr(attention, f"{kind}_norm", None)
    return (states if norm is None else norm(states)).transpose(1, 2)


def rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding `(..., n, e)` of positions whose cosine and sine are given."""
    cosine, sine = cosine.to(states.device), sine.to(states.device)
    first, second = states.chunk(2, dim=-1)
    return states * cosine + torch.cat([-second, first], dim=-1) * sine


def gather(states: Tensor, index: Tensor) -> Tensor:
    """Positions `index (b, r)` of `states (b or 1, n, ...)`."""
    index = index.to(states.device)
    rows = torch.arange(len(index), device=index.device)[:, None]
    return states.expand(len(index), *states.shape[1:])[rows, index]


def causal_mask(keys: Tensor, valid: Tensor, queries: Tensor, hidden: Tensor, implementation: str) -> Tensor | None:
    """The mask in the form the attention wants: causal by original position, padding unseen.

    `(b, k)` of keys for flash attention, whose queries are the last of the keys, and which never computes padding; for
    the others `(b, 1, q, k)`. `None` where the kernels need none.
    """
    if takes_padding(implementation):
        return None if bool(valid.all()) else valid.to(hidden.device)
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
