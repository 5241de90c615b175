"""What answering one question cost: visual tokens before and after pruning, layer by layer on average, and FLOPs."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rcb_lmms.cost import DecoderShape
from rcb_lmms.pruners.tokens import PromptSizes

if TYPE_CHECKING:
    import numpy as np

    from rcb_lmms.families.packed import Prompt
    from rcb_lmms.pruners.base import LayerStep, Pruner


@dataclass(frozen=True)
class LedgerRow:
    """One question's costs.

    Newline embeddings are counted apart: they are no visual tokens and never pruned, but cost as much.

    Attributes:
        input_tokens: rows of the prompt, text and newlines included; `output_tokens` were generated, the end token too.
        visual_native, visual_kept: visual tokens before and after pruning; for a layer method, behind its last step.
        visual_layer_average: visual tokens per decoder layer, averaged over the layers.
        visual_capped: 1 if a layer method was to keep more tokens than the packing left the prompt, and kept them all.
        prefill_tflops: of the decoder, under the formula of `rcb_lmms.cost`.
        method_tflops: of the method on the prompt's images, the first prefill and the question: choosing, and what it
            reads of the tower beyond the tower's own pass; in full where other questions share it.
        kept: one string for each view (for a layer method one for the prompt): see `pack_kept`.
    """

    input_tokens: int
    output_tokens: int
    visual_native: int
    visual_kept: int
    visual_newlines: int
    visual_views: int
    visual_layer_average: float
    visual_capped: int
    prefill_tflops: float
    method_tflops: float = 0.0
    kept: tuple[str, ...] = ()


def ledger_row(
    prompt: Prompt,
    output_tokens: int,
    shape: DecoderShape,
    pruner: Pruner,
    steps: Sequence[LayerStep],
    shares: int,
    kept: tuple[str, ...] = (),
) -> LedgerRow:
    """The costs of one prompt; `steps` are what a layer method did to it."""
    seen = [prompt.retained] * shape.layers  # visual tokens of each layer
    for step in steps:
        seen[step.layer :] = [step.keep] * (shape.layers - step.layer)
    capped = bool(steps) and pruner.budget.exceeds(prompt.retained, shares)
    sizes = PromptSizes(len(prompt), prompt.retained, len(prompt) - prompt.spans[-1][1] if prompt.spans else 0, shape)
    left = [prompt.retained, *(step.keep for step in steps)]
    choosing = sum(pruner.step_flops(step, before, sizes) for step, before in zip(steps, left, strict=False))
    # The candidates are the visual tokens that stand in the prompt; newlines between them stay.
    flops = sum(shape.layer_flops(len(prompt) - prompt.retained + count) for count in seen)
    return LedgerRow(
        input_tokens=len(prompt),
        output_tokens=output_tokens,
        visual_native=prompt.native,
        visual_kept=seen[-1],
        visual_newlines=prompt.newlines,
        visual_views=prompt.views,
        visual_layer_average=sum(seen) / shape.layers,
        visual_capped=int(capped),
        prefill_tflops=flops / 1e12,
        method_tflops=(prompt.method_flops + choosing) / 1e12,
        kept=kept,
    )


def pack_kept(kept: Sequence[int], native: int) -> str:
    """Kept indices among `native` tokens in a few characters: `native:` and one bit for each token, in base64."""
    import numpy as np

    mask = np.zeros(native, dtype=bool)
    mask[list(kept)] = True
    return f"{native}:{base64.b64encode(np.packbits(mask)).decode()}"


def unpack_kept(text: str) -> tuple[np.ndarray, int]:
    """The inverse of `pack_kept`: kept indices `(k,)` ascending, and the number of tokens they are among."""
    import numpy as np

    native, _, bits = text.partition(":")
    mask = np.unpackbits(np.frombuffer(base64.b64decode(bits), dtype=np.uint8), count=int(native))
    return np.flatnonzero(mask), int(native)
