"""FastV: the language model's own attention says which visual tokens its later layers may forget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rcb_lmms.budget import rank_for_layer_average
from rcb_lmms.pruners.checks import check_choice, check_whole
from rcb_lmms.pruners.schedules import InDecoder
from rcb_lmms.pruners.tokens import LayerStep


@dataclass(frozen=True)
class FastV(InDecoder):
    """Behind its first layers, the decoder goes on with the visual tokens that the last prompt token attends to most.

    Every visual token costs full price in the first `layer` layers. `rcb_lmms.engine.layer_pruning` does the work.

    Released code:
        `preset=official` prunes anew at every decoded token, by the attention of the newest one, since the released
        code runs without a cache. `preset=paper` prunes once, at the prefill, and decodes with the cache. The first
        decoded token is the same.

    Ours:
        Attention comes from the layer's own queries and keys, so that the decoder runs with sdpa; all visual tokens of
        a prompt are candidates together, also those of several images.

    Attributes:
        layer: decoder layers that see every token; the attention of the last of them gives the scores (K = 2 in the
            paper's scripts).
        mode: `drop` shortens the sequence from there on; `mask` keeps its length and hides the pruned keys, which
            gives the same answers at full cost.
        convention: `rank` counts the tokens left after pruning, as the papers do; `layer_average` counts tokens per
            layer over the whole decoder, the `layer` full ones included.
        preset: `official` prunes anew at every decoded token, by the attention of the newest one, as the released code
            does (it runs without a cache); `paper` prunes once, at the prefill, and decodes with the cache. The first
            decoded token is the same.
    """

    layer: int = 2
    mode: str = "drop"
    convention: str = "rank"
    preset: str = "official"

    name: ClassVar[str] = "fastv"
    label: ClassVar[str] = "FastV"
    summary: ClassVar[str] = "inside the LLM, by the question"
    sees_question: ClassVar[bool] = True
    paper: ClassVar[str] = "Chen et al., ECCV 2024 (arXiv 2403.06764)"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("fastv's number of full layers", self.layer, 1)
        check_choice("fastv's mode", self.mode, ("drop", "mask"))
        check_choice("fastv's way of counting tokens", self.convention, ("rank", "layer_average"))

    @property
    def reprunes(self) -> bool:
        """Whether every decoded token prunes the prompt anew."""
        return self.preset == "official"

    def schedule(self, native: int, layers: int, shares: int = 1, encoded: int = 0) -> list[LayerStep]:
        """One step, behind `layer` layers."""
        return [LayerStep(self.layer, self.rank(native, layers, shares, encoded))]

    def rank(self, native: int, layers: int, shares: int = 1, encoded: int = 0) -> int:
        """Tokens that layers from `layer` on see of a prompt's visual tokens, which compete as one.

        A packing that cuts padding off can leave fewer tokens than a count asks for, though the views have as many:
        all that are left then stay. The released code has one image of 576 tokens and no such case; its top-k fails.

        Args:
            native: visual tokens in the prompt.
            layers: of the decoder.
            shares: how often the prompt may spend a budget of tokens: once for each of its views, or of its images.
            encoded: visual tokens of its views, with those that the packing cut off.

        Raises:
            UserError: a budget above what the views have, or a layer average that the full layers alone exceed.
        """
        count = self.budget.spent(native, shares, encoded)
        return count if self.convention == "rank" else rank_for_layer_average(count, native, self.layer, layers)
