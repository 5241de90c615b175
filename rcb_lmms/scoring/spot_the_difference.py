"""Spot the difference: one image that shows two pictures, and what the answer says of their known differences.

The paper shows examples and scores none (9.3.2). Here a pair may come with its differences, each a text such as
`red circle|blue circle`: the words of one of its alternatives have to stand in one point of the answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rcb_lmms.scoring.estimates import Term, score
from rcb_lmms.scoring.schema import IMAGE, TEXTS, check_columns

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

SOURCE = "spot_the_difference"
PROMPT = (
    "The user is playing a spot-the-difference game. The provided image displays two pictures arranged either "
    "vertically or horizontally. Please help the user identify all the differences between the two images. Please "
    "provide accurate answers in a bullet list format."
)
GAP_PX = 8
_BULLET = re.compile(r"^\s*(?:[-*•–]|\d+[.)])\s*")


def check(dataset: Dataset) -> Dataset:
    """The data set, if it can be asked: images `first` and `second`, and perhaps lists of `differences`."""
    known = {"differences": TEXTS} if "differences" in dataset.features else {}
    check_columns(dataset, SOURCE, {"first": IMAGE, "second": IMAGE, **known})
    # lmms-eval counts documents by their columns other than images.
    return dataset if known else dataset.add_column("pair", list(range(len(dataset))))


def visual(doc: Mapping[str, Any]) -> list[Image]:
    """Both pictures as one image: side by side, or one below the other where they are wider than high."""
    return [joined(doc["first"], doc["second"])]


def joined(first: Image, second: Image) -> Image:
    """Two pictures on white with a gap; the second one is brought to the size of the first along their border."""
    from PIL import Image as pil

    first, second = first.convert("RGB"), second.convert("RGB")
    below = first.width > first.height
    if below:
        second = second.resize((first.width, max(1, round(second.height * first.width / second.width))))
        size, place = (first.width, first.height + GAP_PX + second.height), (0, first.height + GAP_PX)
    else:
        second = second.resize((max(1, round(second.width * first.height / second.height)), first.height))
        size, place = (first.width + GAP_PX + second.width, first.height), (first.width + GAP_PX, 0)
    both = pil.new("RGB", size, "white")
    both.paste(first, (0, 0))
    both.paste(second, place)
    return both


def text(doc: Mapping[str, Any]) -> str:
    """The paper's prompt, which is the same for every pair."""
    return PROMPT


def target(doc: Mapping[str, Any]) -> str:
    """The known differences, a line each."""
    return "\n".join(_differences(doc))


def process(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, dict[str, Any]]:
    """One pair's row: how many known differences some point names, and how many points name one.

    A point is a line of a list, or a sentence where there is no list. A pair without known differences counts nowhere.
    """
    known = [[_words(option) for option in difference.split("|")] for difference in _differences(doc)]
    points = [_words(point) for point in points_of(results[0])]
    row = {
        "known": len(known),
        "found": sum(any(_names(point, difference) for point in points) for difference in known),
        "points": len(points) if known else 0,
        "right": sum(any(_names(point, difference) for difference in known) for point in points),
    }
    return {"rcb_spot_found": row, "rcb_spot_right": row}


def points_of(answer: str) -> list[str]:
    """The points of an answer: its bulleted or numbered lines, or else its sentences."""
    lines = [line for line in answer.splitlines() if line.strip()]
    bullets = [_BULLET.sub("", line) for line in lines if _BULLET.match(line)]
    return bullets or [part for line in lines for part in re.split(r"(?<=[.!?;])\s+", line) if part.strip()]


def found(rows: Sequence[Mapping[str, Any]]) -> float | str:
    """Share of the known differences that answers name."""
    return score(Term(row["found"], row["known"], str(number)) for number, row in enumerate(rows) if row["known"])


def right(rows: Sequence[Mapping[str, Any]]) -> float | str:
    """Share of the answers' points that name a known difference."""
    return score(Term(row["right"], row["points"], str(number)) for number, row in enumerate(rows) if row["known"])


def _differences(doc: Mapping[str, Any]) -> list[str]:
    return list(doc.get("differences") or [])


def _names(point: set[str], difference: Sequence[set[str]]) -> bool:
    return any(option and option <= point for option in difference)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))
