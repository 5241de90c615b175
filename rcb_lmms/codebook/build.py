"""Making a codebook: experiments image by image, kept as they come, then thresholds over what was kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from rcb_lmms.codebook.artefact import Codebook
from rcb_lmms.codebook.probe import ImageStatistics, measure
from rcb_lmms.codebook.select import Candidates, candidates, common_clusters, describe_funnel, join
from rcb_lmms.codebook.settings import BuildSettings
from rcb_lmms.engine.processes import gather, join_processes
from rcb_lmms.errors import UserError
from rcb_lmms.files import sha256_of, write_atomic
from rcb_lmms.resources import source_version

if TYPE_CHECKING:
    from rcb_lmms.families.base import Family

MANIFEST = "manifest.json"


def build(
    family: Family,
    images: Sequence[str | Path],
    out: str | Path,
    settings: BuildSettings,
    *,
    batch_size: int = 16,
    workdir: str | Path | None = None,
    progress: bool = True,
    extend: Codebook | None = None,
) -> Codebook:
    """Make a codebook from images and save it.

    Each image's statistics are written when they are complete; after a kill the same command goes on behind the last
    one and ends with the same bytes. Several processes, as torchrun or accelerate start them, take turns at the images;
    all of them return the codebook, and the first one saves it.

    Args:
        family: the model the codebook is for.
        images: files, in the order that decides the order of rows.
        out: the `.safetensors` to write.
        settings: see `settings_for`.
        batch_size: prompts per forward pass.
        workdir: folder of the statistics; by default `<out>.stats`.
        progress: show a bar that counts images.
        extend: a codebook of the same model, whose prototypes come first in what is saved.

    Raises:
        UserError: an image that cannot be read, statistics of another build in the folder, or no prototypes.
    """
    stats = Path(workdir or f"{out}.stats")
    names = [Path(image) for image in images]
    rank, size = join_processes()
    _open_manifest(stats, _manifest(family, names, settings))
    share = range(len(names))[rank::size]
    todo = [number for number in share if not _shard(stats, number).exists()]
    hidden = rank > 0 or not progress
    for number in tqdm(todo, "probing", len(share), initial=len(share) - len(todo), unit="image", disable=hidden):
        view = family.encode([family.open(names[number], "base")], family.provides & {"cls_similarity"})[0][0]
        write_atomic(_shard(stats, number), measure(family, view, settings, batch_size).to_bytes())
    _exchange(stats, share, len(names))
    codebook = threshold(stats, settings, name=Path(out).stem)
    if extend is not None:
        codebook = extend.merge([codebook], name=Path(out).stem)
    if rank == 0:
        codebook.save(out)
    return codebook


def _exchange(stats: Path, share: Sequence[int], images: int) -> None:
    """Wait for all processes; what one of them cannot find, since they have no disk in common, the others send."""
    gather(None)
    unseen = set().union(*gather([number for number in range(images) if not _shard(stats, number).exists()]))
    for sent in gather({number: _shard(stats, number).read_bytes() for number in share if number in unseen}):
        for number, content in sent.items():
            write_atomic(_shard(stats, number), content)


def read_candidates(
    stats_dir: str | Path, settings: BuildSettings, limit: int | None = None
) -> tuple[dict[str, Any], list[Candidates]]:
    """What finished statistics were made from (`read_manifest`), and the candidates of each image; needs no model.

    Args:
        stats_dir: folder that `build` filled.
        settings: may differ from the build's in all but the fields of `BuildSettings.experiment`.
        limit: only the first images.

    Raises:
        UserError: images are missing, or the experiments were other ones.
    """
    stats = Path(stats_dir)
    manifest = read_manifest(stats)
    _check_same(manifest["experiment"], _resolved(settings, manifest["experiment"]), stats)
    manifest["images"] = manifest["images"][:limit]
    images = [entry["name"] for entry in manifest["images"]]
    if missing := [image for number, image in enumerate(images) if not _shard(stats, number).exists()]:
        raise UserError(
            wanted=f"statistics of {len(images)} images in {stats}",
            found=f"none yet of {len(missing)}, the first of them {missing[0]}",
            allowed="a finished build",
            next_step="repeat the build command without --rethreshold: it goes on where it stopped",
        )
    return manifest, [
        candidates(ImageStatistics.read(_shard(stats, number)), settings) for number in range(len(images))
    ]


def threshold(
    stats_dir: str | Path, settings: BuildSettings, name: str = "codebook", limit: int | None = None
) -> Codebook:
    """Choose prototypes from finished statistics; needs no model, so thresholds can be tried in seconds.

    Rows are in the order of the released codebooks: clusters by their first candidate, inside a cluster by image.

    Args:
        stats_dir: see `read_candidates`.
        settings: likewise.
        name: the codebook's id.
        limit: only the first images.

    Raises:
        UserError: images are missing, the experiments were other ones, or no token passes (with the counts).
    """
    manifest, found = read_candidates(stats_dir, settings, limit)
    images = [entry["name"] for entry in manifest["images"]]
    tokens, patches, numbers = join(found)
    clusters = common_clusters(tokens, numbers, settings) if len(tokens) else []
    counts = {"images": len(found)} | {key: sum(image.passed[key] for image in found) for key in found[0].passed}
    counts["images with candidates"] = len(numbers.unique())
    counts["prototypes"] = sum(map(len, clusters))
    if not clusters:
        raise UserError(
            wanted="redundant prototypes",
            found=describe_funnel(counts, settings),
            allowed="thresholds that some tokens pass, each and together",
            next_step="loosen the threshold that lets nothing through and repeat with --rethreshold (no model needed)",
        )
    rows = torch.cat(clusters)
    counts["images with prototypes"] = len(numbers[rows].unique())
    provenance = {
        "image": [images[number] for number in numbers[rows].tolist()],
        "patch": patches[rows].tolist(),
        "cluster": [number for number, members in enumerate(clusters) for _ in members],
    }
    return Codebook(tokens[rows], {"id": name, **_meta(manifest, settings), "counts": counts, "rows": provenance})


def read_manifest(stats: Path) -> dict[str, Any]:
    """What the statistics in a folder were made from.

    Raises:
        UserError: the folder holds none.
    """
    try:
        manifest = json.loads((stats / MANIFEST).read_text(encoding="utf-8"))
        if not (manifest["images"] and isinstance(manifest["experiment"], dict)):
            raise ValueError("no images, or no experiment")
        return manifest
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            wanted=f"the statistics of a codebook build in {stats}",
            found=f"no readable {MANIFEST}",
            allowed="the folder <out>.stats that `rcb codebook build` writes",
            next_step="build first, without --rethreshold",
        ) from error


def _meta(manifest: dict[str, Any], settings: BuildSettings) -> dict[str, Any]:
    facts = ("model", "revision", "family", "preprocess", "template", "dtype", "weights", "source")
    return {
        **{key: manifest[key] for key in facts},
        "layer": "projector output, base view",
        "images": len(manifest["images"]),
        "images_sha256": hashlib.sha256(json.dumps(manifest["images"]).encode()).hexdigest(),
        "preset": settings.preset,
        "experiment": manifest["experiment"],
        "thresholds": settings.thresholds(),
    }


def _manifest(family: Family, images: list[Path], settings: BuildSettings) -> dict[str, Any]:
    if not images:
        raise UserError(
            wanted="images to build a codebook from",
            found="an empty list",
            allowed="image files; the paper uses 500 photographs",
            next_step="name a folder with images",
        )
    return {
        "model": family.pretrained,
        "revision": family.revision,
        "family": family.name,
        "preprocess": family.preprocess,
        "template": family.template,
        # Decides whether a newline stands behind what the experiments show.
        **({"pack": family.packing} if "pack" in family.options else {}),
        "dtype": str(family.pad_embedding.dtype).removeprefix("torch."),
        "weights": _fingerprint(family),
        "experiment": _resolved(settings, {"single_repeats": family.single_repeats}),
        "images": [{"name": path.stem, "sha256": _hash_image(path)} for path in images],
        "source": source_version(),
    }


def _shard(stats: Path, number: int) -> Path:
    return stats / f"{number:06d}.safetensors"


def _resolved(settings: BuildSettings, defaults: dict[str, Any]) -> dict[str, Any]:
    """The experiment with the family's own number of copies; `strict` is named only where it is asked for."""
    experiment = settings.experiment()
    experiment["single_repeats"] = experiment["single_repeats"] or defaults["single_repeats"]
    if not experiment["strict"]:
        del experiment["strict"]
    return experiment


