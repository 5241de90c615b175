"""Folders of data that lie beside the package in a checkout and inside it in an installed wheel."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from rcb_lmms.errors import UserError

PACKAGE = Path(__file__).resolve().parent


def data_dir(name: str) -> Path:
    """The folder `codebooks`, `tasks` or `eval_configs`.

    Raises:
        UserError: neither an installed nor a checked-out copy has it.
    """
    for folder in (PACKAGE / "_data" / name, PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise UserError(
        wanted=f"the data folder {name}",
        found=f"neither {PACKAGE / '_data' / name} nor {PACKAGE.parent / name}",
        allowed="a source checkout, or a wheel built from one",
        next_step="pip install --force-reinstall rcb_lmms",
    )


def tested_versions() -> dict[str, str]:
    """The version of every package that the suite was run with under this Python and system, by canonical name."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    places = (PACKAGE / "_data" / "constraints.txt", PACKAGE.parent / "constraints.txt")
    file = next((place for place in places if place.is_file()), None)
    lines = file.read_text(encoding="utf-8").splitlines() if file else []
    pins = [Requirement(line) for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return {
        canonicalize_name(pin.name): str(pin.specifier).removeprefix("==")
        for pin in pins
        if pin.marker is None or pin.marker.evaluate()
    }


def cache_dir() -> Path:
    """Where calibrations and downloads are kept: `RCB_CACHE`, or `~/.cache/rcb_lmms`."""
    return Path(os.environ.get("RCB_CACHE") or Path.home() / ".cache" / "rcb_lmms")


def source_version() -> dict[str, str | None]:
    """What made an artefact: `version` of the package and, in a checkout, the git `commit` (`+` if files changed)."""
    try:
        version = metadata.version("rcb_lmms")
    except metadata.PackageNotFoundError:
        version = None
    return {"package": "rcb_lmms", "version": version, "commit": _git_commit(PACKAGE.parent)}


def machine(device: Any = "cpu") -> dict[str, Any]:
    """What a figure was measured on: processor, cores, threads, memory in GB, the GPU if it is one, and versions."""
    import torch
    import transformers

    kind = torch.device(device)
    found = {
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "device": str(kind),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if kind.type == "cuda":
        own = torch.cuda.get_device_properties(kind)
        found |= {"gpu": own.name, "gpu_memory_gb": round(own.total_memory / 1e9, 1)}
    return found


def _processor_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


@functools.cache
def sources_hash() -> str:
    """Names the code that runs, in a checkout with changes and in an installed wheel alike."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*")):
        if file.suffix in (".py", ".yaml") and file.is_file():
            digest.update(f"{file.relative_to(PACKAGE)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _git_commit(checkout: Path) -> str | None:
    # Asked once: what a process writes later, such as golden files, does not change the sources it runs from.
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
