"""LLaVA-1.5 on `LlavaForConditionalGeneration`: one square view per image, no newline tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from rcb_lmms.families.base import Family
from rcb_lmms.families.images import Visual, central_square_region, pad_to_square
from rcb_lmms.pruners.base import VisualTokens

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

# The system prompt of the original code base, which the public checkpoint's own template leaves out.
VICUNA = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
    "{% for message in messages %}{{ ' USER: ' if message.role == 'user' else ' ASSISTANT: ' }}"
    "{% for item in message.content %}{{ '<image>\n' if item.type == 'image' else item.text }}{% endfor %}"
    "{% if message.role == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)


class Llava(Family):
    """LLaVA-1.5.

    Preprocessing presets: `rcb` resizes the short side and crops the centre, as the paper's evaluation did and the
    public processor does; `pad` pads to a square of the mean colour first, as LLaVA's own evaluation.
    """

    name = "llava"
    model_type = "llava"
    checkpoint = "llava-hf/llava-1.5-7b-hf"
    codebook = "llava-1.5-7b"
    preprocessing = ("rcb", "pad")
    templates: ClassVar[dict[str, str | None]] = {"checkpoint": None, "vicuna": VICUNA}
    provides = frozenset({"encoder_features", "keys", "cls_attention", "cls_similarity"})

    def __init__(self, model: Any, processor: Any, **options: Any):
        super().__init__(model, processor, **options)
        vision = model.config.vision_config
        self.grid = (vision.image_size // vision.patch_size,) * 2
        # Towers with a CLS token have one more position than patches; SigLIP has none.
        self.has_cls = model.config.vision_feature_select_strategy == "default"

    def _encode(self, visuals: list[Visual], needs: set[str]) -> list[list[VisualTokens]]:
        import torch

        pixels = self.processor.image_processor(
            [self._prepare(visual.image) for visual in visuals], return_tensors="pt"
        )
        with torch.inference_mode():
            output = self.model.get_image_features(
                pixels["pixel_values"].to(self.device, self.dtype), output_hidden_states=True, return_dict=True
            )
            hidden = output.hidden_states[self.model.config.vision_feature_layer]  # (b, 1 + n, c) with CLS
            extras = self._extras(hidden, needs) if self.has_cls else {}
            if "encoder_features" in needs:
                extras["encoder_features"] = hidden[:, 1:] if self.has_cls else hidden
        return [
            [VisualTokens(features, self.grid, key=visual.key, **{name: rows[i] for name, rows in extras.items()})]
            for i, (visual, features) in enumerate(zip(visuals, output.pooler_output, strict=True))
        ]

    def _extras(self, hidden: Tensor, needs: set[str]) -> dict[str, Tensor]:
        """What CLS-based methods read, from the layer the projector reads, `hidden (b, 1 + n, c)`."""
        import torch

        from rcb_lmms.pruners.prumerge import cls_attention_from

        extras = {}
        if "cls_similarity" in needs:
            extras["cls_similarity"] = torch.cosine_similarity(hidden[:, 1:].float(), hidden[:, :1].float(), dim=-1)
        if needs & {"keys", "cls_attention"}:
            # The last block is fed its own input again: its projections equal what hooks on it would have seen.
            block = self.model.model.vision_tower.encoder.layers[-1]
            normed = block.layer_norm1(hidden)
            keys = block.self_attn.k_proj(normed)
            queries = block.self_attn.q_proj(normed[:, 0])
            extras["keys"] = keys[:, 1:]
            extras["cls_attention"] = torch.stack(
                [cls_attention_from(query, key) for query, key in zip(queries, keys, strict=True)]
            )
        return extras

    def project(self, encoder_features: Tensor) -> Tensor:
        """See `Family.project`."""
        import torch

        with torch.inference_mode():
            return self.model.model.multi_modal_projector(encoder_features)

    def _prepare(self, image: Image) -> Image:
        if self.preprocess == "pad":
            mean = self.processor.image_processor.image_mean
            return pad_to_square(image, tuple(int(255 * channel) for channel in mean))
        return central_square_region(image)
