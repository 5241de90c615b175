"""Data sets as `datasets` finds them in a folder: parquet files, and the card that names them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rcb_lmms.files import write_atomic
from rcb_lmms.lab.scenes import Scene

TEXT, IMAGE = "string", "image"


def columns(names: Sequence[str], kind: str = TEXT) -> dict[str, str]:
    """Columns of one kind, for the schema of `write_configurations`."""
    return dict.fromkeys(names, kind)


def png(scene: Scene) -> dict[str, Any]:
    """A scene as an image column has it."""
    buffer = io.BytesIO()
    scene.image().save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_configurations(
    folder: Path, configurations: dict[str, dict[str, list[dict]]], schema: dict[str, str | list[str]]
) -> None:
    """One parquet file per configuration and split, and the card by which `datasets` finds them.

    `schema` maps columns to types, a list of one type for lists.
    """
    from datasets import Dataset, Features, Image, List, Value

    def feature(kind):
        if isinstance(kind, list):
            return List(feature(kind[0]))
        return Image() if kind == IMAGE else Value(kind)

    features = Features({name: feature(kind) for name, kind in schema.items()})
    card = ["---", "configs:"]
    for name, splits in configurations.items():
        card += [f"- config_name: {name}", "  data_files:"]
        for split, rows in splits.items():
            buffer = io.BytesIO()
            Dataset.from_list(rows, features=features).to_parquet(buffer)
            # `datasets` keys its cache by names alone: without the digest another tree's rows would be served.
            path = f"{name}/{split}-{hashlib.sha256(buffer.getvalue()).hexdigest()[:12]}.parquet"
            for old in (folder / name).glob(f"{split}-*.parquet"):
                old.unlink()
            write_atomic(folder / path, buffer.getvalue())
            card += [f"  - split: {split}", f"    path: {path}"]
    write_atomic(folder / "README.md", "\n".join([*card, "---", ""]))
