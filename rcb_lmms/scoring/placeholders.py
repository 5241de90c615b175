"""Where the images of a question stand in its text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

PLACEHOLDER = "<image>"


def count_images(dataset: Dataset, column: str) -> Dataset:
    """The data set with `image_count`, for lmms-eval also asks for the text of documents without their media."""
    import pyarrow.compute

    lengths = pyarrow.compute.list_value_length(dataset.data.column(column)).to_pylist()
    return dataset.add_column("image_count", lengths)


def place_all(text: str, images: int, mark: str = PLACEHOLDER) -> str:
    """`text` with a placeholder for each of the images: those it has none for stand in front of it, each as `mark`."""
    return mark * max(0, images - text.count(PLACEHOLDER)) + text
