"""What a method receives and what it returns: views, selections, and steps of a schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from rcb_lmms.cost import DecoderShape


@dataclass(frozen=True)
class VisualTokens:
    """One view (an image, a tile, or a pooled video frame) at the place where pruning happens.

    Attributes:
        features: `(n, d)` projector output, in the language model's embedding space, raster order.
        grid: `(h, w)` with `h * w == n`.
        encoder_features: `(n, c)` vision-tower output before the projector.
        keys: `(n, c)` attention keys of the tower's last block, heads concatenated, unscaled.
        cls_attention: `(n,)` attention of the CLS token to the patches in the last block, one head of width `c`.
        cls_similarity: `(n,)` cosine of each patch to the CLS token in the layer the projector reads.
        head_attention: `(n, h)` attention of the CLS token to the patches, by head, in the block whose output the
            projector reads; sums to less than 1 over the patches. Another block's than `cls_attention`.
        received_attention: `(n,)` attention that each patch receives in that block, mean over its heads and over all
            queries, CLS among them.
        object_attention: `(n,)` the same in a block a third of the way up (HiPrune's object layer).
        mean_keys: `(n, e)` keys of the block whose output the projector reads, unscaled, mean over its heads.
        cls_features: `(1, c)` the CLS token where `encoder_features` are the patches.
        patch_embeddings: `(n, e)` patches in CLIP's space of images and texts.
        text_embeddings: `(m, e)` the question in that space, a row for every 77 tokens.
        question_embeddings: `(t, d)` the language model's input embeddings of the question.
        key: names the view by its content; seeds what is random, so that results ignore the order of a run.
        native: tokens of the view at its full size; `None` says that it was encoded at that.
        frames: views of equal size that this one joins: the frames of a video, for a method that sees it as a whole.

    The optional tensors are filled only if the pruner names them in `needs`.
    """

    features: Tensor
    grid: tuple[int, int]
    encoder_features: Tensor | None = None
    keys: Tensor | None = None
    cls_attention: Tensor | None = None
    cls_similarity: Tensor | None = None
    head_attention: Tensor | None = None
    received_attention: Tensor | None = None
    object_attention: Tensor | None = None
    mean_keys: Tensor | None = None
    cls_features: Tensor | None = None
    patch_embeddings: Tensor | None = None
    text_embeddings: Tensor | None = None
    question_embeddings: Tensor | None = None
    key: str = ""
    native: int | None = None
    frames: int = 1

    def __len__(self) -> int:
        return self.features.shape[0]


@dataclass(frozen=True)
class Selection:
    """What stays of one view.

    Attributes:
        kept: `(k,)` int64 indices into the view, ascending unless the method declares another order.
        scores: `(n,)` float32 of every token, higher = keep.
        features: `(r, c)` rewritten tokens before the projector, in packing order, if the method rewrites
            tokens (PruMerge: `r = k + 1`, the last one is the residual token); otherwise `None`.
        forced: tokens that stay only because of `min_keep`.
        blanks: vectors of zeros behind the kept tokens, where a released code feeds them (HoloV).
        places: `(r,)` int64 place in the view of every rewritten token, for `positions=original`.
        flops: of choosing; `Pruner.choose` fills it in.
    """

    kept: Tensor
    scores: Tensor
    features: Tensor | None = None
    forced: int = 0
    blanks: int = 0
    places: Tensor | None = None
    flops: int = 0

    def __len__(self) -> int:
        """Visual tokens that reach the language model."""
        return len(self.kept if self.features is None else self.features) + self.blanks


@dataclass(frozen=True)
class LayerStep:
    """One step of a layer method's schedule: decoder layers from `layer` on see `keep` of a prompt's visual tokens.

    `ranked` of them are the best ones, the others merged from those that go; `None` says that none are merged.
    """

    layer: int
    keep: int
    ranked: int | None = None


@dataclass(frozen=True)
class PromptSizes:
    """A prompt before any step: its tokens, the visual ones, the text behind the last of these, and the decoder."""

    tokens: int
    visual: int
    text: int
    shape: DecoderShape

    def present(self, left: int) -> int:
        """Tokens of the prompt when `left` visual ones are left."""
        return self.tokens - self.visual + left


@dataclass(frozen=True)
class LayerView:
    """One prompt inside the decoder, at a step of a schedule, where it has `m` tokens.

    Attributes:
        hidden: `(m, d)` what the next layer gets; `before` is what the layer before it got.
        candidates: `(c,)` indices among the `m` of the visual tokens that may go, ascending.
        places: `(m,)` positions in the unpruned prompt; merged tokens take those of tokens that went.
        embeds: `(p, d)` the unpruned prompt's input embeddings, and `visual (v,)`, where its visual tokens stand.
        rope: cosine and sine of the tokens' present rotary positions, `(m, e)` each.
        attention: `attention("before" | "next", rows)` is the attention `(heads, r, m)`, float32, of the tokens `rows`
            in the layer before or in the next one.
        keys: `keys()` are the keys `(m, heads * e)` of the layer before, rotated, one for every query head.
        norm: the decoder's last norm.
    """

    hidden: Tensor
    before: Tensor
    candidates: Tensor
    places: Tensor
    embeds: Tensor
    visual: Tensor
    rope: tuple[Tensor, Tensor]
    attention: Callable[[str, Tensor], Tensor]
    keys: Callable[[], Tensor]
    norm: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LayerChoice:
    """What stays of the candidates of a `LayerView`.

    Attributes:
        kept: `(k,)` indices among the candidates, ascending.
        scores: `(c,)` float32, higher = keep.
        merged: `(r, d)` hidden states that follow the kept visual tokens.
    """

    kept: Tensor
    scores: Tensor
    merged: Tensor | None = None
