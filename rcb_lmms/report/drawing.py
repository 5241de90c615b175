"""What pictures have in common: an image large enough to draw on, maps over it, and files in three formats."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageOps
from PIL.Image import Image

from rcb_lmms.families.places import painted
from rcb_lmms.files import write_atomic

# Small images are drawn larger, so that borders of patches stay sharp; no image is drawn larger than the other number.
SHORT_SIDE_PX, LONG_SIDE_PX = 420, 1680
FORMATS = ("png", "svg", "pdf")
PANELS_IN_A_ROW = 3


def enlarged(image: Image, boxes: np.ndarray) -> tuple[Image, np.ndarray]:
    """An image at the size it is drawn in, and the boxes `(n, 4)` of its patches there."""
    most = LONG_SIDE_PX / max(image.size)
    if most < 1:
        width, height = (max(1, round(length * most)) for length in image.size)
        return image.resize((width, height)), boxes * np.tile([width / image.width, height / image.height], 2)
    factor = max(1, min(int(most), round(SHORT_SIDE_PX / min(image.size))))
    return image.resize((image.width * factor, image.height * factor), 0), boxes * factor


def panel_image(panel: Any, image: Any, caption: str = "", **options: Any) -> Any:
    """Show an image without axes, with a caption under it."""
    shown = panel.imshow(image, interpolation="antialiased", **options)
    panel.set_xticks([])
    panel.set_yticks([])
    panel.spines[:].set_visible(False)
    panel.set_xlabel(caption, fontsize=8, labelpad=3)
    return shown


def save_figure(figure: Any, out: Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write a figure as `out`, a path without ending, with each of the endings; equal figures give equal files."""
    import matplotlib

    fixed = {"png": {}, "svg": {"metadata": {"Date": None}}, "pdf": {"metadata": {"CreationDate": None}}}
    written = []
    with matplotlib.rc_context({"svg.hashsalt": "rcb_lmms", "svg.fonttype": "path"}):
        for ending in formats:
            buffer = io.BytesIO()
            figure.savefig(buffer, format=ending, dpi=160, **fixed[ending])
            written.append(write_atomic(out.with_name(f"{out.name}.{ending}"), buffer.getvalue()))
    return written


def drawable(text: str) -> str:
    """A text without control characters, for which no font has a picture."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def draw_maps(
    image: Image,
    boxes: np.ndarray,
    maps: Mapping[str, np.ndarray],
    out: Path,
    labels: Mapping[int, str] | None = None,
) -> list[Path]:
    """Write one figure: the image with outlined tokens, then one map over it for each quantity.

    Args:
        image: the original.
        boxes: `(n, 4)` of its tokens.
        maps: title -> `(n,)` values, NaN for tokens without one; each map has a scale of its own.
        out: path without ending.
        labels: token -> text, drawn on the first panel.
    """
    from matplotlib.figure import Figure

    shown, places = enlarged(image, boxes)
    rows, columns = -(-(1 + len(maps)) // PANELS_IN_A_ROW), PANELS_IN_A_ROW
    height = 2.9 * max(0.5, min(1.5, image.height / image.width)) + 0.35
    figure = Figure(figsize=(2.9 * columns + 0.8, height * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    panel_image(panels[0], shown)
    panels[0].set_title("image", fontsize=9)
    _label(panels[0], places, labels or {})
    grey = np.asarray(ImageOps.grayscale(shown)) / 255
    for panel, (title, values) in zip(panels[1:], maps.items(), strict=False):
        panel_image(panel, 0.5 + 0.5 * grey, cmap="gray", vmin=0, vmax=1)
        over = panel_image(panel, painted(shown.size, places, values), cmap="viridis", alpha=0.75)
        panel.set_title(title, fontsize=9)
        scale = figure.colorbar(over, ax=panel, shrink=0.8)
        scale.ax.tick_params(labelsize=7)
        scale.ax.yaxis.get_offset_text().set_fontsize(7)
    for panel in panels[1 + len(maps) :]:
        panel.set_visible(False)
    return save_figure(figure, out)


def _label(panel: Any, boxes: np.ndarray, labels: Mapping[int, str]) -> None:
    for token, text in labels.items():
        left, top, right, bottom = boxes[token]
        # White within black is seen on any background.
        for colour, width in (("black", 2.4), ("white", 1.0)):
            panel.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color=colour, lw=width)
        panel.annotate(
            drawable(text),
            ((left + right) / 2, bottom),
            (0, -2),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=6,
            bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.6},
        )
