"""What a vision tower gives beside the tokens: the optional fields of `VisualTokens`.

A family says in `provides` which of them its tower has; a method that needs another is refused before anything is
loaded. A further field, or a tower of another kind, is added here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Of every tower, and of one with a CLS token.
PATCHES = frozenset({"encoder_features"})
WITH_CLS = PATCHES | {"keys", "cls_attention", "cls_similarity"}


def optional_fields(tower: Any, hidden: Tensor, has_cls: bool, needs: set[str]) -> dict[str, Tensor]:
    """Fields by name for a batch of views.

    Args:
        tower: the vision model, whose last block the projector does not read.
        hidden: the layer that the projector reads, `(b, 1 + n, c)` with CLS, else `(b, n, c)`.
        has_cls: whether the first token is CLS.
        needs: names of the fields.
    """
    import torch

    fields = {}
    if "encoder_features" in needs:
        fields["encoder_features"] = hidden[:, 1:] if has_cls else hidden
    if not has_cls:
        return fields
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
