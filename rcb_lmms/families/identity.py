"""Which weights these are: by what costs nothing, or by every byte of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcb_lmms.files import sha256_of
from rcb_lmms.lab.checkpoint import is_lab, lab_checkpoint

if TYPE_CHECKING:
    from rcb_lmms.families.base import Family

WEIGHTS = (".safetensors", ".bin", ".json")


def fingerprint(path: str, config: Any) -> str:
    """Names the weights without reading gigabytes: a hub commit, or the files' names, sizes and times."""
    if commit := getattr(config, "_commit_hash", None):
        return commit
    files = sorted(file for file in Path(path).iterdir() if file.suffix in WEIGHTS)
    parts = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def weights_hash(family: Family) -> str:
    """The hub's commit, or a hash over a folder's files, every byte of which is read: the same wherever they lie."""
    if family.revision:
        return str(family.revision)
    folder = lab_checkpoint(family.name) if is_lab(family.pretrained) else Path(family.pretrained)
    files = sorted(file for file in folder.iterdir() if file.suffix in (*WEIGHTS, ".jinja"))
    return hashlib.sha256(json.dumps([[file.name, sha256_of(file)] for file in files]).encode()).hexdigest()[:16]
