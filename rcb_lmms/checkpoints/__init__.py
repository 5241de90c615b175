"""Checkpoints in the layout of the original `llava` package, loaded as the Hugging Face classes they stand for."""

from rcb_lmms.checkpoints.conversion import convert, load_original
from rcb_lmms.checkpoints.layout import Original, find_original, open_original

__all__ = ["Original", "convert", "find_original", "load_original", "open_original"]
