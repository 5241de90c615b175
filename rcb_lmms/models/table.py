"""The README's table of entries, made from the registry: `python -m rcb_lmms.models.table` prints it."""

from __future__ import annotations

from rcb_lmms.families import Family, family_class
from rcb_lmms.models import ENTRIES, METHODS
from rcb_lmms.models.arguments import OFFICIAL_VARIANTS, budget_names, supports

BEGIN, END = "<!-- made by: python -m rcb_lmms.models.table -->", "<!-- end of the table -->"

COLUMNS = ("entry", "method", "budget", "tiles", "several images", "video", "note")

# How a method decides; the first two meet `keep`, `ratio` and `match` as a mean over the benchmark.
NOTES = {
    "rcb": "by the codebook, image by image",
    "prumerge": "by CLS attention, image by image",
    "prumerge_plus": "by CLS attention and a grid",
    "fastv": "inside the LLM, by the question",
    "random": "by `seed`",
    "stride": "evenly spaced",
    "downsample": "a smaller image, whose tokens all stay",
    "none": "unpruned",
}


def entries_table() -> str:
    """A Markdown table: one row per entry, refused ones included."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    rows += [_row(family, method) for family, methods in ENTRIES.items() for method in methods]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _row(family: str, method: str) -> tuple[str, ...]:
    pruner = METHODS[method]
    first = (f"`{family}_{method}`", f"`{pruner}`")
    if not supports(family, pruner):
        return (*first, "–", "–", "–", "–", "refused: the vision tower has no CLS token")
    exact = pruner == "rcb" and family in OFFICIAL_VARIANTS
    note = "counts are exact; `preset=paper` meets a mean" if exact else NOTES[pruner]
    return (*first, _budget(pruner, exact), *_media(family_class(family)), note)


def _budget(pruner: str, exact: bool) -> str:
    names = [f"`{name}`" for name in budget_names(pruner)]
    if not names:
        return "all tokens"
    if pruner not in ("rcb", "prumerge") or exact:
        return ", ".join(names)
    # A threshold is what it is; all others are met as a mean.
    return "mean " + ", ".join(name for name in names if name != "`threshold`") + ", or `threshold`" * (pruner == "rcb")


def _media(family: type[Family]) -> tuple[str, str, str]:
    """What becomes of one image, of several, and of a video."""
    tiled = "split" in family.options
    several = "tiles each" if tiled and family.several == "image" else "one view each"
    frames = "frames as images" if family.open_video is Family.open_video else "pooled frames"
    return "yes" if tiled else "no", several, frames


if __name__ == "__main__":
    print(entries_table())
