"""Tokenizer, image processor and chat template of a checkpoint in the original layout."""

from __future__ import annotations

from typing import Any

from rcb_lmms.families.original.layout import ARCHITECTURES, Original, pinpoints
from rcb_lmms.families.templates import CHATML, LLAMA_3, VICUNA

PLACEHOLDERS = {"llava": ("image",), "llava_next": ("image",), "llava_onevision": ("image", "video")}

# The token that ends an assistant's turn tells which prompt a language model was tuned on: vicuna_v1, llava_llama_3 or
# qwen_1_5 of the original code.
PROMPTS = {"<|eot_id|>": LLAMA_3, "<|im_end|>": CHATML, "</s>": VICUNA}


def load_tokenizer(original: Original) -> Any:
    """The tokenizer, with a placeholder token for each medium.

    A placeholder is a token of its own in the vocabulary that is there, or the first id behind it.

    Raises:
        UserError: there is no tokenizer, or it cannot be read.
    """
    from tokenizers import AddedToken
    from transformers import AutoConfig, AutoTokenizer

    source = original.source
    try:
        named_llama = "Llama" in str(source.json("tokenizer_config.json").get("tokenizer_class"))
        if source.file("tokenizer.model") and (named_llama or not source.file("tokenizer.json")):
            tokenizer = _from_sentencepiece(original)
        else:
            # A configuration, because the checkpoint's own has a type that Hugging Face takes for another's, or lacks.
            config = AutoConfig.for_model(ARCHITECTURES[original.architecture])
            tokenizer = AutoTokenizer.from_pretrained(source.path, revision=source.revision, config=config)
    except (OSError, RuntimeError, ValueError) as error:
        raise original.refused(
            "its tokenizer",
            " ".join(str(error).split())[:200],
            "tokenizer.json, or tokenizer.model of SentencePiece",
            next_step="complete the download",
        ) from error
    marks = [f"<{medium}>" for medium in PLACEHOLDERS[original.family]]
    new = [AddedToken(mark, special=True, normalized=False) for mark in marks if mark not in tokenizer.get_vocab()]
    tokenizer.add_tokens(new, special_tokens=True)
    tokenizer.padding_side = "left"
    return tokenizer


def placeholder_ids(original: Original, tokenizer: Any) -> dict[str, int]:
    """Token id of each medium's placeholder."""
    return {medium: tokenizer.convert_tokens_to_ids(f"<{medium}>") for medium in PLACEHOLDERS[original.family]}


def end_of_turn(tokenizer: Any) -> str:
    """The token with which answers end."""
    return next(mark for mark in PROMPTS if mark in tokenizer.get_vocab() or mark == "</s>")


def make_processor(original: Original, tokenizer: Any) -> Any:
    """The Hugging Face processor, on Pillow's resizing, which equals the original's."""
    import transformers

    side = original.tower.image_size
    square = {"height": side, "width": side}
    patches = (side // original.tower.patch_size) ** 2
    common = {"tokenizer": tokenizer, "chat_template": PROMPTS[end_of_turn(tokenizer)]}
    if original.family == "llava_onevision":
        # The original's own constants: whatever the tower's folder says, and not Hugging Face's, which are CLIP's.
        pixels = {"size": square, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        return transformers.LlavaOnevisionProcessor(
            image_processor=transformers.LlavaOnevisionImageProcessorPil(
                image_grid_pinpoints=pinpoints(original), **pixels
            ),
            video_processor=transformers.LlavaOnevisionVideoProcessor(**pixels),
            num_image_tokens=patches,
            vision_feature_select_strategy="full",
            vision_aspect_ratio=original.config.get("image_aspect_ratio", "anyres_max_9"),
            **common,
        )
    own = original.tower_source.json("preprocessor_config.json")
    pixels = {"size": {"shortest_edge": side}, "crop_size": square}
    pixels |= {name: own[name] for name in ("image_mean", "image_std") if name in own}
    common |= {
        "patch_size": original.tower.patch_size,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    if original.family == "llava_next":
        images = transformers.LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints(original), **pixels)
        return transformers.LlavaNextProcessor(image_processor=images, **common)
    return transformers.LlavaProcessor(image_processor=transformers.CLIPImageProcessorPil(**pixels), **common)


def _from_sentencepiece(original: Original) -> Any:
    """A Llama tokenizer from `tokenizer.model` alone.

    The original splits prompts at images and encodes each part on its own, so that the text behind an image begins
    with a space of its own; Hugging Face's conversion gives only the first part one. Read through SentencePiece
    itself, because Hugging Face's reader fails where its protobuf is older than SentencePiece's.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer, decoders, models, normalizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    pieces = SentencePieceProcessor(model_file=str(original.source.file("tokenizer.model")))
    ranks = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    tokenizer = Tokenizer(
        models.BPE(ranks, _merges(ranks), unk_token=pieces.id_to_piece(0), fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", pieces.bos_id())])
    limit = original.source.json("tokenizer_config.json").get("model_max_length", 2048)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        model_max_length=limit,
        clean_up_tokenization_spaces=False,
    )


def _merges(ranks: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, earlier pieces first: SentencePiece lists them by score."""
    merges = []
    for piece in ranks:
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges
