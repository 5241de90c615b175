"""LLaVA-1.5 as lmms-eval models, one thin class per method."""

from __future__ import annotations

from rcb_lmms.models.base import PrunedModel


class LlavaFull(PrunedModel):
    """The unpruned model through the same code path."""

    family_name, method = "llava", "none"


class LlavaRcb(PrunedModel):
    """Redundancy codebook."""

    family_name, method = "llava", "rcb"


class LlavaPrumerge(PrunedModel):
    """LLaVA-PruMerge."""

    family_name, method = "llava", "prumerge"


class LlavaPrumergePlus(PrunedModel):
    """LLaVA-PruMerge+."""

    family_name, method = "llava", "prumerge_plus"


class LlavaFastv(PrunedModel):
    """FastV."""

    family_name, method = "llava", "fastv"


class LlavaRandom(PrunedModel):
    """Random pruning, the floor."""

    family_name, method = "llava", "random"
