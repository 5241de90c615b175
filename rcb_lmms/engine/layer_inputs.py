"""What pruning between layers accepts: decoders, candidate spans, counts, masks and caches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rcb_lmms.errors import UserError

Span = tuple[int, int]


def candidates(spans: Any, valid: Tensor) -> list[Tensor]:
    """Every row's candidate positions, ascending int64.

    Args:
        spans: one `(start, stop)` for all rows, one per row, or a list of several per row.
        valid: `(b, n)` False for padding.

    Raises:
        UserError: another number of rows, or positions outside the prompt.
    """
    batch, length = valid.shape
    if _is_span(spans):
        spans = [spans] * batch
    if len(spans) != batch:
        raise UserError(
            wanted="candidates for every row of the batch",
            found=f"spans for {len(spans)} rows, a batch of {batch}",
            allowed=f"one (start, stop), or {batch} entries",
            next_step="give one entry per row; an empty list for a row without candidates",
        )
    rows = []
    for row, entry in enumerate(spans):
        inside = torch.zeros(length, dtype=torch.bool)
        for start, stop in [entry] if _is_span(entry) else entry:
            if not 0 <= start <= stop <= length or not valid[row, start:stop].all():
                padding = int((~valid[row]).sum())
                raise UserError(
                    wanted=f"candidates {start} to {stop} in row {row}",
                    found=f"a prompt of {length} positions, of which {padding} are padding",
                    allowed=f"positions {padding} to {length}",
                    next_step="count spans in the padded sequence",
                )
            inside[start:stop] = True
        rows.append(inside.nonzero().squeeze(1))
    return rows


def _is_span(entry: Any) -> bool:
    return len(entry) == 2 and all(isinstance(end, int) for end in entry)


def counts(keep: int | Sequence[int], candidates: list[Tensor]) -> list[int]:
    """How many candidates stay in every row.

    Raises:
        UserError: more than there are, or another number of rows.
    """
    wanted = [keep] * len(candidates) if isinstance(keep, int) else list(keep)
    sizes = [len(where) for where in candidates]
    if len(wanted) != len(sizes) or any(not 0 <= count <= size for count, size in zip(wanted, sizes, strict=True)):
        raise UserError(
            wanted=f"{keep} retained tokens per row",
            found=f"rows of {', '.join(map(str, sizes))} candidates",
            allowed="for every row, 0 up to its candidates",
            next_step="lower the budget, or give one number per row",
        )
    return wanted


def find_decoder(model: nn.Module) -> nn.Module:
    """The module that holds the decoder's `layers`, however deep in `model`.

    Raises:
        UserError: there is none.
    """
    decoder = model
    while not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        inner = decoder.get_decoder() if hasattr(decoder, "get_decoder") else decoder
        if inner is decoder:
            raise UserError(
                wanted="a decoder whose layers can be pruned",
                found=type(model).__name__,
                allowed="Llama- or Qwen2-like decoders, and models that have one behind get_decoder()",
                next_step="prune before the language model instead (rcb, prumerge, random)",
            )
        decoder = inner
    return decoder


def check_schedule(decoder: nn.Module, steps: Sequence[int], mode: str, positions: str) -> None:
    """Refuse layers, modes and kinds of attention that pruning does not know.

    Raises:
        UserError: naming the known ones.
    """
    if not steps or any(later <= earlier for earlier, later in itertools.pairwise(steps)):
        raise UserError(
            wanted="a schedule of pruning",
            found=f"steps behind layers {', '.join(map(str, steps)) or 'of which there are none'}",
            allowed="one step or more, by rising layer",
            next_step="steps=[(2, 144)] prunes once, behind two layers",
        )
    if positions not in ("original", "contiguous") or (positions == "contiguous" and mode != "drop"):
        raise UserError(
            wanted="rotary positions of what stays",
            found=f"{positions} with mode={mode}",
            allowed="original, or contiguous with mode=drop",
            next_step="positions=original",
        )
    for layer in steps:
        check_decoder(decoder, layer, mode)


def check_decoder(decoder: nn.Module, layer: int, mode: str) -> None:
    """Refuse layers, modes and kinds of attention that pruning does not know.

    Raises:
        UserError: naming the known ones.
    """
    layers = decoder.layers
    if not 1 <= layer < len(layers):
        raise UserError(
            wanted=f"pruning behind layer {layer}",
            found=f"a decoder of {len(layers)} layers",
            allowed=f"1 to {len(layers) - 1} full layers, so that one gives the scores and one is spared",
            next_step="layer=2 is FastV's choice",
        )
    if mode not in ("drop", "mask"):
        raise UserError(wanted="a way of pruning", found=mode, allowed="drop, mask", next_step="mode=drop")
    check_attention(layers[layer - 1])
    implementation = decoder.config._attn_implementation
    kinds = set(getattr(decoder.config, "layer_types", None) or ["full_attention"])
    known = implementation in ("sdpa", "eager") or takes_padding(implementation)
    if not known or kinds != {"full_attention"}:
        raise UserError(
            wanted="masks that can be rebuilt for the remaining tokens",
            found=f"{implementation} attention of kind {', '.join(sorted(kinds))}",
            allowed="sdpa, eager or flash attention, in full in every layer",
            next_step="load the model with attn_implementation=sdpa",
        )


def takes_padding(implementation: str) -> bool:
    """Whether a kind of attention is told what is padding, `(b, k)`, and is causal by itself, as flash attention is."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask

    return ALL_MASK_ATTENTION_FUNCTIONS.get(implementation) is flash_attention_mask


def check_attention(layer: nn.Module) -> nn.Module:
    """A decoder layer's attention module, if its scores can be computed from its projections.

    Raises:
        UserError: it has none.
    """
    attention = getattr(layer, "self_attn", None)
    if not all(hasattr(attention, part) for part in ("q_proj", "k_proj", "head_dim", "scaling")):
        raise UserError(
            wanted="attention with separate query and key projections",
            found=type(attention).__name__,
            allowed="Llama- or Qwen2-like decoders",
            next_step="prune before the language model instead (rcb, prumerge, random)",
        )
    return attention


def check_inputs(mask: Any, cache: Any) -> None:
    """Refuse masks and caches whose later layers cannot be shortened.

    Raises:
        UserError: a prepared mask or a static cache.
    """
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        found = f"{mask.ndim} dimensions" if isinstance(mask, Tensor) else type(mask).__name__
        raise UserError(
            wanted="an attention mask that says which positions are padding",
            found=f"a prepared mask ({found})",
            allowed="a mask (batch, positions), or none, with a dynamic cache",
            next_step="pass the tokenizer's attention_mask, and no static cache",
        )
    if cache is not None and cache.is_compileable:
        raise UserError(
            wanted="a cache whose layers may differ in length",
            found=type(cache).__name__,
            allowed="DynamicCache, or none",
            next_step="leave cache_implementation out",
        )


def check_left_padding(valid: Tensor) -> None:
    """Refuse prompts `(b, n)` whose last position is padding: its attention would give the scores.

    Raises:
        UserError: asking for left padding.
    """
    if not valid[:, -1].all():
        raise UserError(
            wanted="the last prompt token at the end of every row",
            found="rows that end in padding",
            allowed="left padding",
            next_step="tokenizer.padding_side = 'left'",
        )
