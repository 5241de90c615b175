"""What a method reads of a question: CLIP's text and patch embeddings, or the language model's input embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rcb_lmms.cost import encoder_flops
from rcb_lmms.errors import UserError
from rcb_lmms.families.towers import fields_flops
from rcb_lmms.pruners.base import Pruner, VisualTokens

if TYPE_CHECKING:
    from torch import Tensor

    from rcb_lmms.families.base import Family


def asked(family: Family, views: Sequence[VisualTokens], pruner: Pruner, question: str | None) -> list[VisualTokens]:
    """Views with the fields of a question that the method reads; the views themselves if it reads none.

    Raises:
        UserError: a CLIP model that is not there or does not fit the tower.
    """
    import torch

    fields: dict[str, Tensor] = {}
    if not pruner.sees_question or not question:
        return list(views)
    text = pruner.wording(question)
    with torch.inference_mode():
        if "question_embeddings" in pruner.needs:
            ids = family.tokenizer(text, add_special_tokens=False).input_ids
            fields["question_embeddings"] = family.model.get_input_embeddings()(torch.tensor(ids, device=family.device))
        space = space_of(family, pruner)
        if space is None or views[0].encoder_features is None:
            return [replace(view, **fields) for view in views] if fields else list(views)
        fields["text_embeddings"] = space.text(text)
        return [replace(view, **fields, patch_embeddings=space.patches(view.encoder_features)) for view in views]


def space_of(family: Family, pruner: Pruner) -> ClipSpace | None:
    """The CLIP model that a method reads texts with, loaded once for a family; `None` if it reads none.

    Raises:
        UserError: there is no such model.
    """
    if not pruner.needs & {"text_embeddings", "patch_embeddings"}:
        return None
    if pruner.clip not in family.clip_spaces:
        family.clip_spaces[pruner.clip] = ClipSpace(pruner.clip, family.device)
    return family.clip_spaces[pruner.clip]


def reading_flops(family: Family, views: Sequence[VisualTokens], pruner: Pruner) -> int:
    """FLOPs of what a method reads of views: what the tower computes for it again, and CLIP's text and projection."""
    patches, width = math.prod(family.grid), family.model.config.vision_config.hidden_size
    flops = len(views) * fields_flops(width, patches, family.has_cls, pruner.needs) if pruner.needs else 0
    space = space_of(family, pruner)
    return flops if space is None else flops + space.flops(sum(map(len, views)), len(views[0].text_embeddings))


class ClipSpace:
    """The space of images and texts of a CLIP model whose vision tower is the family's own.

    Args:
        source: repository or folder of the whole CLIP model.
        device: where it computes, in float32.

    Raises:
        UserError: there is no such model.
    """

    def __init__(self, source: str, device: Any):
        from transformers import AutoTokenizer, CLIPModel

        try:
            model = CLIPModel.from_pretrained(source).to(device).eval()
            self._tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise UserError(
                wanted=f"the text tower of the CLIP model {source}",
                found=" ".join(str(error).split())[:200],
                allowed="the repository or the folder of a whole CLIP model, its tokenizer included",
                next_step=f"hf download {source}, clip=FOLDER, or relevance=embedding, which needs no CLIP text",
            ) from error
        self.source, self._texts, self._project_text = source, model.text_model, model.text_projection
        self._norm, self._project = model.vision_model.post_layernorm, model.visual_projection

    def patches(self, features: Tensor) -> Tensor:
        """`(n, e)` embeddings of the tower's patches `(n, c)`, taken where the projector reads them.

        Raises:
            UserError: patches of another width.
        """
        width = self._norm.normalized_shape[0]
        if features.shape[-1] != width:
            raise UserError(
                wanted=f"patches of width {features.shape[-1]} in the space of {self.source}",
                found=f"a vision tower of width {width}",
                allowed="the CLIP model whose vision tower the model has",
                next_step="clip=..., or relevance=embedding",
            )
        return self._project(self._norm(features.to(self._norm.weight)))

    def flops(self, patches: int, segments: int) -> int:
        """FLOPs of embedding patches, and a text of so many segments."""
        config, (width, joint) = self._texts.config, self._project.weight.T.shape
        words = encoder_flops(config, config.max_position_embeddings) + 2 * config.hidden_size * joint
        return 2 * patches * width * joint + segments * words

    def text(self, text: str) -> Tensor:
        """`(m, e)` embeddings of a text, one for every 77 tokens.

        As CDPruner: a longer text is padded with 0 to a multiple of 77 and cut, positions begin anew in every segment,
        and each segment is read at its largest id, which is the end of the text where it has one. The first of
        several segments is therefore read at its begin, a vector that no text changes.
        """
        import torch

        ids, longest = self._tokenizer(text).input_ids, self._texts.config.max_position_embeddings
        segments = torch.tensor(ids + [0] * (-len(ids) % longest)).view(-1, longest)
        seen = (torch.arange(segments.numel()) < len(ids)).view(-1, longest)
        device = self._norm.weight.device
        states = self._texts(input_ids=segments.to(device), attention_mask=seen.long().to(device)).last_hidden_state
        return self._project_text(states[torch.arange(len(segments)), segments.argmax(1)])
