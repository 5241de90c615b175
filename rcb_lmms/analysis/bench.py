"""What an answer costs, told apart: seconds, FLOPs and bytes of every stage, for each method and budget.

Seconds are those that a run's record has too, measured on whole sessions. One image, one question: nothing is shared.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from rcb_lmms.analysis.memory import peak_bytes
from rcb_lmms.cost import DecoderShape, projector_flops, tower_flops
from rcb_lmms.engine.clock import STAGES
from rcb_lmms.engine.questions import Answer, Question
from rcb_lmms.engine.session import Session
from rcb_lmms.errors import BudgetError, UserError
from rcb_lmms.families.base import Family
from rcb_lmms.pruners.base import Pruner

QUESTION = "What does this image show?"
# A batch is large enough when one four times as large answers less than this much faster.
SATURATED = 1.1
MOST = 64


@dataclass
class Case:
    """One method at one budget in one batch size, and what was measured of it.

    Attributes:
        label: the method in the table.
        spent: seconds a question by stage, with `total` and the processor's `cpu`; one entry a repeat.
        peak: bytes above the weights.
        answer: one of its answers, for its ledger.
        problem: why it stands in no table: a budget that the method cannot meet on this model.
    """

    label: str
    pruner: Pruner
    batch: int
    spent: list[dict[str, float]] = field(default_factory=list)
    peak: int = 0
    answer: Answer | None = None
    problem: str | None = None

    @property
    def named(self) -> dict[str, Any]:
        """Its row's name."""
        return {"method": self.label, "budget": str(self.pruner.budget or ""), "batch": self.batch}

    def median(self, name: str) -> float:
        """Seconds of a stage."""
        return statistics.median(own[name] for own in self.spent)

    @property
    def spread(self) -> float:
        """Range of the middle half of the repeats' totals, as a share of their median."""
        totals = sorted(own["total"] for own in self.spent)
        if len(totals) < 2:
            return float("nan")
        low, _, high = statistics.quantiles(totals, n=4, method="inclusive")
        return (high - low) / self.median("total")


