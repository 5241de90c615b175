"""Model families: from images and questions to the embeddings a language model reads."""

from __future__ import annotations

from rcb_lmms.families.base import Family
from rcb_lmms.families.loading import family_of, load_family
from rcb_lmms.families.packed import PackedImage, Prompt
from rcb_lmms.families.registry import FAMILIES, default_codebook, default_split, default_template, family_class

__all__ = [
    "FAMILIES",
    "Family",
    "PackedImage",
    "Prompt",
    "default_codebook",
    "default_split",
    "default_template",
    "family_class",
    "family_of",
    "load_family",
]
