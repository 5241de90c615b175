"""Checks of a data set when its task is loaded, so that a wrong file is known before anything is generated."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from rcb_lmms.errors import UserError, leave_with

if TYPE_CHECKING:
    from datasets import Dataset

TEXT, TEXTS, INTEGER, IMAGE, IMAGES = "text", "list of texts", "integer", "image", "list of images"


def check_columns(dataset: Dataset, source: str, columns: Mapping[str, str]) -> None:
    """Hold a split against the columns that a task reads.

    Args:
        dataset: as loaded, nothing decoded.
        source: its name on the hub, which is also the local folder that is preferred to it.
        columns: name -> kind, one of this module's constants.

    Raises:
        UserError: no rows, a missing column, or one of another type.
    """
    if not len(dataset):
        refuse(source, "a split with rows", "no rows")
    if missing := sorted(set(columns) - set(dataset.features)):
        found = f"no {', '.join(missing)}; there are: {', '.join(dataset.features)}"
        refuse(source, f"columns {', '.join(columns)}", found)
    for name, kind in columns.items():
        if (actual := _kind(dataset.features[name])) != kind:
            refuse(source, f"column {name} as {kind}", f"{name} is {actual}")


def check_values(source: str, name: str, values: Iterable[Any], allowed: Collection[Any]) -> None:
    """Hold a column's values against those that can be scored.

    Raises:
        UserError: a row with another value; the first is named.
    """
    for number, value in enumerate(values):
        if value not in allowed:
            shown = ", ".join(str(option) for option in allowed)
            refuse(source, f"column {name} with the values {shown}", f"row {number} has {value!r}")


def refuse(source: str, wanted: str, found: str) -> NoReturn:
    """Say what is wrong with a data set."""
    with leave_with():
        raise UserError(
            wanted=f"{source} with {wanted}",
            found=found,
            allowed="the data set as its authors publish it, or a local folder of that name in the same columns",
            next_step=f"remove or mend the local folder {source}, or: hf download {source} --repo-type dataset",
        )


def _kind(feature: Any) -> str:
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    if inner is not None:
        return {TEXT: TEXTS, IMAGE: IMAGES}.get(_kind(inner), f"a list of {inner}")
    if type(feature).__name__ == "Image":
        return IMAGE
    dtype = getattr(feature, "dtype", "")
    if dtype in ("string", "large_string"):
        return TEXT
    return INTEGER if dtype.startswith(("int", "uint")) else str(feature)
