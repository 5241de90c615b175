"""LLaVA-NeXT on `LlavaNextForConditionalGeneration`: a stretched base view and up to four tiles per image."""

from __future__ import annotations

from typing import ClassVar

from rcb_lmms.families.tiles import TiledFamily
from rcb_lmms.families.towers import WITH_CLS


class LlavaNext(TiledFamily):
    """LLaVA-NeXT; packing is described in `tiles`.

    Views of an image: the base view, which is the whole image stretched to a square, then its tiles row by row, the
    black padding included. Preprocessing presets: `rcb` and `native` are the same pixels, since the original code
    and the Hugging Face processor agree.
    """

    name = "llava_next"
    model_type = "llava_next"
    checkpoint = "llava-hf/llama3-llava-next-8b-hf"
    codebook = "llava-next-llama3-8b"
    preprocessing = ("rcb", "native")
    geometry: ClassVar[dict[str, str]] = dict.fromkeys(preprocessing, "stretched")
    paper_template = "llama_3"
    provides = WITH_CLS
    single_repeats = 24
    pad_token_id = 0  # "!" in Llama-3's vocabulary, and still the row that the released experiments used
