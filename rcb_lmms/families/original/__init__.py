"""Checkpoints in the layout of the original `llava` package, loaded as the Hugging Face classes they stand for."""

from rcb_lmms.families.original.conversion import convert, empty_model, load_original
from rcb_lmms.families.original.layout import Original, find_original, open_original

__all__ = ["Original", "convert", "empty_model", "find_original", "load_original", "open_original"]
