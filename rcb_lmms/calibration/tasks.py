"""Calibration on benchmarks: lmms-eval's tasks in, one file of thresholds out."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcb_lmms.calibration.matching import Baseline, default_out, match_benchmark, match_globally, parse_baselines
from rcb_lmms.errors import UserError
from rcb_lmms.files import write_atomic
from rcb_lmms.resources import source_version

if TYPE_CHECKING:
    from rcb_lmms.calibration.passes import TaskScores
    from rcb_lmms.engine.encoding import ImageEncoder
    from rcb_lmms.pruners.rcb import RCB


def calibrate_tasks(
    pretrained: str,
    tasks: Sequence[str],
    match: str,
    *,
    codebook: str | None = None,
    holdout: float | None = None,
    out: Path | None = None,
    per: str = "view",
    device: str | None = None,
    task_manager: Any = None,
    **loading: Any,
) -> tuple[Path, dict[str, Any]]:
    """One vision-only pass per task, and RCB's threshold for each baseline's budget on each benchmark.

    Under torchrun the processes share the passes, and the first one writes the file. A pass that was killed continues
    behind its last batch, and a finished one is not repeated: other budgets then cost seconds.

    Args:
        pretrained: `lab`, a folder, or a Hugging Face id.
        tasks: names of lmms-eval tasks and groups. A group of tasks is one benchmark; of a group that holds groups,
            every member is one.
        match: baselines, separated by commas (`Baseline.parse`).
        codebook: file or id; by default the model's.
        holdout: share of the images that is not calibrated on, but measured with what was calibrated on the others.
        out: the YAML file.
        per: `view` or `image`: what budgets are spent on.
        device: torch device; by default a GPU for each process, if there are any.
        task_manager: an lmms-eval `TaskManager` to use instead of one's own.
        loading: further arguments of `load_family`.

    Returns:
        The file, and what was written to it (on the first process).

    Raises:
        UserError: an unknown task, baseline or option, a missing codebook, a task without readable images, a budget
            that the images cannot meet.
    """
    from rcb_lmms.calibration.passes import BATCH_FRAMES
    from rcb_lmms.engine.encoding import ImageEncoder
    from rcb_lmms.errors import choose
    from rcb_lmms.families import default_codebook, family_of, load_family
    from rcb_lmms.models import entry_id
    from rcb_lmms.models.processes import join_processes
    from rcb_lmms.pruners import make_pruner
    from rcb_lmms.pruners.views import PER
    from rcb_lmms.runs import make_task_manager

    baselines = parse_baselines(match)
    choose("per", per, PER)
    kind = family_of(pretrained)
    _check_tower(kind, baselines)
    method = make_pruner("rcb", codebook=codebook or default_codebook(kind, pretrained))
    benchmarks = load_benchmarks(tasks, task_manager or make_task_manager(entry_id(kind, "rcb")))
    rank, size = join_processes()
    family = load_family(pretrained, device=device or _own_device(rank, size), **loading)
    method.codebook.check_width(family.width, pretrained)
    needs = method.needs.union(*(baseline.pruner.needs for baseline in _measured(baselines)))
    encoder = ImageEncoder(family, needs, batch_size=BATCH_FRAMES, store_bytes=0, per=per)
    out = out or default_out(pretrained)
    # One process writes the record, and only that one need read every byte of the weights for it.
    setting = describe(encoder, method) if rank == 0 else {}
    record = {"made_by": source_version(), "setting": setting, "holdout": holdout}
    found = _records(encoder, method, benchmarks, baselines, holdout)
    record["benchmarks"] = {}
    images = {}
    for name, own, fitted_to in found:
        if rank == 0:
            record["benchmarks"][name], images[name] = own, fitted_to
            _write(out, record)
    if rank == 0:
        record["global"] = match_globally(images, baselines, family.layers, method.min_keep)
        _write(out, record)
    return out, record


def _records(
    encoder: ImageEncoder,
    method: RCB,
    benchmarks: Mapping[str, Mapping[str, Any]],
    baselines: Sequence[Baseline],
    holdout: float | None,
) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Per benchmark its name, its record and the images that its thresholds were fitted to."""
    from rcb_lmms.calibration.passes import Documents, score_documents

    counted = {baseline.name: baseline.pruner for baseline in _measured(baselines)}
    identity = pass_identity(encoder, method, counted)
    for name, tasks in benchmarks.items():
        scores: dict[str, TaskScores] = {
            task: score_documents(encoder, Documents.of(task, loaded), method, counted, identity)
            for task, loaded in tasks.items()
        }
        yield name, *match_benchmark(scores, baselines, encoder.family.layers, method.min_keep, holdout)


