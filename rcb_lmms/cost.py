"""Arithmetic of the prefill, under named formulas. Unlike formulas are never mixed in one column.

Sources: FLOPs per decoder layer counted at two per multiply-add (checked against torch's counter in the tests);
`fastv_paper` is the formula printed in the FastV paper, which counts multiply-adds and a two-matrix feed-forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder: `layers`, width `d`, feed-forward `m`, query and key/value heads, head width, words."""

    layers: int
    d: int
    m: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int = 0

    @classmethod
    def of(cls, config: Any) -> DecoderShape:
        """From a Hugging Face configuration (of the whole model or of its text part)."""
        text = config.get_text_config()
        heads = text.num_attention_heads
        return cls(
            layers=text.num_hidden_layers,
            d=text.hidden_size,
            m=text.intermediate_size,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_width=getattr(text, "head_dim", None) or text.hidden_size // heads,
            vocabulary=text.vocab_size,
        )

    @property
    def inner(self) -> int:
        """Width of the queries of all heads."""
        return self.heads * self.head_width

    @property
    def inner_kv(self) -> int:
        """Width of the keys, and of the values, of all heads."""
        return self.kv_heads * self.head_width

    def layer_flops(self, n: int) -> int:
        """FLOPs of one layer over `n` tokens: projections, full (not halved for causality) attention, gated MLP."""
        return 4 * n * self.d * (self.inner + self.inner_kv) + 4 * n * n * self.inner + 6 * n * self.d * self.m

    def rows_flops(self, rows: int, n: int) -> int:
        """FLOPs of the attention of `rows` tokens to `n`, without values: their queries, all keys, the products."""
        return 2 * rows * self.d * self.inner + 2 * n * self.d * self.inner_kv + 2 * rows * n * self.inner

    def prefill_flops(self, n: int, pruned_layer: int | None = None, n_pruned: int | None = None) -> int:
        """FLOPs of a prefill of `n` tokens, of which `n_pruned` are left from layer `pruned_layer` on (FastV).

        Raises:
            ValueError: only one of the two is given.
        """
        if (pruned_layer is None) != (n_pruned is None):
            raise ValueError("pruned_layer and n_pruned belong together")
        if pruned_layer is None:
            return self.layers * self.layer_flops(n)
        return pruned_layer * self.layer_flops(n) + (self.layers - pruned_layer) * self.layer_flops(n_pruned)

    def head_flops(self) -> int:
        """FLOPs of one position's logits; `prefill_flops` leaves them out."""
        return 2 * self.d * self.vocabulary

    def decode_flops(self, n: float, new: int) -> float:
        """FLOPs of decoding `new` tokens, of which the prefill's logits give the first; heads are included.

        Args:
            n: keys that the prefill left in a layer, mean over layers.
            new: length of the answer.
        """
        fixed = self.layers * (4 * self.d * (self.inner + self.inner_kv) + 6 * self.d * self.m) + self.head_flops()
        return sum(fixed + 4 * self.layers * (n + step) * self.inner for step in range(1, new))

    def fastv_paper_macs(self, n: int) -> int:
        """The FastV paper's `4nd^2 + 2n^2d + 2ndm` for one layer, in multiply-adds.

        It has two matrices in the feed-forward part, where Llama and Qwen2 have three, and as many key heads as query
        heads.
        """
        return 4 * n * self.d**2 + 2 * n * n * self.d + 2 * n * self.d * self.m

    def sparsevlm_macs(self, n: int) -> int:
        """SparseVLM's `4nd^2 + 2n^2d + 3ndm` for one layer: half of `layer_flops` where no key heads are shared."""
        return self.fastv_paper_macs(n) + n * self.d * self.m

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Key/value cache of one token over all layers."""
        return 2 * self.layers * self.inner_kv * bytes_per_value


def tower_flops(vision: Any, patches: int, cls: bool, blocks: int | None = None) -> int:
    """FLOPs of a CLIP or SigLIP tower over one view: patch embedding, projections, full attention, two-matrix MLP.

    Args:
        vision: its Hugging Face configuration.
        patches: of the view.
        cls: whether it has one position more than patches.
        blocks: that run; by default all.
    """
    return 2 * patches * 3 * vision.patch_size**2 * vision.hidden_size + encoder_flops(vision, patches + cls, blocks)


def encoder_flops(config: Any, n: int, blocks: int | None = None) -> int:
    """FLOPs of the `blocks` (by default all) of a CLIP or SigLIP tower, of images or texts, over `n` positions."""
    d = config.hidden_size
    layers = config.num_hidden_layers if blocks is None else blocks
    return layers * (8 * n * d * d + 4 * n * n * d + 4 * n * d * config.intermediate_size)


def projector_flops(patches: int, c: int, d: int) -> int:
    """FLOPs of LLaVA's two-layer projector from width `c` to width `d`."""
    return 2 * patches * (c * d + d * d)
