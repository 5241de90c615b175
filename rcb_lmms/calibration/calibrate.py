"""`rcb calibrate`: thresholds for baselines' budgets on benchmarks, and for one budget on a folder of images."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcb_lmms.calibration.documents import Documents
from rcb_lmms.calibration.fitting import Calibration, fit, measure, with_parameters
from rcb_lmms.calibration.passes import BATCH_FRAMES, score_pass
from rcb_lmms.calibration.scores import Scores, data_hash, joined
from rcb_lmms.calibration.targets import CONVENTIONS, Target
from rcb_lmms.calibration.threshold_file import BenchmarkRecord, Both, Row, ThresholdFile, setting_of
from rcb_lmms.engine.encoding import ImageEncoder
from rcb_lmms.engine.processes import join_processes, own_device
from rcb_lmms.errors import UserError, choose
from rcb_lmms.families import default_codebook, family_class, family_of, load_family
from rcb_lmms.pruners import make_pruner
from rcb_lmms.pruners.views import PER
from rcb_lmms.resources import source_version

if TYPE_CHECKING:
    from rcb_lmms.pruners.rcb import RCB

# The images of each task of a benchmark.
Tasks = Mapping[str, Documents]


def calibrate_tasks(
    pretrained: str,
    benchmarks: Mapping[str, Tasks],
    targets: Sequence[Target],
    *,
    codebook: str | None = None,
    holdout: float | None = None,
    out: Path | None = None,
    per: str = "view",
    device: str | None = None,
    allow_unreadable: bool = False,
    **loading: Any,
) -> tuple[Path, ThresholdFile]:
    """One vision-only pass per task, and RCB's threshold for each target on each benchmark.

    Under torchrun the processes share the passes, and the first one writes the file. A pass that was killed continues
    behind its last batch, and a finished one is not repeated: other budgets then cost seconds.

    Args:
        pretrained: `lab`, a folder, or a Hugging Face id.
        benchmarks: by name, each with one task or several.
        targets: to be met.
        codebook: file or id; by default the model's.
        holdout: share of the images that is not calibrated on, but measured with what was calibrated on the others.
        out: the YAML file.
        per: `view` or `image`: what budgets are spent on.
        device: torch device; by default a GPU for each process, if there are any.
        allow_unreadable: calibrate on the documents that can be read if some cannot.
        loading: further arguments of `load_family`.

    Returns:
        The file, and what the first process wrote to it.

    Raises:
        UserError: an unknown option, a missing codebook, documents that cannot be read, a budget that the images cannot
            meet.
    """
    choose("per", per, PER)
    kind = family_of(pretrained)
    check_tower(kind, targets)
    method = make_pruner("rcb", codebook=codebook or default_codebook(kind, pretrained))
    rank, _ = join_processes()
    encoder = _encoder(pretrained, method, targets, per, device or own_device(), loading)
    family = encoder.family
    setting = setting_of(encoder, method)
    if rank == 0:  # one process writes the record, and only that one need read every byte of the weights for it
        from rcb_lmms.families.identity import weights_hash

        setting["weights"] = weights_hash(family)
    file = ThresholdFile(made_by=source_version(), setting=setting, holdout=holdout, benchmarks={})
    out, fitted_to = out or default_out(pretrained), {}
    for name, tasks in benchmarks.items():
        scores = {task: _scored(encoder, method, targets, own, allow_unreadable) for task, own in tasks.items()}
        file.benchmarks[name], fitted_to[name] = benchmark_record(method, scores, targets, family.layers, holdout)
        if rank == 0:
            file.write(out)
    file.everywhere = match_globally(method, fitted_to, targets, family.layers)
    if rank == 0:
        file.write(out)
    return out, file


def calibrate_images(
    pretrained: str,
    paths: Sequence[Path],
    target: Target,
    *,
    codebook: str | None = None,
    per: str = "view",
    device: str | None = None,
    allow_unreadable: bool = False,
    **loading: Any,
) -> Calibration:
    """RCB's threshold for a mean over image files, each asked about once.

    Raises:
        UserError: an unreadable image, a missing codebook, or a budget the images cannot meet.
    """
    kind = family_of(pretrained)
    check_tower(kind, [target])
    method = make_pruner("rcb", codebook=codebook or default_codebook(kind, pretrained))
    encoder = _encoder(pretrained, method, [target], per, device, loading)
    names = [str(path.resolve()) for path in paths]
    documents = Documents("images", range(len(names)), lambda family, number: [family.open(names[number])])
    scores = _scored(encoder, method, [target], documents, allow_unreadable, reread=True)
    scores.weights[:] = 1  # the same picture in two files is one image
    return fit(method, scores, target.mean(scores, encoder.family.layers))[1]


def _encoder(
    pretrained: str, method: RCB, targets: Sequence[Target], per: str, device: str | None, loading: dict[str, Any]
) -> ImageEncoder:
    family = load_family(pretrained, device=device, **loading)
    method.codebook.check_family(family)
    needs = method.needs.union(*(own.measured.needs for own in targets if own.measured))
    return ImageEncoder(family, needs, batch_size=BATCH_FRAMES, store_bytes=0, per=per)


def _scored(
    encoder: ImageEncoder, method: RCB, targets: Sequence[Target], documents: Documents, allowed: bool, **reread: bool
) -> Scores:
    """The scores of a task.

    Raises:
        UserError: documents that cannot be read, if that is not allowed.
    """
    measured = {own.text: own.measured for own in targets if own.measured}
    scores = score_pass(encoder, method, measured, documents, **reread)
    if scores.errors and not allowed:
        number, error = next(iter(scores.errors.items()))
        raise UserError(
            wanted=f"every image of {documents.name}",
            found=f"{len(scores.errors)} of {scores.documents} documents that could not be read, twice each; document "
            f"{number}: {error}",
            allowed="documents that can all be read, since a mean over some of them is another mean",
            next_step="mend them and repeat the command, which reads only these again; or --allow-unreadable",
        )
    return scores


def check_tower(family: str, targets: Sequence[Target]) -> None:
    """Refuse, before anything is loaded, to measure a baseline that the family's tower cannot serve.

    Raises:
        UserError: naming it.
    """
    for target in targets:
        if target.measured and not target.measured.needs <= family_class(family).provides:
            raise UserError(
                wanted=f"match={target} with {family}",
                found="a vision tower without CLS token, on which this baseline is not defined",
                allowed="baselines with a number of tokens",
                next_step=f"match={target}:64, fastv:rank=64 or random:64",
            )


def held_out(keys: set[str], share: float) -> set[str]:
    """That share of the images, chosen by their content alone, so by everybody alike.

    Raises:
        UserError: one of the two parts would be empty.
    """
    order = sorted(keys, key=lambda key: hashlib.sha256(f"held out {key}".encode()).digest())
    chosen = set(order[: round(share * len(keys))])
    if not 0 < len(chosen) < len(keys):
        raise UserError(
            wanted=f"a share of {share:g} of the images held out",
            found=f"{len(keys)} different images",
            allowed="shares between 0 and 1 that leave images in both parts",
            next_step="--holdout 0.5",
        )
    return chosen


def benchmark_record(
    method: RCB, scores: Mapping[str, Scores], targets: Sequence[Target], layers: int, holdout: float | None
) -> tuple[BenchmarkRecord, Scores]:
    """The record of one benchmark of one or more tasks, and the images that its thresholds were fitted to.

    Raises:
        UserError: a target above what the images have, or too few images to hold some out.
    """
    every = joined(scores.values())
    keys = {image.key for image in every.images}
    apart = held_out(keys, holdout) if holdout is not None else set()
    images = every.subset(keys - apart)
    views = sum(image.views for image in every.images)
    rows = fits(method, images, targets, layers)
    if apart:
        _add_gaps(method, rows, every.subset(apart), targets, layers)
    record = BenchmarkRecord(
        data_hash=data_hash(sum((own.asked for own in scores.values()), Counter())),
        tasks={name: own.data_hash for name, own in scores.items()},
        documents=every.documents,
        unreadable=len(every.errors),
        images=len(keys),
        views=views,
        views_per_document=float(every.weights @ [image.views for image in every.images])
        / (every.documents - len(every.errors)),
        native=every.native,
        baselines=rows,
        held_out_images=len(apart) or None,
    )
    return record, images


def fits(method: RCB, scores: Scores, targets: Sequence[Target], layers: int) -> dict[str, Both]:
    """For each target, by each convention, the fitted threshold."""
    means = {target.text: target.by_convention(scores, layers) for target in targets}
    distinct = {mean for both in means.values() for mean in both.values()}
    rows = {mean: Row.of(fit(method, scores, mean)[1]) for mean in sorted(distinct)}
    return {
        name: Both(**{convention: rows[mean].model_copy() for convention, mean in both.items()})
        for name, both in means.items()
    }


def _add_gaps(method: RCB, records: Mapping[str, Both], scores: Scores, targets: Sequence[Target], layers: int) -> None:
    """Add what the thresholds achieve on held-out images, and by how much that misses what was calibrated."""
    for target in targets:
        for convention, mean in target.by_convention(scores, layers).items():
            row = getattr(records[target.text], convention)
            achieved = _achieved(method, row, scores)
            row.held_out = {
                "baseline": mean,
                "achieved": achieved,
                "gap": achieved - row.achieved,
                "gap_to_baseline": achieved - mean,
            }


def match_globally(
    method: RCB, benchmarks: Mapping[str, Scores], targets: Sequence[Target], layers: int
) -> dict[str, Both]:
    """One threshold per budget over all benchmarks, each of which counts the same whatever its size.

    Each record's `by_benchmark` says how many tokens that one threshold retains where.
    """
    records = fits(method, joined(scores.scaled() for scores in benchmarks.values()), targets, layers)
    for both in records.values():
        for convention in CONVENTIONS:
            row = getattr(both, convention)
            row.by_benchmark = {name: _achieved(method, row, scores) for name, scores in benchmarks.items()}
    return records


def _achieved(method: RCB, row: Row, scores: Scores) -> float:
    fitted = with_parameters(method, {"threshold": row.threshold, "ties": row.ties})
    return measure(fitted, scores, row.target).achieved


def default_out(pretrained: str) -> Path:
    """Where the thresholds of a model are written."""
    name = "".join(letter if letter.isalnum() or letter in "-._" else "_" for letter in Path(pretrained).name)
    return Path("eval_configs") / "thresholds" / f"{name}.yaml"
