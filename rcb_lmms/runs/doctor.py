"""`rcb doctor`: what this machine has, what each lack costs, and the command that mends it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DISTRIBUTION = "rcb_lmms"
# Bounds on these decide whether anything works at all.
ESSENTIAL = ("torch", "transformers", "lmms-eval", "numpy", "safetensors", "datasets")
REPORTING = ("scipy", "pandas", "tabulate", "matplotlib", "scikit-learn")
LOW_DISK_BYTES = 20 << 30


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        found: what was there.
        ok: whether that is all that could be wished for.
        essential: whether nothing works without it; only then is the exit status not 0.
        cost: what does not work, if not `ok`.
        mend: the command or change that helps.
    """

    name: str
    found: str
    ok: bool = True
    essential: bool = False
    cost: str = ""
    mend: str = ""


def doctor() -> list[Check]:
    """Every check, in the order of printing; nothing is downloaded, or changed outside a temporary folder."""
    checks = [_python(), *_packages(), _untested(), _entries(), _gpu(), _java(), _spice(), _video()]
    return [*checks, *_disk(), _cache(), *_codebooks(), _laboratory(), _questions()]


def main() -> int:
    """Print every check; 1 if something essential is broken, else 0."""
    checks = doctor()
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = "ok  " if check.ok else "FAIL" if check.essential else "note"
        print(f"{mark}  {check.name:<{width}}  {check.found}")
        for label, text in (("costs", check.cost), ("mend", check.mend)):
            if text and not check.ok:
                print(f"{'':{width + 8}}{label}: {text}")
    broken = [check.name for check in checks if check.essential and not check.ok]
    print(f"\nbroken: {', '.join(broken)}" if broken else "\nnothing essential is broken")
    return 1 if broken else 0


def _python() -> Check:
    from importlib import metadata

    found = ".".join(map(str, sys.version_info[:3]))
    try:
        wanted = metadata.metadata(DISTRIBUTION)["Requires-Python"] or ""
    except metadata.PackageNotFoundError:
        return Check("python", found)  # the missing installation is reported with the packages
    return Check(
        "python",
        found,
        ok=_within(found, wanted),
        essential=True,
        cost=f"this package is for python {wanted}",
        mend="make a virtual environment of such a version and install into it",
    )


def _within(version: str, bounds: str) -> bool:
    from packaging.specifiers import SpecifierSet

    # What a package index calls a pre-release is, on a user's machine, simply what is there.
    return SpecifierSet(bounds).contains(version, prereleases=True)


def _packages() -> Iterator[Check]:
    """Installed versions against the bounds this package declares."""
    from importlib import metadata

    from packaging.requirements import Requirement

    try:
        declared = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        cost = "lmms-eval does not see the models, and the rcb and lmms_eval commands are missing"
        yield Check(DISTRIBUTION, "not installed", False, True, cost, "pip install -e . in the source folder")
        return
    yield Check(DISTRIBUTION, metadata.version(DISTRIBUTION))
    bounds = {(own := Requirement(text)).name: own.specifier for text in declared}
    for name in (*ESSENTIAL, *REPORTING):
        yield _package(name, str(bounds.get(name, "")))


def _package(name: str, bounds: str) -> Check:
    from importlib import metadata

    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        found = "not installed"
    good = found != "not installed" and _within(found, bounds)
    cost = "nothing runs without it" if name in ESSENTIAL else "no tables, plots or pictures"
    if found != "not installed":
        cost = f"tested with {name} {bounds}: other releases differ in hooks and files"
    return Check(name, found, good, name in ESSENTIAL, cost, f'pip install "{name}{bounds}"')


def _untested() -> Check:
    """Installed versions that the suite was not run with."""
    from importlib import metadata

    from rcb_lmms.resources import tested_versions

    tested = tested_versions()
    installed = {own.metadata["Name"].lower().replace("_", "-"): own.version for own in metadata.distributions()}
    others = [
        f"{name} {installed[name]} (tested: {version})"
        for name, version in sorted(tested.items())
        if name in installed and installed[name].partition("+")[0] != version
    ]
    found = ", ".join(others) if others else f"all {len(tested)} as tested" if tested else "no list of tested versions"
    return Check(
        "versions outside the tested set",
        found,
        ok=not others and bool(tested),
        cost="they lie within the declared bounds, but nobody has tried them together",
        mend="pip install -c constraints.txt -e .",
    )


