"""The images that the caption tasks ask about: columns, domains, Karpathy's split; and what will not be scored."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rcb_lmms.errors import UserError, leave_with
from rcb_lmms.scoring.java import java_banner
from rcb_lmms.scoring.schema import IMAGE, INTEGER, TEXT, TEXTS, check_columns, check_values
from rcb_lmms.scoring.spice import spice_jars

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

NOCAPS_ANNOTATIONS = "RCB_NOCAPS_ANNOTATIONS"
FLICKR30K_SPLITS = "RCB_FLICKR30K_SPLITS"
# What the authors call these files; laboratory data have theirs beside the data.
NOCAPS_FILE, FLICKR30K_FILE = "nocaps_val_4500_captions.json", "dataset_flickr30k.json"
DOMAINS = ("in-domain", "near-domain", "out-domain")


def nocaps_docs(docs: Dataset) -> Dataset:
    """NoCaps with a `domain` column where the domains are known; tells beforehand what cannot be scored.

    The data set on the hub has no domains. They are taken from a `domain` column if there is one, else from the file
    `nocaps_val_4500_captions.json` of the benchmark's authors, if `RCB_NOCAPS_ANNOTATIONS` names it or it lies in the
    current folder; else the overall scores are the only ones, and `rcb captions` adds the others once it is named.

    Raises:
        UserError: columns are missing or of another type, or the file does not have the images.
    """
    columns = {"image": IMAGE, "image_id": INTEGER, "annotations_captions": TEXTS}
    check_columns(docs, "lmms-lab-encoder/NoCaps", columns)
    with leave_with():
        _check_references(docs["annotations_captions"])
        announce_blanks()
        if "domain" in docs.column_names:
            check_values("lmms-lab-encoder/NoCaps", "domain", docs["domain"], DOMAINS)
            return docs
        if not _authors_file(NOCAPS_ANNOTATIONS, NOCAPS_FILE):
            say(f"NoCaps: overall scores only; {NOCAPS_ANNOTATIONS}={NOCAPS_FILE} gives the domains'")
            return docs
        return docs.add_column("domain", [nocaps_domain(image) for image in docs["image_id"]])


def flickr_docs(docs: Dataset) -> Dataset:
    """All of Flickr30k; tells beforehand what cannot be scored.

    Raises:
        UserError: columns are missing or of another type.
    """
    check_columns(docs, "lmms-lab-encoder/flickr30k", {"image": IMAGE, "img_id": TEXT, "caption": TEXTS})
    with leave_with():
        _check_references(docs["caption"])
        announce_blanks()
    return docs


def karpathy_docs(docs: Dataset) -> Dataset:
    """The 1000 images of Karpathy's test split of Flickr30k.

    Taken from a `split` column if there is one; the data set on the hub has none, so that `RCB_FLICKR30K_SPLITS` must
    name `dataset_flickr30k.json` of Karpathy's archive, whose file names are those of the column `filename`, or that
    file must lie in the current folder.

    Raises:
        UserError: neither, or images of the split are not in the data set.
    """
    docs = flickr_docs(docs)
    if "split" in docs.column_names:
        return docs.select([index for index, split in enumerate(docs["split"]) if split == "test"])
    check_columns(docs, "lmms-lab-encoder/flickr30k", {"filename": TEXT})
    with leave_with():
        wanted = _karpathy_files()
        chosen = [index for index, name in enumerate(docs["filename"]) if name in wanted]
        if len(chosen) != len(wanted):
            raise UserError(
                wanted=f"{len(wanted)} images of Karpathy's test split",
                found=f"{len(chosen)} of them in the data set",
                allowed="the whole Flickr30k",
                next_step="remove the data set from the cache of Hugging Face and download it again",
            )
        return docs.select(chosen)


def dc100_docs(docs: Dataset) -> Dataset:
    """DC100-EN, held against the columns that are read.

    Raises:
        UserError: columns are missing or of another type.
    """
    check_columns(docs, "lmms-lab-encoder/DC100_EN", {"image": IMAGE, "question": TEXT, "answer": TEXT})
    return docs


def nocaps_domain(image_id: int) -> str:
    """Domain of a NoCaps image by the authors' file.

    Raises:
        UserError: no such file, a file of another kind, or an image that is not in it.
    """
    path = _authors_file(NOCAPS_ANNOTATIONS, NOCAPS_FILE)
    domains = _nocaps_domains(path)
    if int(image_id) not in domains:
        raise _foreign(NOCAPS_ANNOTATIONS, path, f"no image {image_id} in it", NOCAPS_FILE)
    return domains[int(image_id)]


def announce_blanks() -> None:
    """Say before generation starts which metrics will be left blank, and how to add them."""
    for kind, check in (("CIDEr and SPICE", java_banner), ("SPICE", spice_jars)):
        try:
            check()
        except UserError as error:
            say(f"{kind} will be left blank: {error.found}; {error.next_step}")
            say("captions are made all the same; rcb captions SAMPLES.jsonl scores them later")
            return


@functools.cache
def say(text: str) -> None:
    """Warn once, from the first process alone."""
    if int(os.environ.get("RANK", 0)) == 0:
        logger.warning(text)


def _check_references(references: Iterable[Sequence[str]]) -> None:
    if bare := [str(row) for row, own in enumerate(references) if not own]:
        raise UserError(
            wanted="reference captions for every image",
            found=f"none in row {', '.join(bare[:5])}",
            allowed="at least one",
            next_step="mend the local copy, or remove it so that it is downloaded again",
        )


def _authors_file(variable: str, name: str) -> str:
    """The path that a variable names, else that of the file in the current folder, else an empty string."""
    here = Path.cwd() / name
    return os.environ.get(variable) or (str(here) if here.is_file() else "")


@functools.cache
def _nocaps_domains(path: str) -> dict[int, str]:
    try:
        images = json.loads(Path(path).read_text(encoding="utf-8"))["images"]
        return {int(image["id"]): DOMAINS[DOMAINS.index(image["domain"])] for image in images}
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
        raise _foreign(NOCAPS_ANNOTATIONS, path, found, NOCAPS_FILE) from error


def _karpathy_files() -> set[str]:
    path = _authors_file(FLICKR30K_SPLITS, FLICKR30K_FILE)
    try:
        images = json.loads(Path(path).read_text(encoding="utf-8"))["images"]
        return {image["filename"] for image in images if image["split"] == "test"}
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {error}" if path else "the variable is not set"
        raise _foreign(FLICKR30K_SPLITS, path, found, FLICKR30K_FILE) from error


def _foreign(variable: str, path: str, found: str, name: str) -> UserError:
    return UserError(
        wanted=f"{name}, named by {variable}",
        found=f"{path}: {found}" if path else found,
        allowed="the file of the data set's authors, unchanged",
        next_step=f"export {variable}=/path/to/{name}",
    )
