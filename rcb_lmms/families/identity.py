"""Weights named by their content: the same wherever they lie, other than `Family.fingerprint`, which costs nothing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from rcb_lmms.files import sha256_of

if TYPE_CHECKING:
    from rcb_lmms.families.base import Family


def weights_hash(family: Family) -> str:
    """The hub's commit, or a hash over a folder's files, every byte of which is read."""
    from rcb_lmms.lab.checkpoint import lab_checkpoint

    if family.revision:
        return str(family.revision)
    folder = lab_checkpoint(family.name) if family.pretrained.partition(":")[0] == "lab" else Path(family.pretrained)
    files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".json", ".jinja"))
    return hashlib.sha256(json.dumps([[file.name, sha256_of(file)] for file in files]).encode()).hexdigest()[:16]
