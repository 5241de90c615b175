"""Several codebooks as one: a codebook is extended by further images without the images it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rcb_lmms.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from rcb_lmms.codebook.artefact import Codebook

# Facts that stay if all codebooks agree on them, and what is noted of each.
PART = ("id", "sha256", "images", "preset", "source")
SAME = ("family", "model", "revision", "weights", "dtype", "preprocess", "template", "layer")


def joined(books: Sequence[Codebook], name: str | None = None) -> tuple[Tensor, dict[str, Any]]:
    """All prototypes in the order of the codebooks, a row that an earlier one has left out, and their facts.

    Raises:
        UserError: see `Codebook.merge`.
    """
    import torch

    first = books[0]
    for other in books[1:]:
        other.check_width(first.width, str(first.meta.get("id", "the first codebook")))
        _check_same_model(first, other)
    wide = torch.float32 if any(book.prototypes.dtype == torch.float32 for book in books) else torch.float16
    seen: set[bytes] = set()
    kept = []
    for book in books:
        rows = [row.numpy().tobytes() for row in book.prototypes.to(wide)]
        kept.append([number for number, row in enumerate(rows) if row not in seen])
        seen.update(rows)
    parts = [
        {key: book.meta[key] for key in PART if key in book.meta} | {"prototypes": len(own)}
        for book, own in zip(books, kept, strict=True)
    ]
    images = [book.meta.get("images") for book in books]
    facts = {
        "id": name or first.meta.get("id"),
        **{key: first.meta[key] for key in SAME if all(_agree(first, book, key) for book in books)},
        "images": None if None in images else sum(images),
        "merged": parts,
        "rows": _rows(books, kept),
    }
    return torch.cat([book.prototypes[own].to(wide) for book, own in zip(books, kept, strict=True)]), facts


def _agree(one: Codebook, other: Codebook, key: str) -> bool:
    return key in one.meta and one.meta[key] == other.meta.get(key)


def _check_same_model(first: Codebook, other: Codebook) -> None:
    # The hash of the weights says more than a name, but is another one in another type.
    exact = _agree(first, other, "dtype") and all(book.meta.get("weights") for book in (first, other))
    mine, others = (book.meta.get("weights" if exact else "model") for book in (first, other))
    if mine and others and mine != others:
        raise UserError(
            wanted=f"{first.meta.get('id')} and {other.meta.get('id')} as one codebook",
            found=f"made with different models: {first.meta.get('model')} and {other.meta.get('model')}",
            allowed="codebooks of one checkpoint: another model's tokens live in another space",
            next_step="build the second one with the model of the first",
        )


def _rows(books: Sequence[Codebook], kept: Sequence[Sequence[int]]) -> dict[str, list[Any]]:
    """Provenance that all have, cluster numbers counted on, and the codebook each prototype is of."""
    names = [str(book.meta.get("id", number)) for number, book in enumerate(books)]
    rows = {"codebook": [name for name, own in zip(names, kept, strict=True) for _ in own]}
    for column in ("image", "patch", "cluster"):
        columns = [(book.meta.get("rows") or {}).get(column) for book in books]
        if None in columns:
            continue
        rows[column], offset = [], 0
        for entries, own in zip(columns, kept, strict=True):
            rows[column] += [entries[row] + offset if column == "cluster" else entries[row] for row in own]
            offset += 1 + max(entries) if column == "cluster" else 0
    return rows