def _hash_image(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise UserError(
            wanted=f"read {path}",
            found=error.strerror or str(error),
            allowed="image files that exist",
            next_step="remove it from the list, or restore the file",
        ) from error


def _fingerprint(family: Family) -> str:
    """Hash of the first values of every weight: a retrained checkpoint under the same name is another model."""
    digest = hashlib.sha256()
    for name, weight in sorted(family.model.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _open_manifest(stats: Path, wanted: dict[str, Any]) -> None:
    if (stats / MANIFEST).exists():
        found = read_manifest(stats)
        _check_same(_flat(found), _flat(json.loads(json.dumps(wanted))), stats)
    else:
        write_atomic(stats / MANIFEST, json.dumps(wanted, indent=1) + "\n")


def _flat(manifest: dict[str, Any]) -> dict[str, Any]:
    # A resumed build may run a newer version of this package; the file keeps the version it began with.
    kept = {key: value for key, value in manifest.items() if key not in ("experiment", "source")}
    return kept | manifest["experiment"]


def _check_same(found: dict[str, Any], wanted: dict[str, Any], stats: Path) -> None:
    if differing := [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]:
        shown = ", ".join(f"{key} {_brief(found.get(key))} (now {_brief(wanted.get(key))})" for key in differing)
        raise UserError(
            wanted=f"continue with the statistics in {stats}",
            found=f"statistics of another build: {shown}",
            allowed="the same model, images and experiment; only thresholds and rules of choice may change",
            next_step="repeat the earlier settings, or build into another file",
        )


def _brief(value: Any) -> str:
    text = f"{len(value)} images" if isinstance(value, list) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
