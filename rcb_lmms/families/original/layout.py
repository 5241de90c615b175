"""The original layout: how it is recognised, where its vision tower lies, and its configuration in Hugging Face terms.

Hugging Face uses `model_type: llava` too, and the published OneVision checkpoints even carry a `vision_config` of
another tower. Only the key `mm_vision_tower` tells the layouts apart.
"""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rcb_lmms.errors import UserError
from rcb_lmms.files import no_file

ARCHITECTURES = {"LlavaLlamaForCausalLM": "llama", "LlavaQwenForCausalLM": "qwen2"}
MODEL_TYPES = {"llava_llama": "LlavaLlamaForCausalLM", "llava_qwen": "LlavaQwenForCausalLM"}

# Towers of the public checkpoints. A tuned tower lies inside its checkpoint: nothing but its shape is needed.
TOWERS = {
    "openai/clip-vit-large-patch14-336": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    },
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
}

# What a configuration of the original says in Hugging Face's words.
TOWER_FIELDS = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels image_size patch_size "
    "projection_dim hidden_act layer_norm_eps attention_dropout"
).split()
TEXT_FIELDS = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings rms_norm_eps rope_theta rope_scaling initializer_range attention_bias attention_dropout "
    "use_sliding_window sliding_window max_window_layers tie_word_embeddings"
).split()


@dataclass(frozen=True)
class Source:
    """A folder or a Hugging Face id."""

    path: str
    revision: str | None = None

    def file(self, name: str) -> Path | None:
        """A file of it, downloaded if need be; `None` if there is no such file or it cannot be reached."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HFValidationError

        if os.path.isdir(self.path):
            file = Path(self.path, name)
            return None if no_file(file) else file
        try:
            return Path(hf_hub_download(self.path, name, revision=self.revision))
        except (OSError, EntryNotFoundError, HFValidationError):
            return None

    @property
    def commit(self) -> str | None:
        """The hub commit its files are of; `None` for a folder."""
        config = self.file("config.json")
        return None if config is None or os.path.isdir(self.path) else config.parent.name

    def json(self, name: str) -> dict[str, Any]:
        """Content of a JSON file, empty if there is none.

        Raises:
            UserError: it is not JSON.
        """
        file = self.file(name)
        try:
            content = json.loads(file.read_text(encoding="utf-8")) if file else {}
            if isinstance(content, dict):
                return content
            found = f"a {type(content).__name__}"
        except (ValueError, RecursionError) as error:
            found = str(error)
        raise UserError(
            wanted=f"read {file}", found=found, allowed="a JSON object", next_step="download the file again"
        )


@dataclass(frozen=True)
class Original:
    """A checkpoint in the original layout: its files and its `config.json`."""

    source: Source
    config: dict[str, Any]

    @cached_property
    def architecture(self) -> str:
        """The original class.

        Raises:
            UserError: not one of `ARCHITECTURES`.
        """
        found = (self.config.get("architectures") or [MODEL_TYPES.get(self.config.get("model_type"))])[0]
        if found not in ARCHITECTURES:
            raise self.refused("an architecture of the original LLaVA code", str(found), ", ".join(ARCHITECTURES))
        return found

    @cached_property
    def family(self) -> str:
        """Name of the family: SigLIP towers mean OneVision, spatially merged tiles of CLIP mean NeXT."""
        _ = self.architecture
        if self.tower.model_type.startswith("siglip"):
            return "llava_onevision"
        return "llava_next" if self.config.get("mm_patch_merge_type", "flat").startswith("spatial") else "llava"

    @cached_property
    def tower_source(self) -> Source:
        """Where `mm_vision_tower` lies: inside or beside the checkpoint, at its own path, or on the hub."""
        name = self.config["mm_vision_tower"]
        here = Path(self.source.path)
        places = [here / name, here / Path(name).name, here.parent / name, here.parent / Path(name).name, Path(name)]
        return Source(next((str(place) for place in places if (place / "config.json").is_file()), name))

    @cached_property
    def tower(self) -> Any:
        """Configuration of the vision tower, before OneVision cuts its last layer off.

        Raises:
            UserError: no such tower, or neither CLIP nor SigLIP.
        """
        from transformers import AutoConfig

        name = self.config["mm_vision_tower"]
        found = {} if os.path.isdir(self.tower_source.path) else TOWERS.get(name, {})
        found = found or self.tower_source.json("config.json")
        kind = next((kind for kind in ("siglip", "clip") if found.get("model_type", "").startswith(kind)), None)
        if kind is None:
            raise self.refused(
                f"the vision tower {name}",
                f"type {found['model_type']}" if "model_type" in found else "no such folder, and no such id on the hub",
                "a CLIP or SigLIP model: inside or beside the checkpoint's folder, or in the hub's cache",
                next_step=f"hf download {name}, or put its folder beside the checkpoint",
            )
        sizes = found.get("vision_config", found)
        fields = {field: sizes[field] for field in TOWER_FIELDS if field in sizes}
        return AutoConfig.for_model(f"{kind}_vision_model", **fields)

    def refused(self, wanted: str, found: str, allowed: str, next_step: str = "") -> UserError:
        """An error about this checkpoint."""
        return UserError(
            wanted=f"{wanted}, for {self.source.path}",
            found=found,
            allowed=allowed,
            next_step=next_step or "use the checkpoint's Hugging Face conversion: pretrained=...",
        )


def find_original(path: str, revision: str | None = None) -> Original | None:
    """The checkpoint, if it is one in the original layout."""
    source = Source(path, revision)
    config = source.json("config.json")
    return Original(source, config) if config.get("mm_vision_tower") else None


def open_original(name: str) -> Original:
    """A checkpoint in the original layout by its folder or hub id, `id@revision` to pin one.

    Raises:
        UserError: there is none.
    """
    path, _, revision = (name, "", "") if os.path.isdir(name) else name.partition("@")
    original = find_original(path, revision or None)
    if original is None:
        converted = Source(path, revision or None).json("config.json")
        raise UserError(
            wanted=f"a checkpoint in the layout of the original LLaVA code at {name}",
            found=f"a config.json of type {converted.get('model_type')}" if converted else "no config.json there",
            allowed="a folder or a Hugging Face id whose config.json names a mm_vision_tower",
            next_step="use it as it is: pretrained=..." if converted else f"hf download {path}",
        )
    return original


def check_supported(original: Original) -> None:
    """Refuse what the Hugging Face classes cannot express.

    Raises:
        UserError: another projector, or extra tokens around images.
    """
    config = original.config
    if (projector := config.get("mm_projector_type", "linear")) != "mlp2x_gelu":
        raise original.refused("a projector", f"mm_projector_type {projector}", "mlp2x_gelu")
    if config.get("mm_use_im_start_end"):
        raise original.refused("its prompt", "mm_use_im_start_end: tokens around every image", "images without them")
    if not isinstance(config.get("image_grid_pinpoints", []), list):
        raise original.refused("image_grid_pinpoints", str(config["image_grid_pinpoints"]), "a list of [width, height]")


def pinpoints(original: Original) -> list[list[int]]:
    """Tile grids as Hugging Face's (height, width): the original lists (width, height)."""
    return [[height, width] for width, height in original.config["image_grid_pinpoints"]]


