"""What choosing costs beside the vision tower: every method before the language model at LLaVA-1.5's size.

    python benchmarks/method_overhead.py [--repeats 5]

The tower is CLIP ViT-L/14 at 336 pixels with random weights; what a method reads of it (attention of single blocks,
keys) is timed with the method. Seconds are medians of repeats in this one run; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from transformers import CLIPVisionConfig, CLIPVisionModel

from rcb_lmms import Budget, Codebook, make_pruner
from rcb_lmms.families.towers import WITH_CLS, optional_fields
from rcb_lmms.pruners import PRUNERS
from rcb_lmms.pruners.tokens import VisualTokens

KEEP, SIDE, WIDTH, MODEL_WIDTH = 64, 24, 1024, 4096
# What stands outside the tower: texts and their space.
TEXTS = {"text_embeddings": (1, 768), "patch_embeddings": (SIDE**2, 768), "question_embeddings": (12, MODEL_WIDTH)}


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median of repeats, after one that is thrown away."""
    run()
    spent = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    model = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=336, patch_size=14)).eval()
    tower, pixels = getattr(model, "vision_model", model), torch.randn(1, 3, 336, 336)
    with torch.inference_mode():
        states = model(pixels, output_hidden_states=True).hidden_states
        whole = seconds(lambda: model(pixels, output_hidden_states=True), repeats)
        features = torch.randn(SIDE**2, MODEL_WIDTH)
        texts = {name: torch.randn(shape) for name, shape in TEXTS.items()}
        rows = []
        for name, cls in PRUNERS.items():
            if cls.stage != "view" or not cls.budgets or name == "evs":
                continue
            codebook = Codebook(torch.randn(454, MODEL_WIDTH), {"id": "random", "model": "random"})
            own = {"codebook": codebook} if name == "rcb" else {}
            pruner = make_pruner(name, budget=Budget.tokens(KEEP), **own)
            needs = set(pruner.needs) & WITH_CLS - set(TEXTS)

            def choose(pruner=pruner, needs=needs) -> None:
                fields = {field: rows[0] for field, rows in optional_fields(tower, states, -2, True, needs).items()}
                given = {field: texts[field] for field in texts if field in pruner.needs}
                pruner.choose(VisualTokens(features, (SIDE, SIDE), **fields, **given), "What is it?")

            spent = seconds(choose, repeats)
            rows.append({"method": name, "milliseconds": 1000 * spent, "share of the tower": spent / whole})
    print(f"tower: {1000 * whole:.0f} ms an image")
    print(tabulate(rows, headers="keys", floatfmt=".3g"))
    machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps({"tower_ms": 1000 * whole, "keep": KEEP, "repeats": repeats, **machine, "rows": rows}))


if __name__ == "__main__":
    main()
