"""Load a checkpoint in the original layout, or write it in Hugging Face's, tensor by tensor."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcb_lmms.errors import UserError, choose
from rcb_lmms.families.original.layout import Original, model_config
from rcb_lmms.families.original.processors import end_of_turn, load_tokenizer, make_processor, placeholder_ids
from rcb_lmms.families.original.stored import TABLES, Stored, placed, read, stored_weights
from rcb_lmms.families.weights import DTYPES, check_finite, told
from rcb_lmms.files import unwritable

if TYPE_CHECKING:
    from torch import dtype

SHARD_BYTES = 1 << 30


def load_original(
    original: Original, *, dtype: dtype, device: str = "cpu", attn_implementation: str = "sdpa"
) -> tuple[Any, Any]:
    """The Hugging Face model, in evaluation mode, and its processor.

    Memory peaks at the model's own size and that of its largest tensor.

    Raises:
        UserError: weights, shards or the vision tower are missing, weights are surplus, or sizes differ.
    """
    import torch

    model, processor = empty_model(original, attn_implementation)
    stored = stored_weights(original, model)
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    for item, tensor in read(stored):
        empty = torch.empty(shapes[item.target], dtype=dtype, device=device)
        owner, _, leaf = item.target.rpartition(".")
        weight = torch.nn.Parameter(placed(original, item.target, tensor, empty), requires_grad=False)
        setattr(model.get_submodule(owner), leaf, weight)
    _note_dtype(model.config, dtype)
    model.config._commit_hash = original.source.commit
    model.tie_weights()
    return model.eval().to(device), processor


def convert(original: Original, folder: str | Path, dtype: str = "auto") -> list[Path]:
    """Write the checkpoint as a Hugging Face folder and return its files.

    The folder appears when it is complete; what a killed run wrote beside it is thrown away by the next.

    Args:
        original: the checkpoint.
        folder: it must not exist, or be empty.
        dtype: of the weights; `auto` is the one in which the language model is stored.

    Raises:
        UserError: as `load_original`, or the folder is in use or cannot be written.
    """
    import torch
    from safetensors import SafetensorError

    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            wanted=f"write {folder}",
            found="something there already",
            allowed="a folder that does not exist, or is empty",
            next_step="name another folder, or remove it",
        )
    choose("dtype", dtype, DTYPES)
    with told(original.source.path):
        model, processor = empty_model(original, "sdpa")
    stored = stored_weights(original, model)
    _note_dtype(model.config, _stored_dtype(stored) if dtype == "auto" else getattr(torch, dtype))
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_shards(original, model, stored, partial)
        processor.save_pretrained(partial)
        model.generation_config.save_pretrained(partial)
        model.config.save_pretrained(partial)
        os.replace(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise unwritable(folder, error if isinstance(error, OSError) else OSError(str(error))) from error
    return sorted(folder.iterdir())


def empty_model(original: Original, attn_implementation: str = "sdpa") -> tuple[Any, Any]:
    """The Hugging Face model without weights, and its processor."""
    import transformers
    from accelerate import init_empty_weights

    tokenizer = load_tokenizer(original)
    config = model_config(original, placeholder_ids(original, tokenizer), tokenizer.pad_token_id)
    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation=attn_implementation)
    config.architectures = [type(model).__name__]
    model.generation_config = _generation_config(original, tokenizer)
    return model, make_processor(original, tokenizer)


def _note_dtype(config: Any, dtype: dtype) -> None:
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype


def _generation_config(original: Original, tokenizer: Any) -> Any:
    """Ids alone: the checkpoints' sampling options and penalties are no part of greedy evaluation."""
    from transformers import GenerationConfig

    own = original.config | original.source.json("generation_config.json")
    ends = own.get("eos_token_id") or []
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.convert_tokens_to_ids(end_of_turn(tokenizer))}
    pad = own.get("pad_token_id")
    return GenerationConfig(
        bos_token_id=own.get("bos_token_id"),
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id if pad is None else pad,
    )


def _stored_dtype(stored: list[Stored]) -> dtype:
    (embeddings,) = (item for item in stored if item.target == TABLES[0])
    ((_, tensor),) = read([embeddings])
    return tensor.dtype


def _write_shards(original: Original, model: Any, stored: list[Stored], folder: Path) -> None:
    """Write the weights in shards of about `SHARD_BYTES`, and their index."""
    import torch
    from safetensors.torch import save_file
    from tqdm import tqdm

    dtype, shapes = model.config.dtype, {name: weight.shape for name, weight in model.state_dict().items()}
    sizes_bytes = {name: shape.numel() * dtype.itemsize for name, shape in shapes.items()}
    groups = _grouped(stored, sizes_bytes)
    weight_map = {}
    for number, group in enumerate(tqdm(groups, desc="shards", disable=None), 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        shard = {
            item.target: placed(original, item.target, tensor, torch.empty(shapes[item.target], dtype=dtype))
            for item, tensor in read(group)
        }
        check_finite(shard.items(), original.source.path)
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": sum(sizes_bytes[name] for name in weight_map)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _grouped(stored: list[Stored], sizes_bytes: dict[str, int]) -> list[list[Stored]]:
    """Consecutive weights, up to `SHARD_BYTES` together."""
    groups: list[list[Stored]] = [[]]
    filled_bytes = 0
    for item in stored:
        filled_bytes += sizes_bytes[item.target]
        if groups[-1] and filled_bytes > SHARD_BYTES:
            groups.append([])
            filled_bytes = sizes_bytes[item.target]
        groups[-1].append(item)
    return groups
