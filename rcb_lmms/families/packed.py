"""What packing leaves of images and prompts: rows of embeddings, where newlines stand among them, and their counts."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from rcb_lmms.pruners.tokens import Selection, VisualTokens


@dataclass(frozen=True)
class Prompt:
    """One prompt in embedding space.

    Attributes:
        embeds: `(s, d)`.
        spans: `(start, stop)` of each run of visual tokens, in order; newline embeddings stand between runs.
        native, retained: visual tokens before and after pruning, newlines not counted.
        newlines: newline embeddings.
        views: images, tiles and frames that were pruned each on its own.
        visuals: images and videos, one for each placeholder.
        prefix: rows up to the end of the last image: equal for all questions about the same images, to be shared by
            them.
        encoded: visual tokens of all views, with those that a packing cut off as padding.
        places: `(s,)` int64 position of each row in the unpruned prompt; `None` means `0` to `s - 1`.
        prefix_name: names the rows of `prefix`; `None` where no other prompt may share them.
        method_flops: of the method on its views.
    """

    embeds: Tensor
    spans: tuple[tuple[int, int], ...] = ()
    native: int = 0
    retained: int = 0
    newlines: int = 0
    views: int = 0
    visuals: int = 0
    prefix: int = 0
    encoded: int = 0
    places: Tensor | None = None
    prefix_name: Hashable = None
    method_flops: int = 0

    def __len__(self) -> int:
        return self.embeds.shape[0]

    @property
    def end(self) -> int:
        """The position of the first token of the answer."""
        return len(self) if self.places is None else int(self.places[-1]) + 1

    @property
    def head(self) -> Prompt:
        """Its `prefix` rows alone."""
        places = None if self.places is None else self.places[: self.prefix]
        return replace(self, embeds=self.embeds[: self.prefix], places=places)

    def spans_from(self, start: int) -> list[tuple[int, int]]:
        """The spans in a sequence in which the prompt begins at `start`."""
        return [(begin + start, end + start) for begin, end in self.spans]


@dataclass(frozen=True)
class Rows:
    """Packed rows `embeds (k, d)` of one placeholder, and which of them (ascending) are newline embeddings."""

    embeds: Tensor
    newlines: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def runs(self, start: int) -> list[tuple[int, int]]:
        """`(start, stop)` of the visual tokens between newlines, when the first row stands at `start`."""
        ends = [-1, *self.newlines, len(self)]
        return [(start + a + 1, start + b) for a, b in itertools.pairwise(ends) if b > a + 1]


@dataclass(frozen=True)
class PackedImage:
    """One image or video after pruning: its rows in packing order, its visual tokens before and after, its views.

    `encoded` are the visual tokens of its views; a packing that cuts padding off has fewer `native` ones. `kept` says
    for each view which tokens stayed, as `rcb_lmms.engine.ledger.pack_kept` writes it; it is empty if all did. `places`
    are the rows' positions `(k,)` among the `extent` rows that nothing pruned would have left. `method_flops` are those
    of choosing, and of what the method reads of the tower.
    """

    rows: Rows
    native: int
    retained: int
    views: int = 1
    encoded: int = 0
    kept: tuple[str, ...] = ()
    places: Tensor | None = None
    extent: int = 0
    method_flops: int = 0

    @property
    def embeds(self) -> Tensor:
        """All rows, newlines included, `(k, d)`."""
        return self.rows.embeds


def places_of(views: Sequence[VisualTokens], selections: Sequence[Selection], rows: Rows) -> tuple[Tensor | None, int]:
    """Where packed rows of pruned views would stand if nothing were pruned, `(k,)`, and how many rows there would be.

    A rewritten token stands where its method says, PruMerge's residual token and tokens of zeros at the end of their
    view. Newlines stand behind all views, as every packing of pruned views has them. There are no places for views that
    were encoded at a smaller size.
    """
    import torch

    if any(view.native not in (None, len(view)) for view in views):
        return None, 0
    parts, begin = [], 0
    for view, selection in zip(views, selections, strict=True):
        own = selection.kept.cpu() if selection.places is None else selection.places.cpu()
        more = own.new_full((len(selection) - len(own),), len(view) - 1)
        parts.append(torch.cat([own, more]) + begin)
        begin += len(view)
    newlines = len(rows.newlines)
    return torch.cat([*parts, torch.arange(begin, begin + newlines)]), begin + newlines