def pass_identity(encoder: ImageEncoder, method: RCB, counted: Mapping[str, Any]) -> dict[str, Any]:
    """All that a pass's scores and counts depend on besides the documents."""
    family = encoder.family
    return {
        "pretrained": family.pretrained,
        "fingerprint": family.fingerprint,
        "preprocess": family.preprocess,
        "dtype": str(family.dtype),
        "device": family.device.type,
        "split": getattr(family, "split", None),
        "max_frames_num": family.reader.max_frames,
        "video_backend": family.reader.backend,
        "per": encoder.per,
        "codebook_sha256": method.codebook.sha256,
        "variant": method.variant,
        "score_dtype": method.score_dtype,
        "counted": sorted(counted),
    }


def describe(encoder: ImageEncoder, method: RCB) -> dict[str, Any]:
    """The setting for which thresholds hold, as the file tells it."""
    from rcb_lmms.families.identity import weights_hash

    identity = pass_identity(encoder, method, {})
    identity.pop("counted")
    return {
        "family": encoder.family.name,
        **identity,
        "weights": weights_hash(encoder.family),
        "pack": getattr(encoder.family, "packing", None),
        "codebook": method.codebook.meta.get("id"),
        "layers": encoder.family.layers,
        "min_keep": method.min_keep,
    }


def load_benchmarks(names: Sequence[str], manager: Any) -> dict[str, dict[str, Any]]:
    """Loaded lmms-eval tasks of each benchmark, by name.

    Raises:
        UserError: an unknown name, or data that cannot be loaded.
    """
    from tenacity import RetryError

    from rcb_lmms.runs import unloadable

    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 5)
            raise UserError(
                wanted=f"the task {name}",
                found="no such task or group",
                allowed="names that lmms-eval knows, and rcb_*" + (f"; near: {', '.join(near)}" if near else ""),
                next_step="lmms_eval tasks list",
            )
    benchmarks: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            benchmarks |= _benchmarks(manager.load_task_or_group(name, task_type="chat"))
        except (OSError, ValueError, RetryError) as error:  # what `datasets` and the hub raise for absent data
            raise unloadable(name, error) from error
    return benchmarks


def _benchmarks(loaded: Mapping[Any, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for key, value in loaded.items():
        if not isinstance(value, dict):
            found[key] = {key: value}
        elif any(isinstance(member, dict) for member in value.values()):
            found |= _benchmarks(value)
        else:
            found[key.group_name] = value
    return found


def _measured(baselines: Sequence[Baseline]) -> list[Baseline]:
    return [baseline for baseline in baselines if baseline.pruner is not None]


def _check_tower(family: str, baselines: Sequence[Baseline]) -> None:
    """Refuse, before anything is loaded, to measure a baseline that the family's tower cannot serve."""
    from rcb_lmms.models.arguments import supports

    for baseline in _measured(baselines):
        if not supports(family, baseline.method):
            raise UserError(
                wanted=f"match={baseline.name} with {family}",
                found="a vision tower without CLS token, on which this baseline is not defined",
                allowed="baselines with a number of tokens",
                next_step=f"--match {baseline.name}:64, fastv:rank=64 or random:64",
            )


def _own_device(rank: int, size: int) -> str | None:
    import torch

    return f"cuda:{rank % torch.cuda.device_count()}" if size > 1 and torch.cuda.is_available() else None


def _write(out: Path, record: dict[str, Any]) -> None:
    import yaml

    write_atomic(out, "# Written by `rcb calibrate --tasks`.\n" + yaml.safe_dump(record, sort_keys=False, width=120))
