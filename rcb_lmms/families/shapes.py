"""Public checkpoints' architectures at full size with random weights: their cost can be measured without a checkpoint.

Tokenizer, template and pixel statistics are the laboratory's, whose checkpoints the package carries: an answer means
nothing, and a question has about as many tokens as with the real tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rcb_lmms.errors import UserError, choose
from rcb_lmms.families.base import Family
from rcb_lmms.families.devices import check_attention
from rcb_lmms.families.loading import chosen_device, chosen_dtype
from rcb_lmms.families.original.layout import TOWERS
from rcb_lmms.families.registry import family_class

CLIP = TOWERS["openai/clip-vit-large-patch14-336"]
# The converted checkpoints end where the projector reads: one block less, and no pooling head.
SIGLIP = TOWERS["google/siglip-so400m-patch14-384"] | {"num_hidden_layers": 26, "vision_use_head": False}
# Height and width in tiles.
NEXT_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
ONEVISION_GRIDS = tuple((height, width) for height in range(1, 7) for width in range(1, 7))


@dataclass(frozen=True)
class Shape:
    """One architecture.

    Attributes:
        family: name of its family.
        text: sizes of the language model.
        vision: sizes of the vision tower.
        prototypes: of the codebook released for it, or for the checkpoint most like it.
        grids: resolutions of its tiles, in tiles.
    """

    family: str
    text: dict[str, Any]
    vision: dict[str, Any]
    prototypes: int
    grids: tuple[tuple[int, int], ...] = ()


def _text(kind: str, d: int, m: int, layers: int, heads: int, kv_heads: int, vocabulary: int, context: int) -> dict:
    return {
        "model_type": kind,
        "hidden_size": d,
        "intermediate_size": m,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "tie_word_embeddings": False,
    }


SHAPES = {
    "llava-1.5-7b": Shape("llava", _text("llama", 4096, 11008, 32, 32, 32, 32064, 4096), CLIP, 454),
    "llava-1.5-13b": Shape("llava", _text("llama", 5120, 13824, 40, 40, 40, 32064, 4096), CLIP, 454),
    "llama3-llava-next-8b": Shape(
        "llava_next", _text("llama", 4096, 14336, 32, 32, 8, 128320, 8192), CLIP, 969, NEXT_GRIDS
    ),
    "llava-onevision-qwen2-7b": Shape(
        "llava_onevision", _text("qwen2", 3584, 18944, 28, 28, 4, 152064, 32768), SIGLIP, 45, ONEVISION_GRIDS
    ),
}


def random_family(
    name: str,
    *,
    layers: int | None = None,
    device: str | None = None,
    dtype: str = "auto",
    attn_implementation: str = "sdpa",
) -> Family:
    """A family at the full size of a public checkpoint, its weights drawn at random where they will lie.

    Args:
        name: one of `SHAPES`.
        layers: of the decoder, if not all.
        device: as for `load_family`, like the next two.
        dtype: of the weights, which are never of another one.
        attn_implementation: of the language model and the tower.

    Raises:
        UserError: no such shape, device, type or attention, or more layers than it has.
    """
    import torch

    shape = SHAPES[choose("shape", name, SHAPES)]
    device = chosen_device(device)
    check_attention(attn_implementation)
    if layers is not None and not 1 <= layers <= shape.text["num_hidden_layers"]:
        raise UserError(
            wanted=f"{name} with {layers} decoder layers",
            found=f"an architecture of {shape.text['num_hidden_layers']}",
            allowed=f"1 to {shape.text['num_hidden_layers']} layers",
            next_step="leave out layers",
        )
    model = _empty(shape, layers, attn_implementation)
    weights_type = chosen_dtype(dtype, device)
    for owner, leaf, parameter in _parameters(model):
        drawn = torch.empty(parameter.shape, dtype=weights_type, device=device)
        if "norm" in f"{type(owner).__name__}".lower():
            drawn.fill_(leaf == "weight")
        else:
            drawn.normal_(std=0.02)
        setattr(owner, leaf, torch.nn.Parameter(drawn, requires_grad=False))
    for part in (model.config, model.config.text_config, model.config.vision_config):
        part.dtype = weights_type
    model = model.eval().to(device)  # what is left are buffers
    own = {} if not shape.grids else {"split": family_class(shape.family).paper_split}
    label = f"random weights in the shape of {name}" + (f", {layers} decoder layers" if layers else "")
    return family_class(shape.family)(model, _processor(shape), pretrained=label, fingerprint=label, **own)


def _empty(shape: Shape, layers: int | None, attn_implementation: str) -> Any:
    """The model without weights."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForImageTextToText

    from rcb_lmms.lab.checkpoint import lab_checkpoint

    base = AutoConfig.from_pretrained(lab_checkpoint(shape.family)).to_dict()
    text = shape.text | {"num_hidden_layers": layers or shape.text["num_hidden_layers"], "pad_token_id": 3}
    base |= {"text_config": text, "vision_config": shape.vision, "tie_word_embeddings": False}
    if shape.grids:
        base["image_grid_pinpoints"] = _pinpoints(shape)
    config = AutoConfig.for_model(base.pop("model_type"), **base)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForImageTextToText.from_config(config, attn_implementation=attn_implementation)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 3
    return model


def _parameters(model: Any) -> list[tuple[Any, str, Any]]:
    return [
        (owner, leaf, parameter)
        for owner in model.modules()
        for leaf, parameter in list(owner.named_parameters(recurse=False))
    ]


def _pinpoints(shape: Shape) -> list[list[int]]:
    side = shape.vision["image_size"]
    return [[height * side, width * side] for height, width in shape.grids]


def _processor(shape: Shape) -> Any:
    """The laboratory's, for images of the shape's size."""
    from transformers import AutoImageProcessor, AutoProcessor

    from rcb_lmms.lab.checkpoint import lab_checkpoint

    folder, side = lab_checkpoint(shape.family), shape.vision["image_size"]
    square = {"height": side, "width": side}
    clip = shape.vision["model_type"] == "clip_vision_model"
    sizes = {"size": {"shortest_edge": side}, "crop_size": square} if clip else {"size": square}
    if shape.grids:
        sizes["image_grid_pinpoints"] = _pinpoints(shape)
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **sizes)
    if hasattr(processor, "video_processor"):
        processor.video_processor.size = square
    return processor
