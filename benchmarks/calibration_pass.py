"""What calibration costs beside the bare vision tower, over the same benchmarks and images.

`bare` reads every document through lmms-eval's own task, preprocesses each distinct image and runs it through the
vision tower and the projector, and keeps nothing. `ours` is the pass of `rcb calibrate --tasks`: the same, and every
token's redundancy, PruMerge's and PruMerge+'s counts, and all of it on disk. `fit` is what follows the pass: thresholds
for six budgets. `tower` is the tower alone, over images that were read before.

    cd DATA && python .../benchmarks/calibration_pass.py [--model lab] [--tasks pope,mme] [--rounds 3]

DATA holds the benchmarks (`rcb lab data --out DATA`). Rounds take turns, and each way's fastest counts, in CPU seconds
of this process and on the clock. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time

import torch

from rcb_lmms.calibration import Documents, parse_targets, score_pass
from rcb_lmms.calibration.calibrate import benchmark_record
from rcb_lmms.calibration.passes import BATCH_FRAMES
from rcb_lmms.engine.encoding import ImageEncoder
from rcb_lmms.families import default_codebook, load_family
from rcb_lmms.families.images import whole_images_only
from rcb_lmms.models.benchmarks import load_benchmarks
from rcb_lmms.pruners import make_pruner
from rcb_lmms.runs.tasks import make_task_manager

TARGETS = parse_targets("prumerge,prumerge_plus,fastv:rank=36,fastv:rank=16,random:36,random:16")


def batches_of(encoder: ImageEncoder, tasks: list[Documents]):
    """Batches of the distinct images of each task, read document by document."""

    def distinct(documents):
        seen = set()
        for number in documents.numbers:
            for visual in documents.media(encoder.family, number):
                if visual.key not in seen:
                    seen.add(visual.key)
                    yield visual

    for documents in tasks:
        yield from encoder.batches(distinct(documents))


def bare(encoder: ImageEncoder, batches) -> None:
    for batch in batches:
        encoder.family.encode(batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ours(encoder: ImageEncoder, tasks: list[Documents], method, counted) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RCB_CACHE"] = folder
        scores = {own.name: score_pass(encoder, method, counted, own) for own in tasks}
        began = time.process_time()
        benchmark_record(method, scores, TARGETS, encoder.family.layers, None)
        return {
            "fit_cpu_s": time.process_time() - began,
            "images": sum(len(own.images) for own in scores.values()),
        }


def timed(run, *given) -> tuple[float, float, object]:
    cpu, wall = time.process_time(), time.perf_counter()
    result = run(*given)
    return time.process_time() - cpu, time.perf_counter() - wall, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="lab")
    parser.add_argument("--codebook")
    parser.add_argument("--tasks", default="pope,mme")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    loaded = load_benchmarks(options.tasks.split(","), make_task_manager())
    tasks = [documents for members in loaded.values() for documents in members.values()]
    family = load_family(options.model)
    method = make_pruner("rcb", codebook=options.codebook or default_codebook(family.name, options.model))
    counted = {target.text: target.measured for target in TARGETS if target.measured}
    needs = frozenset().union(*(own.needs for own in counted.values()))
    encoder = ImageEncoder(family, needs, batch_size=BATCH_FRAMES, store_bytes=0)
    seconds: dict[str, list[tuple[float, float]]] = {"bare": [], "ours": [], "tower": []}
    with whole_images_only():
        read = list(batches_of(encoder, tasks))
        bare(encoder, read[:2])  # warm-up, thrown away
        for _ in range(options.rounds):
            seconds["tower"].append(timed(bare, encoder, read)[:2])
            seconds["bare"].append(timed(lambda: bare(encoder, batches_of(encoder, tasks)))[:2])
            *both, facts = timed(ours, encoder, tasks, method, counted)
            seconds["ours"].append((both[0] - facts["fit_cpu_s"], both[1] - facts["fit_cpu_s"]))
    best = {way: [min(times) for times in zip(*rounds, strict=True)] for way, rounds in seconds.items()}
    for way, (cpu, wall) in best.items():
        print(f"{way:<6} {cpu:8.2f} s CPU {wall:8.2f} s")
    result = {
        "ratio": round(best["ours"][0] / best["bare"][0], 3),
        "ratio_wall": round(best["ours"][1] / best["bare"][1], 3),
        "ratio_to_tower_alone": round(best["ours"][0] / best["tower"][0], 3),
        "extra_cpu_ms_per_image": round(1000 * (best["ours"][0] - best["bare"][0]) / facts["images"], 3),
        "fit_cpu_s": round(facts["fit_cpu_s"], 3),
        "documents": sum(map(len, tasks)),
        "images": facts["images"],
        "device": str(family.device),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
