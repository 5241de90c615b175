"""The laboratory's trained checkpoints, which the package carries; `training/` in a source checkout made them."""

from __future__ import annotations

from pathlib import Path

from rcb_lmms.errors import UserError

FAMILIES = ("llava", "llava_next", "llava_onevision")


def is_lab(pretrained: str) -> bool:
    """Whether somebody means a checkpoint of the laboratory: `lab`, or `lab:FAMILY`."""
    return pretrained.partition(":")[0] == "lab"


def lab_checkpoint(family: str = "llava") -> Path:
    """Find the folder of a trained checkpoint.

    Raises:
        UserError: the family is unknown, or its checkpoint is not there.
    """
    folder = Path(__file__).parent / "checkpoints" / family
    if family in FAMILIES and (folder / "model.safetensors").exists():
        return folder
    known = family if family in FAMILIES else FAMILIES[0]
    raise UserError(
        wanted=f"the laboratory's {family} checkpoint",
        found=f"nothing at {folder}" if family in FAMILIES else f"family {family!r}",
        allowed=f"a trained checkpoint of: {', '.join(FAMILIES)}",
        next_step=f"in a source checkout: python -m training.train --family {known} --out {folder.with_name(known)}",
    )
