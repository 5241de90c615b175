"""Which images a codebook is made from, in which order: a folder's names, a list of one's own, or Karpathy's split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rcb_lmms.errors import UserError
from rcb_lmms.files import no_file


def images_of(folder: Path | None, listing: Path | None, limit: int | None = None) -> list[Path]:
    """Image files in the order in which they are probed.

    Args:
        folder: where they lie; without `listing` all its images, by name.
        listing: a text file with a name a line, a JSON list of names, or the split of Karpathy's `dataset_coco.json`,
            whose training images (without `restval`) are taken in the order of the file, as released. Names are
            relative to `folder`, or to the listing's own.
        limit: only the first ones.

    Raises:
        UserError: no image, an unreadable list, or a listed image that is not there.
    """
    if listing is None and folder is None:
        raise UserError(
            wanted="images to build a codebook from",
            found="neither a folder nor a list",
            allowed="--images FOLDER, --list FILE, or both",
            next_step="rcb lab images --out scenes writes laboratory scenes; then --images scenes",
        )
    if listing is None:
        return find_images(folder)[:limit]
    home = folder or listing.parent
    found = [home / name for name in _names(listing, home)[:limit]]
    if missing := [str(path) for path in found if no_file(path)]:
        raise _unreadable(listing, f"{len(missing)} of its images are not there, the first is {missing[0]}")
    return found


def find_images(folder: Path) -> list[Path]:
    """Image files of a folder, by name.

    Raises:
        UserError: no such folder, or no image in it.
    """
    endings = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
    found = sorted(file for file in folder.glob("*") if file.suffix.lower() in endings) if folder.is_dir() else []
    if not found:
        raise UserError(
            wanted=f"images in {folder}",
            found="no image there" if folder.is_dir() else "no such folder",
            allowed="a folder of " + ", ".join(sorted(endings)),
            next_step="rcb lab data --out DIR writes laboratory scenes, or name a folder of photographs",
        )
    return found


def _names(listing: Path, home: Path) -> list[str]:
    if problem := no_file(listing):
        raise _unreadable(listing, problem)
    try:
        text = listing.read_text(encoding="utf-8")
        is_json = text.lstrip()[:1] in ("[", "{")
        names = json.loads(text) if is_json else [line.strip() for line in text.splitlines() if line.strip()]
        if isinstance(names, dict):
            names = [_karpathy(entry, home) for entry in names["images"] if entry["split"] == "train"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _unreadable(listing, f"{type(error).__name__}: {str(error)[:80]}") from error
    if not names or not all(isinstance(name, str) for name in names):
        raise _unreadable(listing, "no names")
    return names


def _karpathy(entry: dict[str, Any], home: Path) -> str:
    """COCO's images lie in a folder of their own, which may be the one that was named."""
    inside = Path(entry.get("filepath", ""), entry["filename"])
    return str(inside if (home / inside).is_file() else entry["filename"])


def _unreadable(listing: Path, found: str) -> UserError:
    return UserError(
        wanted=f"the images that {listing} lists",
        found=found,
        allowed="a name a line, a JSON list of names, or Karpathy's dataset_coco.json",
        next_step="correct the list, or name the images' folder with --images",
    )
