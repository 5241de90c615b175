"""Images as the analyses see them: the base view, its tokens, and where they lie on the original."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from rcb_lmms.engine.session import Session
from rcb_lmms.errors import UserError
from rcb_lmms.pruners.base import VisualTokens


@dataclass(frozen=True)
class Shown:
    """An image in its base view, the only one that the paper's analyses look at (7).

    Attributes:
        name: the file's name without its ending.
        image: the original.
        view: its tokens, with the similarity to the CLS token where the tower has one.
        boxes: `(n, 4)` where they lie on the original, in pixels.
    """

    name: str
    image: Image
    view: VisualTokens
    boxes: np.ndarray

    @property
    def cls_similarity(self) -> np.ndarray | None:
        """`(n,)` cosine of each patch to CLS in the layer before the projector; `None` for a tower without CLS."""
        similarity = self.view.cls_similarity
        return None if similarity is None else similarity.float().cpu().numpy()


def open_shown(session: Session, image: Any) -> Shown:
    """Encode an image's base view.

    Raises:
        UserError: the image cannot be read.
    """
    family = session.family
    session.encoder.add_needs(family.provides & {"cls_similarity"})
    visual = family.open(image, "base")
    ((view,),) = session.encoder.views([visual])
    name = Path(image).stem if isinstance(image, (str, Path)) else "image"
    return Shown(name, visual.image, view, family.places(visual)[0].boxes(view.grid))


def parse_tokens(text: str, count: int) -> list[int]:
    """Raster indices from `all`, or from numbers and ranges such as `0,17,100-143`; ascending, each once.

    Raises:
        UserError: something else, or a token that the view does not have.
    """
    if text == "all":
        return list(range(count))
    chosen: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise _refused(text, count)
        chosen.update(range(int(first), int(last or first) + 1))
    if not chosen or max(chosen) >= count:
        raise _refused(text, count)
    return sorted(chosen)


def _refused(text: str, count: int) -> UserError:
    return UserError(
        wanted=f"--tokens {text}",
        found=f"a view of {count} tokens",
        allowed=f"all, or numbers and ranges from 0 to {count - 1}, row by row from the top left",
        next_step="--tokens 0,5,10-20",
    )
