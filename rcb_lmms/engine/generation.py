"""Ragged batches of prompts through the language model: prefill and greedy generation.

Left padding keeps every prompt's last token in the last column. Nothing is padded to the native length, so fewer
retained tokens mean a shorter batch.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rcb_lmms.engine.layer_pruning import LayerPruning, prune_in_layers
from rcb_lmms.errors import UserError
from rcb_lmms.families.base import Family
from rcb_lmms.families.packed import Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from rcb_lmms.engine.prefix import PrefixCache
    from rcb_lmms.pruners.base import Pruner
    from rcb_lmms.pruners.tokens import LayerChoice, LayerStep, LayerView


@dataclass
class Generated:
    """Answers of a batch.

    Attributes:
        texts: one per prompt.
        output_tokens: tokens generated for each, the end token included.
        finite: whether all logits of each were numbers.
        steps: what a layer method did to each prompt; empty without visual tokens, and without a layer method.
        layer_kept: for each, kept positions among its visual tokens, `(k,)`, behind a layer method's last step.
        prefill_seconds: until the logits of the first tokens were known.
    """

    texts: list[str]
    output_tokens: list[int]
    finite: list[bool]
    steps: list[list[LayerStep]]
    layer_kept: list[Tensor | None]
    prefill_seconds: float


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


def positions_of(prompts: Sequence[Prompt], starts: Sequence[int], mask: Tensor) -> Tensor:
    """`(b, s)` rotary positions of left-padded prompts: counted, or those that they have in an unpruned prompt."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for row, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
        if prompt.places is not None:
            positions[row, start:] = prompt.places.to(positions.device)
    return positions


def generate(
    family: Family,
    prompts: Sequence[Prompt],
    options: dict[str, Any],
    pruner: Pruner | None = None,
    per: str = "view",
    prefixes: PrefixCache | None = None,
) -> Generated:
    """Answer one batch.

    Args:
        family: the loaded model.
        prompts: any lengths.
        options: arguments of `GenerationMixin.generate`.
        pruner: a layer method drops hidden states inside the decoder; others have done their work.
        per: `view` or `image`: which of a prompt's parts add a count to a layer method's budget.
        prefixes: what the prompts' beginnings are looked up in, which all have a name; for methods before the language
            model.
    """
    import torch

    if prefixes is not None:
        return _continue(family, prompts, options, prefixes)
    watch = _Finite(len(prompts))
    embeds, mask, starts = left_pad(prompts)
    layered = pruner is not None and pruner.stage == "layers"
    steps = [layer_steps(pruner, prompt, family.layers, per) if layered and prompt.spans else [] for prompt in prompts]
    with contextlib.ExitStack() as stack, torch.inference_mode():
        pruning = None
        if any(steps):
            spans = [prompt.spans_from(start) for prompt, start in zip(prompts, starts, strict=True)]
            pruning = stack.enter_context(prune_prompts(family.model, pruner, steps, spans))
        fixed = _fixed(family, watch)
        if any(prompt.places is not None for prompt in prompts):
            fixed["position_ids"] = positions_of(prompts, starts, mask)
        if pruning is not None and pruner.reprunes:
            ids, first_kept = _generate_anew(family, embeds, mask, options, fixed, pruning)
        else:
            ids = family.model.generate(inputs_embeds=embeds, attention_mask=mask, **fixed, **options)
            first_kept = pruning.kept if pruning is not None else None
    kept = [None] * len(prompts)
    if pruning is not None:
        kept = [
            among_visual(prompt, own - start) for prompt, own, start in zip(prompts, first_kept, starts, strict=True)
        ]
    return _generated(family, ids, watch, steps, kept)


def _continue(family: Family, prompts: Sequence[Prompt], options: dict[str, Any], prefixes: PrefixCache) -> Generated:
    """Answer a batch whose prefixes are looked up, or computed and remembered."""
    import torch

    watch = _Finite(len(prompts))
    with torch.inference_mode():
        batch = prefixes.continued(prompts)
        ids = family.model.generate(
            inputs_embeds=batch.embeds,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            past_key_values=batch.cache,
            **_fixed(family, watch),
            **options,
        )
    return _generated(family, ids, watch, [[] for _ in prompts], [None] * len(prompts))


def _fixed(family: Family, watch: _Finite) -> dict[str, Any]:
    pad = family.tokenizer.pad_token_id or family.tokenizer.eos_token_id
    return {"pad_token_id": pad, "logits_processor": [watch]}


def _generated(
    family: Family, ids: Tensor, watch: _Finite, steps: list[list[LayerStep]], kept: list[Tensor | None]
) -> Generated:
    texts = family.tokenizer.batch_decode(ids, skip_special_tokens=True)
    lengths = [_length(row, family) for row in ids.tolist()]
    return Generated(texts, lengths, watch.finite.tolist(), steps, kept, watch.first - watch.began)


