"""Ragged batches of prompts through the language model: prefill and greedy generation.

Left padding keeps every prompt's last token in the last column. Nothing is padded to the native length, so fewer
retained tokens mean a shorter batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rcb_lmms.engine.layer_pruning import prune_at_layer
from rcb_lmms.families.base import Family
from rcb_lmms.families.packed import Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from rcb_lmms.pruners.base import LayerStep, Pruner


@dataclass
class Generated:
    """Answers of a batch.

    Attributes:
        texts: one per prompt.
        output_tokens: tokens generated for each, the end token included.
        layer_kept: visual tokens that layers behind FastV's layer saw, per prompt; `None` without FastV.
    """

    texts: list[str]
    output_tokens: list[int]
    layer_kept: list[int] | None = field(default=None)


def left_pad(prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor, list[int]]:
    """`(b, s, d)` embeddings, `(b, s)` attention mask and each prompt's first column."""
    import torch

    longest = max(map(len, prompts))
    first = prompts[0].embeds
    embeds = first.new_zeros(len(prompts), longest, first.shape[1])
    mask = torch.zeros(len(prompts), longest, dtype=torch.long, device=first.device)
    starts = [longest - len(prompt) for prompt in prompts]
    for row, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
        embeds[row, start:] = prompt.embeds
        mask[row, start:] = 1
    return embeds, mask, starts


def last_logits(family: Family, prompts: Sequence[Prompt], batch_size: int) -> Tensor:
    """`(p, vocabulary)` float32 logits after each prompt's last position, in the order given.

    Prompts are batched by length, so that short ones do not pay for long ones.
    """
    import torch

    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    rows: list[Any] = [None] * len(prompts)
    with torch.inference_mode():
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            embeds, mask, _ = left_pad([prompts[index] for index in chosen])
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = family.model(
                inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1
            ).logits[:, -1]
            for index, row in zip(chosen, logits.float(), strict=True):
                rows[index] = row
    return torch.stack(rows)


def generate(
    family: Family,
    prompts: Sequence[Prompt],
    options: dict[str, Any],
    layer_pruner: Pruner | None = None,
    per: str = "view",
) -> Generated:
    """Answer one batch.

    Args:
        family: the loaded model.
        prompts: any lengths.
        options: arguments of `GenerationMixin.generate`.
        layer_pruner: FastV, which drops hidden states inside the decoder.
        per: `view` or `image`: which of a prompt's parts add a count to FastV's budget.
    """
    import torch

    embeds, mask, starts = left_pad(prompts)
    with contextlib.ExitStack() as stack, torch.inference_mode():
        ranks = None
        if layer_pruner is not None:
            steps = [prompt.spans and layer_step(layer_pruner, prompt, family.layers, per) for prompt in prompts]
            ranks = [step.keep if step else 0 for step in steps]
            spans = [
                [(begin + start, end + start) for begin, end in prompt.spans]
                for prompt, start in zip(prompts, starts, strict=True)
            ]
            if first := next(filter(None, steps), None):
                stack.enter_context(
                    prune_at_layer(family.model, layer=first.layer, keep=ranks, spans=spans, mode=layer_pruner.mode)
                )
        ids = family.model.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            pad_token_id=family.tokenizer.pad_token_id or family.tokenizer.eos_token_id,
            **options,
        )
    return Generated(
        family.tokenizer.batch_decode(ids, skip_special_tokens=True),
        [_length(row, family) for row in ids.tolist()],
        ranks,
    )


def layer_step(pruner: Pruner, prompt: Prompt, layers: int, per: str) -> LayerStep:
    """The one step of a layer method's schedule for a prompt."""
    (step,) = pruner.schedule(prompt.retained, layers, shares(prompt, per), prompt.encoded)
    return step


def shares(prompt: Prompt, per: str) -> int:
    """How often a prompt spends a budget: once for each of its views, or of its images and videos."""
    return prompt.views if per == "view" else prompt.visuals


def _length(ids: list[int], family: Family) -> int:
    ends = family.model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    return next((position + 1 for position, token in enumerate(ids) if token in ends), len(ids))


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that a smaller batch could work (CUDA's and the CPU allocator's way of saying so)."""
    import torch

    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )
