"""Model families, and how a checkpoint finds its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcb_lmms.errors import UserError
from rcb_lmms.families.base import Family
from rcb_lmms.families.packed import PackedImage, Prompt
from rcb_lmms.families.video import VideoReader

if TYPE_CHECKING:
    from rcb_lmms.families.original import Original

__all__ = ["FAMILIES", "Family", "PackedImage", "Prompt", "family_class", "load_family"]

# Dotted paths, so that listing families imports no model.
FAMILIES = {
    "llava": "rcb_lmms.families.llava.Llava",
    "llava_next": "rcb_lmms.families.llava_next.LlavaNext",
    "llava_onevision": "rcb_lmms.families.llava_onevision.LlavaOnevision",
}

DTYPES = ("auto", "float32", "float16", "bfloat16")


def family_class(name: str) -> type[Family]:
    """The class of a family by its name in model ids."""
    import importlib

    module, _, attribute = FAMILIES[name].rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def default_codebook(family: str, pretrained: str) -> str:
    """Id of the codebook an entry means when it names none: the laboratory's or the family's released one."""
    own = pretrained.partition(":")[0] == "lab"
    return f"lab-{family.replace('_', '-')}" if own else family_class(family).codebook


def family_of(pretrained: str) -> str:
    """Name of a checkpoint's family, read from its configuration alone.

    Raises:
        UserError: no such checkpoint, or one of another architecture.
    """
    return _recognise(*_locate(pretrained, "llava"), pretrained, None)[0].name


def load_family(
    pretrained: str,
    *,
    family: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    attn_implementation: str = "sdpa",
    preprocess: str | None = None,
    template: str = "checkpoint",
    video_backend: str = "pyav",
    max_frames_num: int = 16,
    **own: Any,
) -> Family:
    """Load a checkpoint as its family.

    Args:
        pretrained: `lab` (of the expected family, or `lab:FAMILY`), a folder, or a Hugging Face id, `id@revision` to
            pin one; Hugging Face's layout or that of the original `llava` package.
        family: the family the caller expects; `None` takes what the checkpoint is.
        device: torch device; by default `cuda` if there is one.
        attn_implementation: of the language model and the tower; no method needs `eager`.
        preprocess: one of the family's presets, by default the paper's.
        template: `checkpoint`, or another of the family's chat templates.
        dtype: weights' type; `auto` is float16 on a GPU (as the paper's evaluation) and float32 on a CPU.
        video_backend: what reads video files: `pyav`, `decord` or `torchcodec`.
        max_frames_num: frames of a video.
        own: options that only this family has (`Family.options`).

    Raises:
        UserError: no such checkpoint, another architecture, or an unknown choice.
    """
    import torch

    path, options = _locate(pretrained, family or "llava")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen, original = _recognise(path, options, pretrained, family)
    _check_options(chosen, own)
    reader = VideoReader(video_backend, max_frames_num)
    loading = {"dtype": _dtype(dtype, device), "attn_implementation": attn_implementation}
    if original:
        from rcb_lmms.families.original import load_original

        model, processor = load_original(original, device=device, **loading)
    else:
        model, processor = _load_converted(path, options, pretrained, device, loading)
    loaded = chosen(
        model.eval().to(device),
        processor,
        pretrained=pretrained,
        fingerprint=_fingerprint(path, model.config),
        preprocess=preprocess,
        template=template,
        **own,
    )
    loaded.reader = reader
    return loaded


def _load_converted(
    path: str, options: dict[str, str], pretrained: str, device: str, loading: dict[str, Any]
) -> tuple[Any, Any]:
    """Model and processor of a checkpoint in Hugging Face's layout."""
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging as transformers_logging

    try:
        if device == "cpu":
            transformers_logging.disable_progress_bar()
        model = AutoModelForImageTextToText.from_pretrained(path, **loading, **options)
        # A backend named here would be asked of the video processor too, which has torchvision's only.
        processor = AutoProcessor.from_pretrained(path, **options)
        # PIL resizing equals the original preprocessing bit for bit; torchvision's differs by up to two grey levels.
        processor.image_processor = AutoImageProcessor.from_pretrained(path, backend="pil", **options)
    except (OSError, ValueError) as error:
        raise _unloadable(pretrained, error) from error
    return model, processor


def _recognise(
    path: str, options: dict[str, str], pretrained: str, expected: str | None
) -> tuple[type[Family], Original | None]:
    """Family of a checkpoint, and the checkpoint itself if it is in the original layout."""
    from rcb_lmms.families.original import find_original

    original = find_original(path, **options)
    if original:
        model_type = family_class(original.family).model_type
    else:
        model_type = _config(path, options, pretrained).model_type
    return _family_of(model_type, pretrained, expected), original


def _check_options(family: type[Family], own: dict[str, Any]) -> None:
    if unknown := sorted(set(own) - set(family.options)):
        raise UserError(
            wanted=f"{family.name} with {', '.join(unknown)}",
            found="options this family does not have",
            allowed=", ".join(family.options) or f"no options: {family.name} sees every image in one view",
            next_step=f"leave out {', '.join(unknown)}",
        )


def _fingerprint(path: str, config: Any) -> str:
    """Names the weights without reading gigabytes: a hub commit, or the files' names, sizes and times."""
    import hashlib

    if commit := getattr(config, "_commit_hash", None):
        return commit
    files = sorted(file for file in Path(path).iterdir() if file.suffix in (".safetensors", ".bin", ".json"))
    parts = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _locate(pretrained: str, family: str) -> tuple[str, dict[str, str]]:
    """Path or hub id, and loading options."""
    name, _, own = pretrained.partition(":")
    if name == "lab":
        from rcb_lmms.lab.checkpoint import lab_checkpoint

        return str(lab_checkpoint(own or family)), {}
    if os.path.isdir(pretrained):
        return pretrained, {}
    path, _, revision = pretrained.partition("@")
    return path, {"revision": revision} if revision else {}


def _config(path: str, options: dict[str, str], pretrained: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise _unloadable(pretrained, error) from error


def _family_of(model_type: str, pretrained: str, expected: str | None) -> type[Family]:
    known = {family_class(name).model_type: family_class(name) for name in FAMILIES}
    found = known.get(model_type)
    if found is None or (expected and found.name != expected):
        raise UserError(
            wanted=f"a {expected or ' or '.join(FAMILIES)} model from {pretrained}",
            found=f"a checkpoint of type {model_type}",
            allowed=", ".join(known),
            next_step=f"use the {found.name}_* entries for it" if found else "name another checkpoint: pretrained=...",
        )
    return found


def _dtype(name: str, device: str):
    import torch

    from rcb_lmms.families.base import choose

    if choose("dtype", name, DTYPES) == "auto":
        name = "float32" if device == "cpu" else "float16"
    return getattr(torch, name)


def _unloadable(pretrained: str, error: Exception) -> UserError:
    known = "lab, a folder with config.json and weights, or a Hugging Face id (id@revision)"
    local = Path(pretrained).exists()
    return UserError(
        wanted=f"load {pretrained}",
        found=" ".join(str(error).split())[:300],
        allowed=known,
        next_step="complete the folder" if local else f"hf download {pretrained.partition('@')[0]}, or pretrained=lab",
    )
