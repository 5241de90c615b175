"""Drift in half precision: answers and logits of batches and shared prefixes against one question at a time.

In float32 all three give the same answers; in half precision sums are rounded in another order. The laboratory's POPE
is asked in each dtype: one by one with whole prompts, in batches with whole prompts, and in batches behind shared
prefixes. The last two are compared with the first, and the first with float32.

    python benchmarks/half_precision.py [--images 20] [--batch-size 32] [--device cpu]

The last line is one JSON object: for each dtype and way the answers that differ and the largest difference of a logit
of the first token, in units of its standard deviation over the vocabulary.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from engines import questions_about
from tabulate import tabulate

from rcb_lmms import Budget, Question, Session, make_pruner
from rcb_lmms.engine.options import Generation
from rcb_lmms.families import load_family

DTYPES = ("float32", "bfloat16", "float16")
WAYS = {
    "one by one": {"batch_size": 1, "prefix_cache": "off"},
    "batches": {"prefix_cache": "off"},
    "shared prefixes": {"prefix_cache": "on"},
}


def answered(session: Session, questions: list[Question]) -> dict[str, tuple[str, torch.Tensor]]:
    """For each distinct question its answer and the logits `(vocabulary,)` of the first token."""
    model, first = session.family.model, []

    def watched(**arguments: Any) -> torch.Tensor:
        output = type(model).generate(model, **arguments, output_logits=True, return_dict_in_generate=True)
        first.extend(output.logits[0].float().cpu())
        return output.sequences

    model.generate = watched
    try:
        given = dict(session.stream(questions, Generation.parse("pope", {"max_new_tokens": 16})))
    finally:
        del model.generate
    # Answers come in the order in which their prompts were put to the model.
    return {answer.asked: (answer.text, logits) for answer, logits in zip(given.values(), first, strict=True)}


def compared(expected: dict[str, Any], found: dict[str, Any]) -> dict[str, float]:
    pairs = [(expected[name], found[name]) for name in expected]
    drift = max(float((logits - own).abs().max() / logits.std()) for (_, logits), (_, own) in pairs)
    return {"answers that differ": sum(a != b for (a, _), (b, _) in pairs), "largest drift": drift}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    questions = list({(id(own.images[0]), own.text): own for own in questions_about(range(options.images))}.values())
    pruner = make_pruner("rcb", codebook="lab-llava", budget=Budget.tokens(36))
    found, exact = {}, None
    for dtype in DTYPES:
        family, single = load_family("lab", dtype=dtype, device=options.device), None
        for way, arguments in WAYS.items():
            own = answered(Session(family, pruner, **{"batch_size": options.batch_size, **arguments}), questions)
            exact = exact or own
            found[f"{dtype}, {way}"] = compared(single or exact, own)
            single = single or own
    rows = [{"": name, **own} for name, own in found.items()]
    print(tabulate(rows, headers="keys", floatfmt=".2g"))
    print(json.dumps({"questions": len(questions), **vars(options), "torch": torch.__version__, "found": found}))


if __name__ == "__main__":
    main()
