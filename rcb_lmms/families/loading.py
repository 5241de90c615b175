"""How a checkpoint finds its family and becomes a model, in either layout, whole or not at all."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from rcb_lmms.errors import UserError, choose
from rcb_lmms.families.base import Family
from rcb_lmms.families.devices import check_attention, check_device, check_kernels, check_placement, own_weights, placed
from rcb_lmms.families.identity import fingerprint
from rcb_lmms.families.original import Original, empty_model, find_original, load_original
from rcb_lmms.families.registry import FAMILIES, default_split, default_template, family_class
from rcb_lmms.families.video import VideoReader
from rcb_lmms.families.weights import DECODER_LAYER, DTYPES, check_finite, check_report, told
from rcb_lmms.lab.checkpoint import is_lab, lab_checkpoint


def family_of(pretrained: str) -> str:
    """Name of a checkpoint's family, read from its configuration alone.

    Raises:
        UserError: no such checkpoint, or one of another architecture.
    """
    return _recognise(locate(pretrained, "llava"), None)[0].name


def load_family(
    pretrained: str,
    *,
    family: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    attn_implementation: str = "sdpa",
    device_map: str | dict[str, Any] | None = None,
    quantization: str | None = None,
    preprocess: str | None = None,
    template: str | None = None,
    video_backend: str = "pyav",
    max_frames_num: int = 16,
    weights: bool = True,
    decoder: bool = True,
    **own: Any,
) -> Family:
    """Load a checkpoint as its family.

    Args:
        pretrained: `lab` (of the expected family, or `lab:FAMILY`), a folder, or a Hugging Face id, `id@revision` to
            pin one; Hugging Face's layout or that of the original `llava` package.
        family: the family the caller expects; `None` takes what the checkpoint is.
        device: torch device; by default `cuda` if there is one.
        attn_implementation: of the language model and the tower; no method needs `eager`.
        device_map: instead of `device`, how transformers spreads the model over all GPUs, the CPU and the disk: `auto`,
            `balanced`, `balanced_low_0`, `sequential`, or a dictionary.
        quantization: `4bit` or `8bit` weights of the language model, by bitsandbytes.
        preprocess: one of the family's presets, by default the paper's.
        template: `checkpoint`, or the family's `paper_template`; by default see `default_template`.
        dtype: weights' type; `auto` is float16 on a GPU (as the paper's evaluation) and float32 on a CPU.
        video_backend: what reads video files: `pyav`, `decord` or `torchcodec`.
        max_frames_num: frames of a video.
        weights: without them, a family of any size opens images and says where its tokens lie in a second, but cannot
            encode or answer.
        decoder: without it, the language model has its embeddings alone, for an engine beside it that answers.
        own: options that only this family has (`Family.options`).

    Raises:
        UserError: no such checkpoint, another architecture, weights that are not whole, or an unknown choice.
    """
    pretrained = str(pretrained)
    place = locate(pretrained, family or "llava")
    check_placement(device, device_map, quantization)
    device = chosen_device(device)
    check_attention(attn_implementation)
    chosen, original = _recognise(place, family)
    _check_options(chosen, own)
    if "split" in chosen.options:
        own = {"split": default_split(chosen.name, pretrained), **own}
    reader = VideoReader(video_backend, max_frames_num)
    loading = {"dtype": chosen_dtype(dtype, device), "attn_implementation": attn_implementation}
    spread = placed(device, device_map, quantization, loading["dtype"])
    if original and spread:
        raise _unconverted(pretrained, [*spread])
    if not weights:
        model, processor = _load_empty(place, original)
    elif original:
        with told(pretrained):
            model, processor = load_original(original, device=device, **loading)
    else:
        model, processor = _load_converted(place, device, {**loading, **spread}, decoder)
    if weights:
        check_kernels(quantization, device, model.config.get_text_config().hidden_size)
        check_finite(own_weights(model), pretrained)
        model = model.eval() if spread else model.eval().to(device)
    return chosen(
        model,
        processor,
        pretrained=pretrained,
        fingerprint=fingerprint(place.path, model.config),
        preprocess=preprocess,
        template=template or default_template(chosen.name, pretrained),
        original=original is not None,
        reader=reader,
        **own,
    )


@dataclass(frozen=True)
class Place:
    """What somebody called a checkpoint, and the folder or hub id it stands for, with options of loading."""

    name: str
    path: str
    options: dict[str, str] = field(default_factory=dict)


def locate(pretrained: str, family: str) -> Place:
    """What `pretrained` stands for; `lab` alone is that of `family`."""
    if is_lab(pretrained):
        return Place(pretrained, str(lab_checkpoint(pretrained.partition(":")[2] or family)))
    if os.path.isdir(pretrained):  # unlike Path.is_dir, False for a name that is too long
        return Place(pretrained, pretrained)
    path, _, revision = pretrained.partition("@")
    return Place(pretrained, path, {"revision": revision} if revision else {})


def _recognise(place: Place, expected: str | None) -> tuple[type[Family], Original | None]:
    """Family of a checkpoint, and the checkpoint itself if it is in the original layout."""
    from transformers import AutoConfig

    with told(place.name):
        original = find_original(place.path, **place.options)
        if original:
            model_type = family_class(original.family).model_type
        else:
            model_type = AutoConfig.from_pretrained(place.path, **place.options).model_type
    known = {family_class(name).model_type: family_class(name) for name in FAMILIES}
    found = known.get(model_type)
    if found is None or (expected and found.name != expected):
        raise UserError(
            wanted=f"a {expected or ' or '.join(FAMILIES)} model from {place.name}",
            found=f"a checkpoint of type {model_type}",
            allowed=", ".join(known),
            next_step=f"use the {found.name}_* entries for it" if found else "name another checkpoint: pretrained=...",
        )
    return found, original


def _load_converted(place: Place, device: str, loading: dict[str, Any], decoder: bool) -> tuple[Any, Any]:
    """Model and processor of a checkpoint in Hugging Face's layout."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.utils import logging as transformers_logging

    if device == "cpu":
        transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    # What transformers would warn of ends the load below, in one message.
    transformers_logging.set_verbosity_error()
    try:
        with told(place.name):
            config = AutoConfig.from_pretrained(place.path, **place.options)
            text = config.get_text_config()
            layers, kinds = text.num_hidden_layers, getattr(text, "layer_types", None)
            if not decoder:
                _set_layers(text, 0, kinds and [])
            model, report = AutoModelForImageTextToText.from_pretrained(
                place.path,
                config=config,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **loading,
                **place.options,
            )
    finally:
        transformers_logging.set_verbosity(verbosity)
    if not decoder:
        _set_layers(model.config.get_text_config(), layers, kinds)  # what the model is part of still has them
        report["unexpected_keys"] = {name for name in report["unexpected_keys"] if not DECODER_LAYER.search(name)}
        model.lm_head = torch.nn.Identity()
    check_report(report, model.config, place.name)
    return model, _processor(place)


