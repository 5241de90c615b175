"""What a run did, sample by sample and as a whole."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from lmms_eval.api.instance import TokenCounts

from rcb_lmms.resources import source_version

logger = logging.getLogger(__name__)


@dataclass
class VisualTokenCounts(TokenCounts):
    """lmms-eval's token counts with the visual tokens and the prefill's cost beside them.

    The fields are those of `rcb_lmms.engine.ledger.LedgerRow`.
    """

    visual_native: int = 0
    visual_kept: int = 0
    visual_newlines: int = 0
    visual_views: int = 0
    visual_layer_average: float = 0.0
    visual_capped: int = 0
    prefill_tflops: float = 0.0
    method_tflops: float = 0.0
    kept: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As it appears in the samples file."""
        return super().to_dict() | {
            "visual_native": self.visual_native,
            "visual_kept": self.visual_kept,
            "visual_newlines": self.visual_newlines,
            "visual_views": self.visual_views,
            "visual_layer_average": round(self.visual_layer_average, 3),
            "visual_capped": self.visual_capped,
            "prefill_tflops": float(f"{self.prefill_tflops:.6g}"),
            "method_tflops": float(f"{self.method_tflops:.6g}"),
            "kept": self.kept,
        }


@dataclass
class RunRecord:
    """One run of an entry.

    Attributes:
        model: entry id.
        arguments: model_args as given; `resolved` as used.
        calibrations: per task, target, achieved and fitted parameter.
        achieved: per task, mean retained, native and layer-averaged visual tokens per question, and their spread.
        failures: `{task, doc_id, error}` of every sample that could not be answered; none of them is scored.
        totals: questions, images encoded, seconds; of these `seconds_tower` and so on, added up over processes, see
            `rcb_lmms.engine.clock`; an engine beside the model adds its `counts`.
        directory: where the run looked for its data sets.
    """

    model: str
    arguments: dict[str, Any]
    resolved: dict[str, Any]
    versions: dict[str, str | None]
    calibrations: dict[str, Any] = field(default_factory=dict)
    achieved: dict[str, Any] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)
    totals: dict[str, float] = field(default_factory=dict)
    directory: str = field(default_factory=os.getcwd)


def versions() -> dict[str, str | None]:
    """Versions of what a result depends on, and the commit of a source checkout (`+` if it has changes)."""
    names = ("lmms_eval", "torch", "transformers", "tokenizers", "datasets", "pillow", "numpy")
    source = source_version()
    return {
        "rcb_lmms": source["version"],
        "commit": source["commit"],
        **{name: importlib.metadata.version(name) for name in names},
    }


def summarize(rows: list[tuple[str, VisualTokenCounts]]) -> dict[str, dict[str, float]]:
    """Per task: means and spread of the samples' visual tokens and prefill cost."""
    tasks: dict[str, list[VisualTokenCounts]] = {}
    for task, counts in rows:
        tasks.setdefault(task, []).append(counts)
    summary = {}
    for task, samples in tasks.items():
        kept = [sample.visual_kept for sample in samples]
        summary[task] = {
            "samples": len(samples),
            "native_visual_tokens": statistics.fmean(sample.visual_native for sample in samples),
            "retained_visual_tokens": statistics.fmean(kept),
            "retained_std": statistics.pstdev(kept),
            "retained_min": min(kept),
            "retained_median": statistics.median(kept),
            "retained_max": max(kept),
            "retained_with_newlines": statistics.fmean(
                sample.visual_kept + sample.visual_newlines for sample in samples
            ),
            "views": statistics.fmean(sample.visual_views for sample in samples),
            "capped_prompts": sum(sample.visual_capped for sample in samples),
            # fmean is exact, so the order in which processes report does not matter.
            "layer_average_visual_tokens": statistics.fmean(sample.visual_layer_average for sample in samples),
            "prefill_tflops": statistics.fmean(sample.prefill_tflops for sample in samples),
            "method_tflops": statistics.fmean(sample.method_tflops for sample in samples),
        }
    return summary


def _warn_of_capped(run: RunRecord) -> None:
    """Say of how many prompts the budget exceeded what their packing left of them."""
    for task, own in run.achieved.items():
        if own["capped_prompts"]:
            logger.warning(
                "%s on %s: %d of %d prompts had fewer visual tokens than the budget and kept them all",
                run.model,
                task,
                own["capped_prompts"],
                own["samples"],
            )


def report_metrics(run: RunRecord, rows: list[tuple[str, VisualTokenCounts]]) -> None:
    """Put a run's totals into lmms-eval's throughput summary; warn of capped budgets."""
    from lmms_eval.models.model_utils.gen_metrics import log_metrics

    _warn_of_capped(run)
    generated = sum(counts.output_tokens or 0 for _, counts in rows)
    seconds = run.totals["seconds"]
    log_metrics(
        total_elapsed_time=seconds,
        total_gen_tokens=generated,
        avg_speed=generated / seconds if seconds else 0.0,
        additional_metrics=run.totals,
    )


def cost_table(run: RunRecord) -> str:
    """What a run's questions cost, a row a task, as text."""
    from tabulate import tabulate

    failed = Counter(failure["task"] for failure in run.failures)
    rows = [
        (
            task,
            f"{own['retained_visual_tokens']:.2f}",
            f"{own['native_visual_tokens']:.0f}",
            f"{own['retained_visual_tokens'] / max(own['native_visual_tokens'], 1):.1%}",
            f"{own['layer_average_visual_tokens']:.2f}",
            f"{1000 * own['prefill_tflops']:.4g}",
            f"{1000 * own['method_tflops']:.4g}",
            own["samples"],
            failed[task],
        )
        for task, own in run.achieved.items()
    ]
    gflops = ("prefill GFLOPs", "method GFLOPs")
    headers = ("task", "tokens kept", "of", "share", "layer average", *gflops, "answered", "failed")
    table = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    asked = run.totals["questions"] - run.totals["resumed_questions"]
    first = f", {1000 * run.totals['seconds_first_token'] / asked:.3g} ms to the first token" if asked else ""
    return f"{table}\n\n{run.totals['questions_per_second']:.1f} questions/s{first}\n"
