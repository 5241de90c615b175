"""What the families on a CLIP tower share: the tower's layer, its CLS-based tensors, the projector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rcb_lmms.families.base import Family

if TYPE_CHECKING:
    from torch import Tensor


class ClipFamily(Family):
    """A family whose tower has a CLS token; square views of `grid` patches."""

    provides = frozenset({"encoder_features", "keys", "cls_attention", "cls_similarity"})

    def __init__(self, model: Any, processor: Any, **options: Any):
        super().__init__(model, processor, **options)
        vision = model.config.vision_config
        self.patch_px = vision.patch_size
        self.grid = (vision.image_size // self.patch_px,) * 2
        # Towers with a CLS token have one more position than patches; SigLIP has none.
        self.has_cls = model.config.vision_feature_select_strategy == "default"

    def project(self, encoder_features: Tensor) -> Tensor:
        """See `Family.project`."""
        import torch

        with torch.inference_mode():
            return self.model.model.multi_modal_projector(encoder_features)

    def tower_fields(self, hidden: Tensor, needs: set[str]) -> dict[str, Tensor]:
        """Optional fields of `VisualTokens`, by name, for a batch of views.

        Args:
            hidden: the layer that the projector reads, `(b, 1 + n, c)` with CLS, else `(b, n, c)`.
            needs: names of the fields.
        """
        fields = self._cls_fields(hidden, needs) if self.has_cls else {}
        if "encoder_features" in needs:
            fields["encoder_features"] = hidden[:, 1:] if self.has_cls else hidden
        return fields

    def _cls_fields(self, hidden: Tensor, needs: set[str]) -> dict[str, Tensor]:
        import torch

        from rcb_lmms.pruners.prumerge import cls_attention_from

        fields = {}
        if "cls_similarity" in needs:
            fields["cls_similarity"] = torch.cosine_similarity(hidden[:, 1:].float(), hidden[:, :1].float(), dim=-1)
        if needs & {"keys", "cls_attention"}:
            # The last block is fed its own input again: its projections equal what hooks on it would have seen.
            block = self.model.model.vision_tower.encoder.layers[-1]
            normed = block.layer_norm1(hidden)
            keys = block.self_attn.k_proj(normed)
            queries = block.self_attn.q_proj(normed[:, 0])
            fields["keys"] = keys[:, 1:]
            fields["cls_attention"] = torch.stack(
                [cls_attention_from(query, key) for query, key in zip(queries, keys, strict=True)]
            )
        return fields
