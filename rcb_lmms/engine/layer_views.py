"""What a layer method sees of a batch inside the decoder: each prompt without its padding, at a step of a schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rcb_lmms.engine.layer_attention import heads_of, rotate
from rcb_lmms.pruners.tokens import LayerView

if TYPE_CHECKING:
    Rope = tuple[Tensor, Tensor]


class Watch:
    """Remembers what the layer before a step was given; hooks fill it during a prefill.

    Attributes:
        embeds: `(b, n, d)` input of the first layer.
        before: `(b, r, d)` input of the layer before the step.
        normed: `(b, r, d)` input of its attention, and `rope`, its rotary embeddings.
    """

    def __init__(self) -> None:
        self.embeds = self.before = self.normed = None
        self.rope: Rope | None = None

    def hooks(self, decoder: nn.Module, layer: int, first: bool) -> list[tuple[nn.Module, Callable[..., None]]]:
        """Modules and their hooks, for a step behind `layer` layers."""
        block = decoder.layers[layer - 1]
        own = [(block, self._on_layer), (block.self_attn, self._on_attention)]
        return [(decoder.layers[0], self._on_first_layer), *own] if first else own

    def _on_first_layer(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.embeds = args[0] if args else kwargs["hidden_states"]

    def _on_layer(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.before = args[0] if args else kwargs["hidden_states"]

    def _on_attention(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.normed = args[0] if args else kwargs["hidden_states"]
        self.rope = kwargs["position_embeddings"]

    def view(
        self,
        decoder: nn.Module,
        layer: int,
        hidden: Tensor,
        row: int,
        columns: Tensor,
        candidates: Tensor,
        places: Tensor,
        visual: Tensor,
    ) -> LayerView:
        """One prompt's view.

        Args:
            decoder: that runs.
            layer: the step stands behind so many layers.
            hidden: `(b, r, d)` what the next layer is given.
            row: of the batch.
            columns: `(m,)` of the row that hold tokens.
            candidates: `(c,)` indices among these.
            places: `(m,)` positions in the unpruned prompt.
            visual: `(v,)` positions there of its visual tokens.
        """
        before, following = decoder.layers[layer - 1], decoder.layers[layer]
        columns = columns.to(hidden.device)
        rope = tuple(part[row if len(part) > 1 else 0][columns] for part in self.rope)
        normed, own = self.normed[row][columns], hidden[row][columns]

        def attention(where: str, rows: Tensor) -> Tensor:
            module = before.self_attn if where == "before" else following.self_attn
            states = normed if where == "before" else following.input_layernorm(own)
            return rows_attention(module, states, rope, rows).to(own.device)

        def keys() -> Tensor:
            rotated = rotate(heads_of(before.self_attn, "k", normed[None])[0], *rope)  # (g, m, e)
            groups = before.self_attn.q_proj.out_features // before.self_attn.k_proj.out_features
            return rotated.repeat_interleave(groups, 0).transpose(0, 1).flatten(1)

        # The layers of a model that is spread over devices were given theirs on different ones.
        embeds = self.embeds[row, self.embeds.shape[1] - int(places[-1]) - 1 :].to(own.device)
        return LayerView(
            hidden=own,
            before=self.before[row].to(own.device)[columns],
            candidates=candidates,
            places=places,
            embeds=embeds,
            visual=visual,
            rope=rope,
            attention=attention,
            keys=keys,
            norm=decoder.norm,
        )


def rows_attention(attention: nn.Module, hidden: Tensor, rope: Rope, rows: Tensor) -> Tensor:
    """Causal softmax attention of some tokens of one prompt, `(heads, r, m)` float32, as eager attention would give it.

    Args:
        attention: a Llama-like attention module.
        hidden: `(m, d)` its input, after the layer's norm.
        rope: cosine and sine, `(m, e)` each.
        rows: `(r,)` tokens whose attention is wanted, ascending.
    """
    rows = rows.to(hidden.device)
    cosine, sine = (part.to(hidden.device) for part in rope)
    queries = rotate(heads_of(attention, "q", hidden[None, rows])[0], cosine[rows], sine[rows]).float()
    keys = rotate(heads_of(attention, "k", hidden[None])[0], cosine, sine).float()
    keys = keys.repeat_interleave(len(queries) // len(keys), 0)
    logits = queries @ keys.mT * attention.scaling
    later = torch.arange(len(hidden), device=rows.device) > rows[:, None]
    return logits.masked_fill(later, -torch.inf).softmax(-1)
