"""The table of entries in `docs/entries.md`, made from the registry: `python -m rcb_lmms.models.table` writes it."""

from __future__ import annotations

from pathlib import Path

from rcb_lmms.errors import UserError, exit_on_user_error
from rcb_lmms.families import Family, family_class
from rcb_lmms.files import write_atomic
from rcb_lmms.models import ENTRIES, METHODS
from rcb_lmms.models.argument_types import budget_names
from rcb_lmms.models.arguments import substitutes, supports
from rcb_lmms.pruners import PRUNERS

BEGIN, END = "<!-- made by: python -m rcb_lmms.models.table -->", "<!-- end of the table -->"

COLUMNS = ("entry", "method", "budget", "tiles", "several images", "video", "note")


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
    exact = family in PRUNERS[pruner].official_options
    note = "counts are exact; `preset=paper` meets a mean" if exact else PRUNERS[pruner].summary
    if options := substitutes(family, pruner):
        note += " (ours: " + ", ".join(f"`{name}={value}`" for name, value in options.items()) + ")"
    return (*first, _budget(pruner, exact), *_media(family_class(family)), note)


def _budget(pruner: str, exact: bool) -> str:
    names = [f"`{name}`" for name in budget_names(pruner)]
    if not names:
        return "all tokens"
    # What decides is a property where an option of the method may change it: by default it fits a mean.
    if exact or PRUNERS[pruner].fits_mean is False:
        return ", ".join(names)
    threshold = ", or `threshold`" if "`threshold`" in names else ""
    return "mean " + ", ".join(name for name in names if name != "`threshold`") + threshold


def _media(family: type[Family]) -> tuple[str, str, str]:
    """What becomes of one image, of several, and of a video."""
    tiled = "split" in family.options
    several = "tiles each" if tiled and family.several == "image" else "one view each"
    frames = "frames as images" if family.open_video is Family.open_video else "pooled frames"
    return "yes" if tiled else "no", several, frames


def write(page: Path) -> None:
    """Put the table between the two marks of a page.

    Raises:
        UserError: there is no such file, or it lacks a mark.
    """
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    before, begin, rest = text.partition(BEGIN + "\n")
    _, end, after = rest.partition("\n" + END)
    if not begin or not end:
        raise UserError(
            wanted=f"the table of entries in {page}",
            found="no file" if not text else "no place for it",
            allowed=f"a file with the lines {BEGIN} and {END}",
            next_step="run the command in a checkout of this repository",
        )
    write_atomic(page, (before + begin + entries_table() + end + after).encode())


if __name__ == "__main__":
    with exit_on_user_error():
        write(Path(__file__).parents[2] / "docs" / "entries.md")