def _set_layers(text: Any, layers: int, kinds: list[str] | None) -> None:
    text.num_hidden_layers = layers
    if kinds is not None:
        text.layer_types = kinds


def _processor(place: Place) -> Any:
    from transformers import AutoImageProcessor, AutoProcessor

    with told(place.name):
        # A backend named here would be asked of the video processor too, which has torchvision's only.
        processor = AutoProcessor.from_pretrained(place.path, **place.options)
        # PIL resizing equals the original preprocessing bit for bit; torchvision's differs by up to two grey levels.
        processor.image_processor = AutoImageProcessor.from_pretrained(place.path, backend="pil", **place.options)
    return processor


def _load_empty(place: Place, original: Original | None) -> tuple[Any, Any]:
    """Model without weights and processor."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForImageTextToText

    with told(place.name):
        if original:
            return empty_model(original)
        config = AutoConfig.from_pretrained(place.path, **place.options)
        with init_empty_weights():
            model = AutoModelForImageTextToText.from_config(config)
    return model.eval(), _processor(place)


def _check_options(family: type[Family], own: dict[str, Any]) -> None:
    if unknown := sorted(set(own) - set(family.options)):
        raise UserError(
            wanted=f"{family.name} with {', '.join(unknown)}",
            found="options this family does not have",
            allowed=", ".join(family.options) or f"no options: {family.name} sees every image in one view",
            next_step=f"leave out {', '.join(unknown)}",
        )


def _unconverted(pretrained: str, options: list[str]) -> UserError:
    return UserError(
        wanted=f"{pretrained} with {' and '.join(options)}",
        found="a checkpoint in the original layout, which is loaded onto one device, with weights as they are stored",
        allowed="checkpoints in Hugging Face's layout",
        next_step=f"rcb checkpoint convert {pretrained} FOLDER, then pretrained=FOLDER",
    )


def chosen_device(name: str | None) -> str:
    """A device of this machine by name, or the GPU if there is one.

    Raises:
        UserError: no such device.
    """
    import torch

    return check_device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def chosen_dtype(name: str, device: str) -> Any:
    """The type of weights by name; `auto` is float32 on a CPU and float16 elsewhere.

    Raises:
        UserError: no such type.
    """
    import torch

    if choose("dtype", name, DTYPES) == "auto":
        name = "float32" if device == "cpu" else "float16"
    return getattr(torch, name)