def model_config(original: Original, ids: dict[str, int], pad_token_id: int | None) -> Any:
    """The Hugging Face configuration.

    Args:
        original: the checkpoint.
        ids: token ids of the placeholders by medium, `image` and for OneVision `video`. The embedding table grows to
            hold them: the original code marks images by -200, which is no row.
        pad_token_id: the tokenizer's.
    """
    from transformers import LlavaConfig, LlavaNextConfig, LlavaOnevisionConfig

    check_supported(original)
    config, tower = original.config, copy.deepcopy(original.tower)
    text = text_config(original, ids, pad_token_id)
    common = {
        "text_config": text,
        "vision_config": tower,
        "image_token_index": ids["image"],
        "tie_word_embeddings": text.tie_word_embeddings,
    }
    if original.family == "llava_onevision":
        # The original deletes the last layer and reads the end of what is left, whatever its config says.
        tower.num_hidden_layers -= 1
        tower.vision_use_head = False
        return LlavaOnevisionConfig(
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            video_token_index=ids["video"],
            image_grid_pinpoints=pinpoints(original),
            vision_aspect_ratio=config.get("image_aspect_ratio", "anyres_max_9"),
            **common,
        )
    whole = config.get("mm_vision_select_feature", "patch") == "cls_patch"
    common |= {
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "full" if whole else "default",
        "image_seq_length": (tower.image_size // tower.patch_size) ** 2 + whole,
    }
    if original.family == "llava_next":
        return LlavaNextConfig(image_grid_pinpoints=pinpoints(original), **common)
    return LlavaConfig(**common)


def text_config(original: Original, ids: dict[str, int], pad_token_id: int | None) -> Any:
    """The language model's configuration, with rows for the placeholders."""
    from transformers import AutoConfig

    config = original.config
    fields = {name: config[name] for name in TEXT_FIELDS if config.get(name) is not None}
    return AutoConfig.for_model(
        ARCHITECTURES[original.architecture],
        vocab_size=max(config["vocab_size"], max(ids.values()) + 1),
        bos_token_id=config.get("bos_token_id"),
        eos_token_id=config.get("eos_token_id"),
        pad_token_id=config.get("pad_token_id", pad_token_id),
        **({"tie_word_embeddings": False} | fields),
    )
