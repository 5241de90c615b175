"""What a vision tower gives beside the tokens: the optional fields of `VisualTokens`.

All come from one pass of the tower with any kind of attention: a block whose attention is wanted gets its own input
again, and its projections give the rows that eager attention would have returned.

A family says in `provides` which of them its tower has; a method that needs another is refused before anything is
loaded. A further field, or a tower of another kind, is added here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Of every tower; of one with a CLS token.
PATCHES = frozenset({"encoder_features", "mean_keys", "received_attention", "object_attention", "question_embeddings"})
WITH_CLS = PATCHES | {
    "keys", "cls_attention", "cls_similarity", "head_attention", "cls_features", "patch_embeddings", "text_embeddings"
}  # fmt: skip
# HiPrune's object layer: the ninth block of CLIP's 24.
OBJECT_BLOCK, OF_BLOCKS = 8, 24


def states_of(tower: Any, pixels: Tensor, layer: int, interpolate: bool = False) -> list[Tensor]:
    """Hidden states of a tower up to the one that the projector reads; the blocks behind it do not run.

    Args:
        tower: the vision model.
        pixels: of the views, `(b, 3, h, w)`.
        layer: index, among all hidden states, of the one that the projector reads.
        interpolate: the tower's position embeddings to the size of the views.

    Returns:
        The input of the first block, then the output of each, `(b, 1 + n, c)` with CLS, else `(b, n, c)`.
    """
    states: list[Tensor] = []
    blocks = tower.encoder.layers[: layer % (len(tower.encoder.layers) + 1)]

    def note(_: Any, given: tuple[Tensor, ...], output: Tensor) -> None:
        states.extend([output] if states else [given[0], output])
        if len(states) > len(blocks):
            raise _Enough

    hooks = [block.register_forward_hook(note) for block in blocks]
    try:
        with contextlib.suppress(_Enough):
            tower(pixels, interpolate_pos_encoding=interpolate)
    finally:
        for hook in hooks:
            hook.remove()
    return states


class _Enough(Exception):
    """Leaves a tower whose further layers nobody reads."""


def optional_fields(
    tower: Any, states: Sequence[Tensor], layer: int, has_cls: bool, needs: set[str]
) -> dict[str, Tensor]:
    """Fields by name for a batch of views.

    Args:
        tower: the vision model.
        states: its hidden states, those of `states_of` or all of them.
        layer: index of the one that the projector reads.
        has_cls: whether the first token is CLS.
        needs: names of the fields.
    """
    import torch

    hidden, first = states[layer], int(has_cls)
    read = layer % len(states) - 1  # the block whose output the projector reads
    fields = _attention_of_blocks(tower.encoder.layers, states, read, has_cls, needs)
    if needs & {"encoder_features", "patch_embeddings"}:  # the latter are made of the former, see `clip`
        fields["encoder_features"] = hidden[:, first:]
    if not has_cls:
        return fields
    if "cls_features" in needs:
        fields["cls_features"] = hidden[:, :1]
    if "cls_similarity" in needs:
        fields["cls_similarity"] = torch.cosine_similarity(hidden[:, 1:].float(), hidden[:, :1].float(), dim=-1)
    if needs & {"keys", "cls_attention"}:
        from rcb_lmms.pruners.prumerge import cls_attention_from

        # The last block is fed its own input again: its projections equal what hooks on it would have seen.
        block = tower.encoder.layers[-1]
        normed = block.layer_norm1(hidden)
        keys = block.self_attn.k_proj(normed)
        queries = block.self_attn.q_proj(normed[:, 0])
        fields["keys"] = keys[:, 1:]
        fields["cls_attention"] = torch.stack(
            [cls_attention_from(query, key) for query, key in zip(queries, keys, strict=True)]
        )
    return fields


def fields_flops(c: int, patches: int, has_cls: bool, needs: Collection[str]) -> int:
    """FLOPs that `optional_fields` takes for one view, beyond the pass of a tower of width `c`."""
    n, flops = patches + has_cls, 0
    projections, square = 4 * n * c * c, 2 * n * n * c
    if not {"mean_keys", "head_attention", "received_attention"}.isdisjoint(needs):
        flops += projections + ("received_attention" in needs) * square + ("head_attention" in needs) * 2 * n * c
    if "object_attention" in needs:
        flops += projections + square
    if not {"keys", "cls_attention"}.isdisjoint(needs):
        flops += 2 * n * c * c + 2 * c * c + 2 * n * c
    return flops


def object_block(read: int, blocks: int, has_cls: bool) -> int:
    """Index of HiPrune's object layer: block 8, as released, where a CLIP tower reads beyond it.

    Elsewhere the block of the same relative depth, which is ours: 9 of SigLIP's 26.
    """
    return OBJECT_BLOCK if has_cls and read > OBJECT_BLOCK else round(blocks * OBJECT_BLOCK / OF_BLOCKS)


def _attention_of_blocks(
    blocks: Any, states: Sequence[Tensor], read: int, has_cls: bool, needs: set[str]
) -> dict[str, Tensor]:
    """Attention and keys of the block that the projector reads, and of the object layer, from their own inputs."""
    fields, first = {}, int(has_cls)
    if needs & {"mean_keys", "head_attention", "received_attention"}:
        queries, keys, scale = _heads(blocks[read], states[read])
        if "mean_keys" in needs:
            fields["mean_keys"] = keys[:, :, first:].mean(1)
        if "received_attention" in needs:
            fields["received_attention"] = _received(queries, keys, scale)[:, first:]
        if has_cls and "head_attention" in needs:
            rows = (queries[:, :, :1] @ keys.mT * scale).softmax(-1)[:, :, 0, 1:]  # (b, h, n)
            fields["head_attention"] = rows.transpose(1, 2)
    if "object_attention" in needs:
        early = object_block(read, len(blocks), has_cls)
        fields["object_attention"] = _received(*_heads(blocks[early], states[early]))[:, first:]
    return fields


def _heads(block: Any, hidden: Tensor) -> tuple[Tensor, Tensor, float]:
    """A block's queries and keys for its input, `(b, heads, positions, head width)` float32, and their scale."""
    attention, normed = block.self_attn, block.layer_norm1(hidden)
    queries, keys = (
        project(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2).float()
        for project in (attention.q_proj, attention.k_proj)
    )
    return queries, keys, attention.scale


def _received(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Attention that every position receives, mean over heads and queries, `(b, positions)`.

    One head at a time: all of them at once are 21 MB a view for CLIP.
    """
    total = 0
    for head in range(queries.shape[1]):
        total = total + (queries[:, head] @ keys[:, head].mT * scale).softmax(-1).mean(1)
    return total / queries.shape[1]
