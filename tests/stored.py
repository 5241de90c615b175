"""Run folders with answers, as `run_evaluation` leaves them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

NATIVE = 16


def save_folder(folder: Path, samples: dict[str, list[dict]], *, results: dict | None = None, **record: Any) -> Path:
    """A folder with a run's record, results and the samples of each task.

    Args:
        folder: to be made.
        samples: rows by task.
        results: what the results file has besides the number of samples.
        record: what of it is not as in most tests.
    """
    common = {
        "status": "success",
        "tasks": list(samples),
        "limit": None,
        "resolved": {},
        "calibrations": {},
        "failures": [],
        "totals": {},
    }
    sizes = {task: {"original": len(rows), "effective": len(rows)} for task, rows in samples.items()}
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(common | record))
    whole = {"results": {task: {} for task in samples}, "n-samples": sizes} | (results or {})
    (folder / "results.json").write_text(json.dumps(whole))
    for task, rows in samples.items():
        # The order of rows differs between numbers of processes and must not matter.
        (folder / f"samples_{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    return folder


def edit(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    """What rewrites a file of a run's folder."""

    def rewrite(folder: Path) -> None:
        (folder / name).write_text(change((folder / name).read_text()))

    return rewrite


def save_run(
    folder: Path,
    method: str,
    answers: Sequence[str],
    targets: Sequence[str],
    *,
    keep: int | None = None,
    seed: int | None = None,
    kept: Sequence[Sequence[str]] | None = None,
    questions: Sequence[str] | None = None,
    categories: Sequence[str] | None = None,
    task: str = "rcb_pope",
    metric: str = "rcb_pope_accuracy",
    **record: Any,
) -> Path:
    """A run of `rcb_pope`: an answer is right if it is the target; two questions about each image."""
    arguments = {"pretrained": "lab"} | ({"keep": str(keep)} if keep else {}) | ({"seed": str(seed)} if seed else {})
    tokens = float(keep or NATIVE)
    achieved = {
        "samples": len(answers),
        "native_visual_tokens": float(NATIVE),
        "retained_visual_tokens": tokens,
        "retained_min": tokens,
        "retained_max": tokens,
        "layer_average_visual_tokens": tokens,
        "prefill_tflops": tokens / 1000,
    }
    content = {
        "model": f"llava_{'full' if method == 'none' else method}",
        "arguments": arguments,
        "resolved": {"family": "llava", "pruner": {"budget": f"tokens={keep}" if keep else "None"}},
        "achieved": {task: achieved},
        "totals": {"questions": len(answers), "questions_per_second": 100 / tokens, "seconds": tokens},
    }
    rows = []
    for number, (answer, target) in enumerate(zip(answers, targets, strict=True)):
        score = {"score": float(answer.strip().lower() == target), "cluster": f"image{number // 2}", "answer": target}
        question = questions[number] if questions else f"Is there object {number}?"
        own = kept[number] if kept else []
        row = {
            "doc_id": number,
            "target": target,
            "doc": {"question": question, "category": categories[number] if categories else "random"},
            "arguments": [f"{question}\nAnswer yes or no.", {}, number, task, "test"],
            "filtered_resps": [answer],
            "token_counts": [{"visual_native": NATIVE, "visual_kept": int(tokens), "kept": own}],
            metric: score,
        }
        rows.append(row)
    return save_folder(folder, {task: rows}, **content | record)
