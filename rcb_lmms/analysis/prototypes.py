"""What a codebook is made of and what it reaches: the patches behind its prototypes, and its coverage of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image as pil
from PIL import ImageDraw
from PIL.Image import Image
from tqdm import tqdm

from rcb_lmms.analysis.images import Shown, open_shown
from rcb_lmms.codebook import Codebook
from rcb_lmms.codebook.artefact import unit_rows
from rcb_lmms.codebook.probe import window
from rcb_lmms.engine.session import Session
from rcb_lmms.errors import UserError
from rcb_lmms.report.drawing import panel_image, save_figure

COSINES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
CROP_PX = 96
MOST_CROPS = 12  # of a cluster


def coverage(session: Session, codebook: Codebook, images: Sequence[Path]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """How much of a data set's tokens a codebook resembles; the language model is not run.

    Returns:
        one row per cosine: share of tokens with a prototype at least so near, and of images with no such token; and
        facts: tokens, images, how many prototypes are the nearest one of some token, the largest cosine's quantiles.

    Raises:
        UserError: a codebook of another width.
    """
    codebook.check_family(session.family)
    prototypes = codebook.normalized(session.family.device)
    best, nearest = [], set()
    for image in tqdm(images, "coverage", unit="image"):
        tokens = unit_rows(open_shown(session, image).view.features.float())
        cosine, index = (tokens @ prototypes.T).max(-1)
        best.append(cosine.cpu().numpy())
        nearest.update(index.tolist())
    every = np.concatenate(best)
    rows = [
        {
            "cosine": cosine,
            "tokens": float((every >= cosine).mean()),
            "images_without": float(np.mean([(own < cosine).all() for own in best])),
        }
        for cosine in COSINES
    ]
    quantiles = dict(zip(("p10", "median", "p90"), np.quantile(every, (0.1, 0.5, 0.9)).tolist(), strict=True))
    facts = {"images": len(best), "tokens": len(every), "prototypes": len(codebook), "nearest": len(nearest)}
    return pd.DataFrame(rows), facts | {"largest_cosine": quantiles}


def gallery(
    session: Session, codebook: Codebook, images: Sequence[Path]
) -> list[tuple[int, list[tuple[str, int, Image]]]]:
    """Clusters of a codebook, the largest first, with crops of the patches behind some of their prototypes.

    A crop shows the 3 x 3 window around the patch, so that its context is seen; the patch itself has a frame.

    Args:
        session: of the model that the codebook is for.
        codebook: one that says where its prototypes are from.
        images: files among which those images are, by name.

    Returns:
        `(prototypes in the cluster, [(image, patch, crop)])`, crops evenly among its prototypes.

    Raises:
        UserError: the codebook has no provenance, or images are missing.
    """
    rows = codebook.meta.get("rows") or {}
    if not {"image", "patch", "cluster"} <= rows.keys():
        raise UserError(
            wanted="the patches behind the prototypes",
            found=f"{codebook.meta.get('id', 'a codebook')}, which does not say where its prototypes are from",
            allowed="codebooks that `rcb codebook build` made",
            next_step="build one: the released files name images and no patches",
        )
    files = {file.stem: file for file in images}
    clusters: dict[int, list[int]] = {}
    for number, cluster in enumerate(rows["cluster"]):
        clusters.setdefault(cluster, []).append(number)
    found, opened = [], {}
    for members in sorted(clusters.values(), key=len, reverse=True):
        step = max(1, len(members) // MOST_CROPS)
        crops = []
        for number in members[::step][:MOST_CROPS]:
            name, patch = rows["image"][number], rows["patch"][number]
            if name not in files:
                raise UserError(
                    wanted=f"the image {name}, which prototypes are from",
                    found=f"{len(files)} other images",
                    allowed="the folder of images that the codebook was made from",
                    next_step="--images FOLDER",
                )
            if name not in opened:
                opened[name] = open_shown(session, files[name])
            crops.append((name, patch, crop(opened[name], patch)))
        found.append((len(members), crops))
    return found


def crop(shown: Shown, patch: int) -> Image:
    """The 3 x 3 window around a patch, `CROP_PX` wide, with a white frame within a black one around the patch."""
    around = shown.boxes[window(patch, *shown.view.grid)]
    left, top = around[:, :2].min(0)
    right, bottom = around[:, 2:].max(0)
    height = max(1, round(CROP_PX * (bottom - top) / (right - left)))
    # Padding that a view shows lies outside the image; there this is black.
    box = (left, top, right, bottom)
    cut = shown.image.transform((CROP_PX, height), pil.Transform.EXTENT, box, pil.Resampling.BICUBIC)
    scale = CROP_PX / (right - left)
    frame = [(value - start) * scale for value, start in zip(shown.boxes[patch], (left, top) * 2, strict=True)]
    draw = ImageDraw.Draw(cut)
    draw.rectangle(frame, outline="black", width=3)
    draw.rectangle([frame[0] + 1, frame[1] + 1, frame[2] - 1, frame[3] - 1], outline="white", width=1)
    return cut


def draw_gallery(found: Sequence[tuple[int, Sequence[tuple[str, int, Image]]]], out: Path) -> list[Path]:
    """Write one figure: a row of crops for each cluster."""
    from matplotlib.figure import Figure

    columns = max(len(crops) for _, crops in found)
    figure = Figure(figsize=(0.85 * columns + 0.6, 1.05 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), columns, squeeze=False)
    for line, (count, crops) in zip(panels, found, strict=True):
        for panel in line[len(crops) :]:
            panel.set_visible(False)
        for panel, (name, patch, image) in zip(line, crops, strict=False):
            panel_image(panel, image)
            panel.set_xlabel(f"{name[-9:]} #{patch}", fontsize=4, labelpad=1)
        line[0].set_ylabel(f"{count} prototypes", fontsize=6)
    return save_figure(figure, out)