def _questions() -> Check:
    """Three questions of laboratory POPE, asked through lmms-eval as a user would ask them."""
    import os
    import subprocess
    import tempfile

    from rcb_lmms.lab.data import write_data

    arguments = ["--model", "llava_rcb", "--model_args", "pretrained=lab,keep=36", "--tasks", "pope", "--limit", "3"]
    with tempfile.TemporaryDirectory() as folder:
        tree = write_data(Path(folder, "lab"), benchmarks=["pope"], sizes={"pope": 1})
        out = Path(folder, "out")
        done = subprocess.run(
            [sys.executable, "-m", "rcb_lmms.runs.host", *arguments, "--output_path", str(out), "--log_samples"],
            cwd=tree,
            env={**os.environ, "RCB_CACHE": str(Path(folder, "cache")), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        answers = [line for file in out.rglob("*_samples_pope.jsonl") for line in file.read_text().splitlines()]
    good = done.returncode == 0 and len(answers) == 3
    lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
    found = "answered through lmms-eval" if good else " | ".join(lines[-5:])[-600:]
    mend = "read the lines above; pip install -c constraints.txt -e . brings the tested versions"
    return Check("three questions of POPE", found, good, True, "no run through lmms-eval succeeds", mend)


def _entries() -> Check:
    """Whether lmms-eval would find our models: through the entry point, which imports no torch."""
    from importlib import metadata

    from rcb_lmms.models import ENTRIES

    name, group = "lmms-eval models", "lmms_eval.models"
    ours = [point for point in metadata.entry_points(group=group) if point.value.startswith("rcb_lmms.")]
    if not ours:
        cost = "lmms_eval --model llava_rcb answers that there is no such model"
        return Check(name, "no entry point of this package", False, True, cost, "pip install -e . (again)")
    count = sum(len(methods) for methods in ENTRIES.values())
    others = sorted({point.value for point in metadata.entry_points(group=group)} - {point.value for point in ours})
    beside = f"; other plugins: {', '.join(others)}" if others else ""
    return Check(name, f"{count} entries registered ({', '.join(ENTRIES)}){beside}")


def _gpu() -> Check:
    cost = "7B checkpoints take minutes per question on a CPU; the laboratory needs no GPU"
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check(
            "GPU", f"torch does not load: {error}", False, True, "nothing runs", "pip install --force-reinstall torch"
        )
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        return Check("GPU", f"{torch.cuda.device_count()} x {device.name}, {device.total_memory / 2**30:.0f} GiB")
    built = f"torch was built {'for CUDA ' + torch.version.cuda if torch.version.cuda else 'without CUDA'}"
    mend = "install the NVIDIA driver" if torch.version.cuda else "install a CUDA build of torch: see pytorch.org"
    return Check("GPU", f"none ({built})", False, False, cost, f"{mend}, or go on with pretrained=lab")


def _java() -> Check:
    from rcb_lmms.errors import UserError
    from rcb_lmms.scoring.java import java_banner

    try:
        return Check("Java", java_banner())
    except UserError as error:
        cost = "CIDEr and SPICE are left blank (rcb captions adds them later); upstream's caption tasks lose their run"
        return Check("Java", error.found, False, False, cost, error.next_step)


def _spice() -> Check:
    from rcb_lmms.errors import UserError
    from rcb_lmms.scoring.corenlp import corenlp_jars

    try:
        return Check("SPICE", f"CoreNLP at {corenlp_jars()[0].parent}")
    except UserError as error:
        cost = "SPICE is left blank (rcb captions adds it later); CIDEr does not need it"
        return Check("SPICE", error.found, False, False, cost, error.next_step)


def _video() -> Check:
    from importlib.util import find_spec

    present = [name for name in ("av", "decord", "torchcodec") if find_spec(name) is not None]
    cost = "video tasks (mvbench) cannot be read; images are not affected"
    found = ", ".join(present) or "none of av, decord, torchcodec"
    return Check("video backends", found, bool(present), False, cost, "pip install av")


def _disk() -> Iterator[Check]:
    """Free space where results and downloads go."""
    import os
    import shutil

    from rcb_lmms.resources import cache_dir

    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    places = {"disk, here": Path.cwd(), "disk, rcb cache": cache_dir(), "disk, models": hub}
    for name, place in places.items():
        existing = next(parent for parent in (place, *place.parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        yield Check(
            name,
            f"{free / 2**30:.0f} GiB free at {place}",
            free >= LOW_DISK_BYTES,
            cost="a 7B checkpoint takes 14 GiB and its benchmarks some more; the laboratory needs 0.1 GiB",
            mend="free some space, or set HF_HOME (checkpoints, data) and RCB_CACHE (codebooks) to a larger disk",
        )


def _cache() -> Check:
    import os

    from rcb_lmms.resources import cache_dir

    place = cache_dir()
    existing = next(parent for parent in (place, *place.parents) if parent.exists())
    good = existing.is_dir() and os.access(existing, os.W_OK)
    known = len(list((place / "calibration").glob("*/documents.json")))
    found = f"{place}, {known} calibration passes" if good else f"{place} cannot be written"
    cost = "runs with a calibrated budget and downloaded codebooks fail when they are stored"
    return Check("cache", found, good, False, cost, "export RCB_CACHE=/a/folder/that/can/be/written")


def _codebooks() -> Iterator[Check]:
    """Every known codebook: shipped, cached, or the command that gets it."""
    from rcb_lmms.codebook.cards import cards, local_file
    from rcb_lmms.errors import UserError

    try:
        known = cards()
    except UserError as error:
        yield Check("codebooks", f"{error.wanted}: {error.found}", False, True, "no rcb entry starts", error.next_step)
        return
    for card in known.values():
        name = f"codebook {card.id}"
        if (file := local_file(card)) is not None:
            yield Check(name, str(file))
        elif card.source is None:
            mend = f"rcb codebook build --model {card.model} --images DIR --out codebooks/{card.file}"
            yield Check(name, "not made yet", False, False, f"no rcb on {card.model}", mend)
        else:
            cost = f"downloaded on first use of codebook={card.id}; a machine without network needs it by hand"
            yield Check(name, "not here yet", False, False, cost, card.source.by_hand)


def _laboratory() -> Check:
    from rcb_lmms.errors import UserError
    from rcb_lmms.lab.checkpoint import lab_checkpoint

    try:
        return Check("laboratory", f"checkpoint at {lab_checkpoint()}")
    except UserError as error:
        return Check("laboratory", error.found, False, False, "no quickstart, and no pretrained=lab", error.next_step)