def _generate_anew(
    family: Family, embeds: Tensor, mask: Tensor, options: dict[str, Any], fixed: dict[str, Any], pruning: LayerPruning
) -> tuple[Tensor, list[Tensor]]:
    """Generated ids `(b, t)` where every token is decoded by a prefill of its own, and what the first one kept.

    Raises:
        UserError: beams, which would each prune a prompt of their own.
    """
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    if options.get("num_beams", 1) > 1:
        raise UserError(
            wanted=f"num_beams={options['num_beams']} with a method that prunes anew at every token",
            found="beams, which the released code does not have",
            allowed="num_beams=1, or preset=paper, which prunes once",
            next_step="preset=paper",
        )
    penalty = RepetitionPenaltyLogitsProcessor(float(options.get("repetition_penalty", 1.0)))
    ends = torch.tensor(sorted(end_tokens(family)), device=embeds.device)
    pad = fixed["pad_token_id"]
    ids = torch.empty(len(embeds), 0, dtype=torch.long, device=embeds.device)
    done = torch.zeros(len(embeds), dtype=torch.bool, device=embeds.device)
    first_kept: list[Tensor] = []
    one = {**options, "max_new_tokens": 1, "repetition_penalty": 1.0}
    for _ in range(options["max_new_tokens"]):
        before = ids
        own = [*fixed["logits_processor"], lambda _, scores, before=before: penalty(before, scores)]
        step = {**fixed, "logits_processor": own if before.shape[1] else fixed["logits_processor"]}
        new = family.model.generate(inputs_embeds=embeds, attention_mask=mask, **step, **one)[:, -1:]
        first_kept = first_kept or pruning.kept
        new = torch.where(done[:, None], pad, new)
        ids, done = torch.cat([ids, new], 1), done | torch.isin(new[:, 0], ends)
        if bool(done.all()):
            break
        embeds = torch.cat([embeds, family.model.get_input_embeddings()(new).to(embeds)], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return ids, first_kept


class _Finite:
    """A logits processor that changes nothing; it notes which prompts' logits were no numbers, and when the first came.

    Attributes:
        finite: `(b,)` whether all logits of a prompt were numbers so far.
        began, first: on the clock, when it was made and when the first logits were known.
    """

    def __init__(self, prompts: int):
        import torch

        self.finite = torch.ones(prompts, dtype=torch.bool)
        self.began, self.first = time.perf_counter(), 0.0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        # Minus infinity alone is what other processors write for tokens that may not be drawn.
        wrong = scores.isnan().any(dim=1) | scores.isposinf().any(dim=1) | scores.isneginf().all(dim=1)
        self.finite &= ~wrong.view(len(self.finite), -1).any(dim=1).cpu()  # beams of one prompt stand together
        self.first = self.first or time.perf_counter()  # a GPU was waited for
        return scores


def among_visual(prompt: Prompt, positions: Tensor) -> Tensor:
    """Positions in a prompt `(k,)` as indices among its visual tokens."""
    import torch

    candidates = torch.cat([torch.arange(start, stop) for start, stop in prompt.spans] or [torch.arange(0)])
    return torch.searchsorted(candidates, positions)


def layer_steps(pruner: Pruner, prompt: Prompt, layers: int, per: str) -> list[LayerStep]:
    """A layer method's schedule for a prompt."""
    return pruner.schedule(prompt.retained, layers, shares(prompt, per), prompt.encoded)


def prune_prompts(
    model: Any, pruner: Pruner, steps: Sequence[Sequence[LayerStep]], spans: Sequence[Sequence[tuple[int, int]]]
) -> AbstractContextManager[LayerPruning]:
    """Prune inside the decoder by the schedules of a batch's prompts; those without images have an empty one."""
    longest = max(steps, key=len)
    schedule = [(step.layer, [own[index].keep if own else 0 for own in steps]) for index, step in enumerate(longest)]

    def select(row: int, index: int, view: LayerView) -> LayerChoice:
        return pruner.select_in_layer(view, steps[row][index])

    return prune_in_layers(
        model,
        steps=schedule,
        spans=spans,
        mode=pruner.mode,
        positions=pruner.positions,
        select=select if pruner.selects_in_layer else None,
    )


def shares(prompt: Prompt, per: str) -> int:
    """How often a prompt spends a budget: once for each of its views, or of its images and videos."""
    return prompt.views if per == "view" else prompt.visuals


def end_tokens(family: Family) -> set[int]:
    """Ids that end an answer."""
    ends = family.model.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [ends])


def _length(ids: list[int], family: Family) -> int:
    ends = end_tokens(family)
    return next((position + 1 for position, token in enumerate(ids) if token in ends), len(ids))


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that a smaller batch could work (CUDA's and the CPU allocator's way of saying so)."""
    import torch

    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )
