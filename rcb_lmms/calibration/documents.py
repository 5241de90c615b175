"""Documents that show images and videos: opened ahead of those who use them, and counted."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from rcb_lmms.engine.processes import gather, rank_and_size
from rcb_lmms.engine.questions import READERS, ahead
from rcb_lmms.families.images import whole_images_only

if TYPE_CHECKING:
    from rcb_lmms.families.base import Family
    from rcb_lmms.families.images import Visual

Item = TypeVar("Item")
Opened = tuple[int, "list[Visual] | None", str]


@dataclass(frozen=True)
class Documents:
    """The documents of a benchmark, each of which shows images and videos.

    Attributes:
        name: of the benchmark.
        numbers: of the documents.
        media: opens what one of them shows, by its number.
        data: names the data set, where it has a name that changes with its content.
    """

    name: str
    numbers: Sequence[int]
    media: Callable[[Family, int], list[Visual]]
    data: str | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def open(self, family: Family, number: int) -> Opened:
        """A document's number with its images and videos, or with what is wrong with them at the second attempt too."""
        error = ""
        for _ in range(2):
            try:
                visuals = self.media(family, number)
                for visual in visuals:
                    _ = visual.key  # hashed here, beside the tower's work
            except Exception as caught:  # whatever a damaged document raises, it alone is left out
                error = " ".join(f"{type(caught).__name__}: {caught}".split())
            else:
                return number, visuals, ""
        return number, None, error


def survey(family: Family, documents: Documents) -> tuple[Counter[str], dict[int, str]]:
    """How often a question shows each image, by content key, and what is wrong with documents that cannot be read.

    Every process opens its share, and all get the whole.
    """
    rank, size = rank_and_size()
    asked: Counter[str] = Counter()
    errors: dict[int, str] = {}
    with whole_images_only():
        own = ahead(lambda number: documents.open(family, number), documents.numbers[rank::size], READERS)
        for number, visuals, error in shown(own, documents.numbers[rank::size], f"reading {documents.name}"):
            asked.update(visual.key for visual in visuals or ())
            if visuals is None:
                errors[number] = error
    every = gather((asked, errors))
    return sum((own for own, _ in every), Counter()), {n: text for _, own in every for n, text in own.items()}


def shown(items: Iterable[Item], every: Sequence[Any], what: str) -> Iterable[Item]:
    """The same items, with a bar on a terminal, and one line elsewhere."""
    if rank_and_size()[0] or not len(every):
        return items
    if not sys.stderr.isatty():
        print(f"calibration: {what}, {len(every)} documents", file=sys.stderr, flush=True)
        return items
    return tqdm(items, f"calibration: {what}", total=len(every), unit="document")
