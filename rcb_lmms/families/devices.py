"""What this machine can run a model on and with, checked before gigabytes are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rcb_lmms.errors import UserError, choose

if TYPE_CHECKING:
    from torch import Tensor

# Implementation -> the check of transformers that says whether it is installed, and the package.
ATTENTION = {
    "sdpa": None,
    "eager": None,
    "flex_attention": ("is_torch_flex_attn_available", "torch"),
    "flash_attention_2": ("is_flash_attn_2_available", "flash-attn"),
    "flash_attention_3": ("is_flash_attn_3_available", "flash-attn-3"),
}
# Ways of transformers to spread a model; what does not fit on the GPUs is left to the CPU and the disk.
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
QUANTIZATION = ("4bit", "8bit")
BLOCK = 64  # weights that share a scale, in bitsandbytes' four bits


def check_device(name: str) -> str:
    """`name`, if it is a device of this machine.

    Raises:
        UserError: no torch device, or none of this machine.
    """
    import torch

    present = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    present += ["mps"] if torch.backends.mps.is_available() else []
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError, ValueError):
        device = None
    number = 0 if device is None or device.index is None else device.index
    if device is None or not {device.type, f"{device.type}:{number}"} & set(present):
        raise UserError(
            wanted=f"device={name}",
            found="no such device on this machine",
            allowed=", ".join(present),
            next_step=f"device={present[-1]}, or leave it out",
        )
    return name


def check_attention(name: str) -> str:
    """`name`, if it is an implementation of attention that is installed.

    Raises:
        UserError: an unknown one, or one that is not installed.
    """
    choose("attn_implementation", name, ATTENTION)
    if ATTENTION[name] is None:
        return name
    import transformers.utils

    check, package = ATTENTION[name]
    installed = getattr(transformers.utils, check, None)  # older versions of transformers do not know all of them
    if installed is None or not installed():
        raise UserError(
            wanted=f"attn_implementation={name}",
            found=f"the Python package {package} is not installed, or does not run here",
            allowed="sdpa and eager, which torch has",
            next_step="attn_implementation=sdpa",
        )
    return name


def check_placement(device: str | None, device_map: Any, quantization: str | None) -> None:
    """Refuse two places for one model, and a quantization that is not installed.

    Raises:
        UserError: `device` beside `device_map`, an unknown choice, no bitsandbytes.
    """
    if device is not None and device_map is not None:
        raise UserError(
            wanted=f"device={device} with device_map={device_map}",
            found="two places for one model",
            allowed="one device for each process, or device_map for one process that has them all",
            next_step=f"leave out device, or device_map={device_map}; with device_map, one process",
        )
    if isinstance(device_map, str):
        choose("device_map", device_map, DEVICE_MAPS)
    if quantization is None:
        return
    choose("quantization", quantization, QUANTIZATION)
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise UserError(
            wanted=f"quantization={quantization}",
            found="the Python package bitsandbytes is not installed",
            allowed="weights as they are stored, which need no package",
            next_step="pip install 'rcb_lmms[quantization]', or leave quantization out",
        )


def placed(device: str, device_map: Any, quantization: str | None, dtype: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a model that is spread or quantized; none for another.

    The vision tower and the projector are left as they are stored, so that methods choose the tokens that they choose
    without quantization. The four bits are those of the original LLaVA code: NF4, quantized twice.
    """
    from transformers import BitsAndBytesConfig

    if quantization is None:
        return {} if device_map is None else {"device_map": device_map}
    own = {
        "8bit": {"load_in_8bit": True},
        "4bit": {
            "load_in_4bit": True,
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
        },
    }[quantization]
    whole = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    config = BitsAndBytesConfig(**own, llm_int8_skip_modules=whole)
    return {"device_map": {"": device} if device_map is None else device_map, "quantization_config": config}


def check_kernels(quantization: str | None, device: str, width: int) -> None:
    """Refuse a language model for whose width bitsandbytes has no kernels.

    Raises:
        UserError: four bits on a CPU, of rows that are no whole blocks.
    """
    if quantization == "4bit" and device == "cpu" and width % BLOCK:
        raise UserError(
            wanted="quantization=4bit on a CPU",
            found=f"a language model of width {width}",
            allowed=f"multiples of {BLOCK}, which bitsandbytes has kernels for; any width on a GPU, or with 8bit",
            next_step="quantization=8bit",
        )


def home(module: Any) -> Any:
    """The device on which a module computes; accelerate may keep its weights elsewhere until then."""
    import torch

    where = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return next(module.parameters()).device if where is None else torch.device(where)


def own_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and values of all parameters and buffers, those among them that were left to the CPU or the disk."""
    from accelerate.utils import align_module_device

    for name, module in model.named_modules():
        with align_module_device(module):
            for own, weight in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                yield f"{name}.{own}".lstrip("."), weight