def bench(
    family: Family,
    pruners: Sequence[tuple[str, Pruner]],
    images: Sequence[Any],
    *,
    new_tokens: int = 16,
    batch_size: int | None = None,
    repeats: int = 5,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """One row for each method in batch 1 and in a saturated batch, and the facts behind the table.

    Repeats of all rows alternate, so that what else runs on a machine falls on all of them; the first, which warms up
    and measures memory, is not counted.

    Args:
        family: the loaded model.
        pruners: methods with their budgets, and what the table calls them.
        images: opened or files, at least as many as a batch has questions.
        new_tokens: length of every answer: no token ends one.
        batch_size: the saturated batch; by default each method's grows by fours until that no longer pays.
        repeats: that count.

    Raises:
        UserError: a question that cannot be answered.
    """
    roof = 0.0
    with _length(family):
        cases = []
        for label, pruner in tqdm(pruners, "batch sizes", unit="method", disable=batch_size is not None):
            size = batch_size or _saturated(family, pruner, images, new_tokens)
            cases += [Case(label, pruner, batch) for batch in sorted({1, size})]
        rounds = [(repeat, case) for repeat in range(repeats + 1) for case in cases]
        for repeat, case in tqdm(rounds, "measurements", unit="run"):
            if case is cases[0]:  # again and again: what else runs on a machine can only lower it
                roof = max(roof, matmul_flops(family))
            chosen = [images[(repeat + number) % len(images)] for number in range(case.batch)]
            if not repeat:
                _warm_up(family, case, chosen, new_tokens)
            elif case.problem is None:
                case.spent.append(_run(family, case, chosen, new_tokens))
        measured = [case for case in cases if case.problem is None]
        rows = [_row(family, case, images[0], new_tokens, roof) for case in measured]
    given = {"question": QUESTION, "new_tokens": new_tokens, "repeats": repeats}
    return pd.DataFrame(rows), given | _facts(family, cases) | {"matmul_tflops_per_second": roof / 1e12}


def _facts(family: Family, cases: Sequence[Case]) -> dict[str, Any]:
    """What a table does not say, and all samples."""
    books = [own.pruner.codebook for own in cases if getattr(own.pruner, "codebook", None) is not None]
    config = family.model.config
    parts = {"language model": config.get_text_config(), "vision tower": config.vision_config}
    return {
        "attention": {name: str(own._attn_implementation) for name, own in parts.items()},
        "dtype": str(family.dtype).removeprefix("torch."),
        "weights_mb": sum(own.nbytes for own in family.model.parameters()) / 1e6,
        "codebook_mb": books[0].normalized().nbytes / 1e6 if books else None,
        "left_out": [own.named | {"reason": own.problem} for own in cases if own.problem is not None],
        "samples": [own.named | {"seconds": own.spent} for own in cases if own.problem is None],
    }


def _warm_up(family: Family, case: Case, images: Sequence[Any], new_tokens: int) -> None:
    """Run a case once, and note its memory or why it cannot be run."""
    try:
        with peak_bytes(family.device) as found:
            _run(family, case, images, new_tokens)
        case.peak = found[0]
    except BudgetError as error:
        case.problem = f"{error.wanted}: {error.found}"


def matmul_flops(family: Family, repeats: int = 5) -> float:
    """FLOPs a second of a large square product in the weights' type on their device: the best of some.

    On a CPU that others share, the processor's seconds count, spread over its threads.
    """
    side = 8192 if family.device.type == "cuda" else 1536
    left, right = (torch.randn(side, side, device=family.device).to(family.dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats + 1):
        began, worked = time.perf_counter(), time.process_time()
        left @ right
        if family.device.type == "cuda":
            torch.cuda.synchronize(family.device)
            worked = float("-inf")
        spent = (time.process_time() - worked) / torch.get_num_threads()
        seconds.append(min(time.perf_counter() - began, spent))
    return 2 * side**3 / min(seconds[1:])


@contextlib.contextmanager
def _length(family: Family) -> Iterator[None]:
    """Inside, no token ends an answer, so that all answers are as long as they may be."""
    generation = family.model.generation_config
    before = generation.eos_token_id
    generation.eos_token_id = family.model.config.get_text_config().vocab_size
    try:
        yield
    finally:
        generation.eos_token_id = before


def _run(family: Family, case: Case, images: Sequence[Any], new_tokens: int) -> dict[str, float]:
    """Seconds a question by stage of one batch, which nothing was computed for before."""
    session = Session(family, case.pruner, batch_size=case.batch, prefix_cache="off")
    began, worked = time.perf_counter(), time.process_time()
    answers = session.answer([Question(QUESTION, [image]) for image in images], max_new_tokens=new_tokens)
    total, cpu = time.perf_counter() - began, time.process_time() - worked
    for answer in answers:
        if answer.error is not None or session.batch_size < case.batch:
            raise UserError(
                wanted=f"an answer with {case.label} in a batch of {case.batch}",
                found=answer.error or "too little memory for the batch",
                allowed="questions that this machine can answer",
                next_step="--batch-size with a smaller number, or fewer --layers",
            )
    case.answer = answers[0]
    spent = {stage: session.seconds[stage] for stage in (*STAGES, "first_token")} | {"total": total, "cpu": cpu}
    return {stage: own / len(images) for stage, own in spent.items()}


def _saturated(family: Family, pruner: Pruner, images: Sequence[Any], new_tokens: int) -> int:
    """Questions in a batch from which four times as many are answered hardly faster, each."""
    size, fastest = 1, float("inf")
    while 4 * size <= min(MOST, len(images)):
        try:
            spent = _run(family, Case(pruner.name, pruner, 4 * size), images[: 4 * size], new_tokens)["total"]
        except UserError:
            return size
        if fastest < SATURATED * spent:
            return size
        size, fastest = 4 * size, spent
    return size


def _row(family: Family, case: Case, image: Any, new_tokens: int, roof: float) -> dict[str, Any]:
    """Medians, FLOPs under named formulas and bytes, all for one question."""
    session, own = Session(family, case.pruner), case.answer.row
    shape, pruner = session.shape, case.pruner
    (views,) = session.encoder.views([family.open(image)], pruner)
    vision = family.model.config.vision_config
    patches = [view.grid[0] * view.grid[1] for view in views]
    blocks = family.model.config.vision_feature_layer % (vision.num_hidden_layers + 1)
    tower = sum(tower_flops(vision, n, family.has_cls, blocks) for n in patches)
    tower += sum(projector_flops(n, vision.hidden_size, family.width) for n in patches)
    layers = tokens_by_layer(pruner, own, shape.layers)
    kept = statistics.fmean(layers)
    prefill = 1e12 * own.prefill_tflops + shape.head_flops()
    flops = {
        "tower": tower,
        "method": 1e12 * own.method_tflops,
        "prefill": prefill,
        "decode": _decode_flops(pruner, shape, layers, new_tokens),
    }
    itemsize, worked = family.dtype.itemsize, case.median("total")
    if family.device.type == "cpu":  # as the roof, see `matmul_flops`
        worked = min(worked, case.median("cpu") / torch.get_num_threads())
    return {
        **case.named,
        "visual_tokens": own.visual_native,
        "kept": own.visual_kept,
        "layer_average": own.visual_layer_average,
        "prompt_tokens": own.input_tokens,
        **{f"{stage}_ms": 1e3 * case.median(stage) for stage in (*STAGES, "total", "cpu")},
        "spread": case.spread,
        # Of a batch, all questions wait for the same prefill.
        "first_token_ms": 1e3 * case.median("first_token"),
        "questions_per_second": 1 / case.median("total"),
        "kv_mb": (kept + new_tokens - 1) * shape.kv_bytes_per_token(itemsize) / 1e6,
        "peak_mb": case.peak / 1e6,
        **{f"{stage}_gflops": own / 1e9 for stage, own in flops.items()},
        "total_gflops": sum(flops.values()) / 1e9,
        "prefill_fastv_gmacs": sum(map(shape.fastv_paper_macs, layers)) / 1e9,
        "prefill_sparsevlm_gmacs": sum(map(shape.sparsevlm_macs, layers)) / 1e9,
        "prefill_of_matmul": prefill / case.median("prefill") / roof,
        "total_of_matmul": sum(flops.values()) / worked / roof,
    }


def _decode_flops(pruner: Pruner, shape: DecoderShape, layers: Sequence[int], new: int) -> float:
    """Of the tokens behind the first: each by a forward pass of its own, or by a prefill where a method prunes anew."""
    if not pruner.reprunes:
        return shape.decode_flops(statistics.fmean(layers), new)
    return sum(shape.head_flops() + sum(shape.layer_flops(n + step) for n in layers) for step in range(1, new))


def tokens_by_layer(pruner: Pruner, own: Any, layers: int) -> list[int]:
    """Tokens of a prompt that each decoder layer sees."""
    if pruner.stage != "layers":
        return [own.input_tokens] * layers
    seen = [own.visual_native] * layers  # nothing was left out before the decoder
    for step in pruner.schedule(own.visual_native, layers, own.visual_views, own.visual_native):
        seen[step.layer :] = [step.keep] * (layers - step.layer)
    return [own.input_tokens - own.visual_native + count for count in seen]
