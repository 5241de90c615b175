"""Tiny random checkpoints in the layout of the original `llava` package.

Runs in the environment of the original code too (see record_llava15.py), so it imports nothing of this project and
draws weights with numpy, by name: they are the same everywhere.
"""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent

WIDTH, TOWER_WIDTH, PATCH_PX = 32, 16, 7
SIDE_PX = {"llava": 28, "llava_next": 28, "llava_onevision": 35}
TOWER_LAYERS = 3
LAYERS, HEADS, KEY_HEADS, INNER = 2, 4, 2, 48
VOCABULARY = {"llava": 340, "llava_next": 264, "llava_onevision": 280}

# (width, height), as the original lists them; not symmetric, so that a swap shows.
PINPOINTS = {
    "llava_next": [[28, 56], [56, 28], [56, 56], [84, 28]],
    "llava_onevision": [[35, 35], [35, 70], [70, 70], [105, 35]],
}

TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "use_cache": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
MULTIMODAL = {
    "mm_hidden_size": TOWER_WIDTH,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "use_mm_proj": True,
}
OWN = {
    "llava": {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "image_aspect_ratio": "pad",
    },
    "llava_next": {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "bos_token_id": 256,
        "eos_token_id": 257,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
    },
    # As published: Hugging Face's type, and sections that describe neither of its two models.
    "llava_onevision": {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava",
        "bos_token_id": 256,
        "eos_token_id": 258,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": 2048,
        "use_sliding_window": False,
        "max_window_layers": 2,
        "image_aspect_ratio": "anyres_max_9",
        "mm_patch_merge_type": "spatial_unpad",
        "image_token_index": 9999,
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336},
        "vision_feature_layer": -2,
    },
}
SPECIAL = {
    "llava_next": ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "llava_onevision": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
}


def tower_config(family: str) -> dict:
    kind = "siglip" if family == "llava_onevision" else "clip"
    vision = {
        "model_type": f"{kind}_vision_model",
        "hidden_size": TOWER_WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": TOWER_LAYERS,
        "num_attention_heads": 2,
        "image_size": SIDE_PX[family],
        "patch_size": PATCH_PX,
        "hidden_act": "gelu_pytorch_tanh" if kind == "siglip" else "quick_gelu",
    }
    return {"model_type": kind, "vision_config": vision} | ({"projection_dim": 16} if kind == "clip" else {})


def config(family: str, tower: str) -> dict:
    grids = {"image_grid_pinpoints": PINPOINTS[family]} if family in PINPOINTS else {}
    return TEXT | MULTIMODAL | OWN[family] | grids | {"vocab_size": VOCABULARY[family], "mm_vision_tower": tower}


