"""Weights of a checkpoint in the original layout: where each lies, what it is called in Hugging Face, and reading them.

Reading copies tensor by tensor from mapped files and closes each file after every `GROUP_BYTES`, so that no more than
that of its pages counts as this process's memory, however large a shard is.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcb_lmms.errors import UserError
from rcb_lmms.families.original.layout import Original, Source
from rcb_lmms.families.weights import COMPUTED, listed

if TYPE_CHECKING:
    from torch import Tensor

GROUP_BYTES = 32 << 20

TOWER = "model.vision_tower."
# The first prefix that fits, in this order.
PREFIXES = {
    "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
    "model.vision_tower.vision_tower.vision_model.": TOWER,
    "model.image_newline": "model.image_newline",
    "lm_head.": "lm_head.",
    "model.": "model.language_model.",
}
# Rows that a placeholder may have to be added to.
TABLES = ("model.language_model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its name there and in the Hugging Face model."""

    file: Path
    name: str
    target: str


def renamed(name: str) -> str:
    """A weight's name in the Hugging Face model, as it was if it has none."""
    return next((new + name.removeprefix(old) for old, new in PREFIXES.items() if name.startswith(old)), name)


def stored_weights(original: Original, model: Any) -> list[Stored]:
    """Where each parameter of the Hugging Face model is stored.

    Args:
        original: the checkpoint; a `mm_projector.bin` beside its shards, left over from the first stage of training,
            is not read: the shards hold the projector that was trained on.
        model: the Hugging Face model, empty.

    Raises:
        UserError: a file is missing, a weight is missing, or one has no place.
    """
    found = [Stored(file, name, renamed(name)) for file, name in _names(original.source, original)]
    if not any(item.target.startswith(TOWER) for item in found):
        found += _outer_tower(original)
    wanted = set(model.state_dict())
    if model.config.tie_word_embeddings:
        wanted.discard("lm_head.weight")
    found = [item for item in found if not _dropped(item.target, model)]
    targets = {item.target for item in found}
    _refuse(original, "every weight of the model", "missing", wanted - targets)
    _refuse(original, "a place for every weight", "surplus", {item.name for item in found if item.target not in wanted})
    return found


def _outer_tower(original: Original) -> list[Stored]:
    """A tower that lies outside, of which a whole CLIP model holds more than is wanted."""
    stored = _names(original.tower_source, original)
    prefix = "vision_model." if any(name.startswith("vision_model.") for _, name in stored) else ""
    return [Stored(file, name, TOWER + name.removeprefix(prefix)) for file, name in stored if name.startswith(prefix)]


def _dropped(target: str, model: Any) -> bool:
    """What the original code computes, deletes or ties itself."""
    if target.endswith(COMPUTED):
        return True
    if target == "lm_head.weight":
        return model.config.tie_word_embeddings
    if model.config.model_type == "llava_onevision":
        behind = model.config.vision_config.num_hidden_layers
        return target.startswith((f"{TOWER}head.", f"{TOWER}encoder.layers.{behind}."))
    return False


def _refuse(original: Original, wanted: str, what: str, names: set[str]) -> None:
    if names:
        raise original.refused(
            wanted,
            listed(sorted(names), what),
            "exactly the weights of the original code, in all shards of the index",
            next_step="complete the download, or use the checkpoint's Hugging Face conversion",
        )


def _names(source: Source, original: Original) -> list[tuple[Path, str]]:
    """File and name of every tensor, by the files themselves: an index only lists the files."""
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        shards = sorted(set(source.json(index).get("weight_map", {}).values()))
        files = {name: source.file(name) for name in shards or [single]}
        if missing := [name for name, file in files.items() if shards and file is None]:
            raise original.refused(
                f"the weights in {source.path}",
                f"missing: {', '.join(missing)}",
                f"all files that {index} names",
                next_step="complete the download",
            )
        if None not in files.values():
            return [(file, name) for file in files.values() for name in _opened(file)[0]]
    raise original.refused(
        f"the weights in {source.path}",
        "none",
        "safetensors or pytorch_model.bin, in one file or in shards with an index",
        next_step="complete the download",
    )


def read(stored: Iterable[Stored]) -> Iterator[tuple[Stored, Tensor]]:
    """Each tensor, to be copied at once: it is a view of a mapped file.

    Raises:
        UserError: a file is cut off or no checkpoint.
    """
    by_file: dict[Path, list[Stored]] = {}
    for item in stored:
        by_file.setdefault(item.file, []).append(item)
    for file, items in by_file.items():
        limit_bytes = GROUP_BYTES if _mapped(file) else float("inf")
        while items:
            _, load = _opened(file)
            done_bytes = 0
            while items and done_bytes < limit_bytes:
                item = items.pop(0)
                tensor = load(item.name)
                done_bytes += tensor.nbytes
                yield item, tensor
            del tensor, load


def _mapped(file: Path) -> bool:
    """Files from before torch 1.6 are no archives, cannot be mapped, and are read whole."""
    return file.suffix == ".safetensors" or zipfile.is_zipfile(file)


def _opened(file: Path) -> tuple[list[str], Callable[[str], Tensor]]:
    """Names in a file, and how to get one of its tensors; the file is closed when both are gone."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix == ".safetensors":
            handle = safe_open(file, framework="pt")
            return list(handle.keys()), handle.get_tensor
        tensors = torch.load(file, weights_only=True, map_location="cpu", mmap=_mapped(file))
        return list(tensors), tensors.__getitem__
    except (SafetensorError, OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(
            wanted=f"read {file}",
            found=" ".join(str(error).split())[:200] or "a file that is cut off",
            allowed="a complete safetensors or PyTorch file of tensors alone",
            next_step="download the file again",
        ) from error


def placed(original: Original, target: str, tensor: Tensor, empty: Tensor) -> Tensor:
    """Fill `empty`, shaped as the model's parameter, with a stored tensor, and with rows for placeholders.

    Rows are added as the mean of all others. In the embedding nothing reads them; in `lm_head` a mean's logit never
    exceeds the largest, while a zero's would whenever all others are negative.

    Raises:
        UserError: the stored tensor has another shape than the model's.
    """
    import torch

    rows = len(tensor) if target in TABLES and tensor.ndim == 2 and 0 < len(empty) - len(tensor) <= 2 else len(empty)
    if tensor.shape != empty[:rows].shape:
        raise original.refused(
            f"{target} of shape {tuple(empty.shape)}",
            f"shape {tuple(tensor.shape)}",
            "the sizes in config.json and in the tower's",
            next_step="check config.json, and that the tower is the checkpoint's own",
        )
    empty[:rows].copy_(tensor)
    if rows < len(empty):
        # In parts: the sum of a whole table in float32 would take as much memory as the table twice over.
        empty[rows:] = sum(part.sum(0, dtype=torch.float32) for part in tensor.split(4096)) / rows
    return empty
