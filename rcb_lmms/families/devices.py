"""What this machine can run a model on and with, checked before gigabytes are read."""

from __future__ import annotations

from rcb_lmms.errors import UserError, choose

# Implementation -> the check of transformers that says whether it is installed, and the package.
ATTENTION = {
    "sdpa": None,
    "eager": None,
    "flex_attention": ("is_torch_flex_attn_available", "torch"),
    "flash_attention_2": ("is_flash_attn_2_available", "flash-attn"),
    "flash_attention_3": ("is_flash_attn_3_available", "flash-attn-3"),
}


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