def random(name: str, *shape: int) -> torch.Tensor:
    """A weight by its name: norms near one, so that layers neither die nor explode."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    return torch.from_numpy(1 + 0.1 * values if name.endswith("norm.weight") else 0.25 * values)


def tower_weights(family: str, layers: int) -> dict[str, torch.Tensor]:
    """Names behind `vision_model.`."""
    width, inner = TOWER_WIDTH, 24
    siglip = family == "llava_onevision"
    patches = (SIDE_PX[family] // PATCH_PX) ** 2
    shapes = {
        "embeddings.patch_embedding.weight": (width, 3, PATCH_PX, PATCH_PX),
        "embeddings.position_embedding.weight": (patches + (not siglip), width),
        "post_layernorm.weight": (width,),
        "post_layernorm.bias": (width,),
    }
    if siglip:
        shapes["embeddings.patch_embedding.bias"] = (width,)
    else:
        shapes |= {
            "embeddings.class_embedding": (width,),
            "pre_layrnorm.weight": (width,),
            "pre_layrnorm.bias": (width,),
        }
    for layer in range(layers):
        at = f"encoder.layers.{layer}."
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{at}self_attn.{part}.weight": (width, width), f"{at}self_attn.{part}.bias": (width,)}
        for part in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{at}{part}.weight": (width,), f"{at}{part}.bias": (width,)}
        shapes |= {f"{at}mlp.fc1.weight": (inner, width), f"{at}mlp.fc1.bias": (inner,)}
        shapes |= {f"{at}mlp.fc2.weight": (width, inner), f"{at}mlp.fc2.bias": (width,)}
    return {name: random(name, *shape) for name, shape in shapes.items()}


def text_weights(family: str) -> dict[str, torch.Tensor]:
    keys = WIDTH // HEADS * KEY_HEADS
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY[family], WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (VOCABULARY[family], WIDTH),
        "model.mm_projector.0.weight": (WIDTH, TOWER_WIDTH),
        "model.mm_projector.0.bias": (WIDTH,),
        "model.mm_projector.2.weight": (WIDTH, WIDTH),
        "model.mm_projector.2.bias": (WIDTH,),
    }
    if family != "llava":
        shapes["model.image_newline"] = (WIDTH,)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for part, rows in (("q_proj", WIDTH), ("k_proj", keys), ("v_proj", keys)):
            shapes[f"{at}self_attn.{part}.weight"] = (rows, WIDTH)
            if family == "llava_onevision":
                shapes[f"{at}self_attn.{part}.bias"] = (rows,)
        shapes |= {
            f"{at}self_attn.o_proj.weight": (WIDTH, WIDTH),
            f"{at}mlp.gate_proj.weight": (INNER, WIDTH),
            f"{at}mlp.up_proj.weight": (INNER, WIDTH),
            f"{at}mlp.down_proj.weight": (WIDTH, INNER),
            f"{at}input_layernorm.weight": (WIDTH,),
            f"{at}post_attention_layernorm.weight": (WIDTH,),
        }
    return {name: random(name, *shape) for name, shape in shapes.items()}


def save(
    folder: Path, family: str, *, tower: str = "beside", form: str = "safetensors", name: str = "", **changes
) -> Path:
    """Write the checkpoint.

    Args:
        folder: of the checkpoint; the tower is written beside it.
        family: `llava`, `llava_next` or `llava_onevision`.
        tower: `beside` or `inside`. Inside are weights alone: other ones than beside, as after tuning.
        form: `safetensors` or `bin`, in two shards with an index; `single` or `single_bin`.
        name: what `mm_vision_tower` says, by default the folder beside.
        changes: weights to replace, add, or (`None`) remove; underscores `__` stand for dots.
    """
    tower_name = "tiny-siglip" if family == "llava_onevision" else "tiny-clip"
    folder.mkdir(parents=True)
    _save_json(folder / "config.json", config(family, name or tower_name))
    weights = text_weights(family)
    if tower == "inside":
        own = tower_weights(family, TOWER_LAYERS - (family == "llava_onevision"))
        weights |= {f"model.vision_tower.vision_tower.vision_model.{n}": 1.1 * w for n, w in own.items()}
    weights |= {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(LAYERS)}
    weights |= {key.replace("__", "."): value for key, value in changes.items()}
    _save_weights(folder, {n: w for n, w in weights.items() if w is not None}, form)
    # Left over from the first stage of training: other weights than those in the shards.
    torch.save({"model.mm_projector.0.weight": torch.zeros(WIDTH, TOWER_WIDTH)}, folder / "mm_projector.bin")
    save_tokenizer(folder, family)
    save_tower(folder.parent / tower_name, family)
    return folder


def save_tower(folder: Path, family: str) -> None:
    """A whole CLIP or SigLIP model, of which LLaVA reads the vision half."""
    folder.mkdir(exist_ok=True)
    weights = {f"vision_model.{n}": w for n, w in tower_weights(family, TOWER_LAYERS).items()}
    weights["vision_model.embeddings.position_ids"] = torch.arange(4)[None]
    weights |= {"logit_scale": torch.ones(()), "text_model.final_layer_norm.weight": torch.ones(8)}
    if family == "llava_onevision":
        weights["vision_model.head.probe"] = torch.ones(1, 1, TOWER_WIDTH)
    torch.save(weights, folder / "pytorch_model.bin")
    _save_json(folder / "config.json", tower_config(family))
    side = SIDE_PX[family]
    pixels = {"size": {"shortest_edge": side}, "crop_size": side, "image_mean": [0.4, 0.5, 0.6]}
    _save_json(folder / "preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor", **pixels})


def save_tokenizer(folder: Path, family: str) -> None:
    """SentencePiece for Vicuna, a byte-level `tokenizer.json` for the others, as published."""
    if family == "llava":
        shutil.copy(HERE / "tokenizer.model", folder)
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        own = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "pad_token": None}
        _save_json(folder / "tokenizer_config.json", names | own | {"model_max_length": 2048})
        _save_json(folder / "special_tokens_map.json", names | {"pad_token": "<unk>"})
        return
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in SPECIAL[family]])
    tokenizer.save(str(folder / "tokenizer.json"))
    begin, end = (SPECIAL[family][0], SPECIAL[family][1]) if family == "llava_next" else (None, "<|im_end|>")
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end}
    _save_json(folder / "tokenizer_config.json", own | {"pad_token": SPECIAL[family][0]})


def pixels(family: str) -> np.ndarray:
    """An image whose short side needs no resizing: uint8 `(side, side + 8, 3)`."""
    return random_pixels(SIDE_PX[family] + 8, SIDE_PX[family])


def random_pixels(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _save_weights(folder: Path, weights: dict[str, torch.Tensor], form: str) -> None:
    stem, ending = ("pytorch_model", "bin") if form.endswith("bin") else ("model", "safetensors")
    names = sorted(weights)
    if form.startswith("single"):
        shards = {f"{stem}.{ending}": names}
    else:
        half = len(names) // 2
        shards = {f"{stem}-00001-of-00002.{ending}": names[:half], f"{stem}-00002-of-00002.{ending}": names[half:]}
        index = {name: file for file, own in shards.items() for name in own}
        _save_json(folder / f"{stem}.{ending}.index.json", {"metadata": {}, "weight_map": index})
    for file, own in shards.items():
        tensors = {name: weights[name].contiguous() for name in own}
        if ending == "bin":
            torch.save(tensors, folder / file)
        else:
            save_file(tensors, folder / file, metadata={"format": "pt"})


def _save_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=1), encoding="utf-8")
