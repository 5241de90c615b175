"""Questions per second on the laboratory's POPE: a literal loop in the field's manner against this package.

The literal loop asks one question at a time and encodes the image twice for each: once to count its tokens, once to
answer. Both use the same weights, the same pruner and the same questions, and must give the same answers.

    python benchmarks/pope_throughput.py [--images 8] [--keep 36] [--batch-size 32]

The last line is one JSON object; its figures are ratios measured in this one run.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from rcb_lmms.budget import Budget
from rcb_lmms.engine.encoding import ImageEncoder
from rcb_lmms.engine.generation import generate
from rcb_lmms.families import load_family
from rcb_lmms.lab.scene_questions import absent_phrases, pope_question, present_phrases
from rcb_lmms.lab.scenes import make_scene
from rcb_lmms.pruners import make_pruner

OPTIONS = {"max_new_tokens": 16, "do_sample": False}
SUFFIX = "\nAnswer the question using a single word or phrase."


def questions_about(images: int) -> list[tuple[object, str]]:
    """`(image, prompt)` pairs, 18 per image, as POPE asks them."""
    asked = []
    for number in range(images):
        scene = make_scene("test", number)
        image = scene.image()
        phrases = [*present_phrases(scene)[:3]] * 3 + [
            phrase
            for category in ("random", "popular", "adversarial")
            for phrase in absent_phrases(scene, category)[:3]
        ]
        asked += [(image, pope_question(scene, phrase).text + SUFFIX) for phrase in phrases]
    return asked


def literal(family, pruner, asked) -> list[str]:
    answers = []
    for image, text in asked:
        for _ in range(2):
            ((view,),) = family.encode([family.open(image)], pruner.needs)
            packed = family.pack_selected([view], [pruner.choose(view)])
        answers += generate(family, [family.embed(family.prompt(text), [packed])], OPTIONS).texts
    return answers


def ours(family, pruner, asked, batch_size: int) -> list[str]:
    encoder, answers = ImageEncoder(family, pruner.needs), []
    for begin in range(0, len(asked), batch_size):
        batch = asked[begin : begin + batch_size]
        packed = encoder.packed([family.open(image) for image, _ in batch], pruner)
        prompts = [family.embed(family.prompt(text), [own]) for (_, text), own in zip(batch, packed, strict=True)]
        answers += generate(family, prompts, OPTIONS).texts
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--keep", type=int, default=36)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    family, asked = load_family("lab"), questions_about(options.images)
    result = {"questions": len(asked), "keep": options.keep, "batch_size": options.batch_size}
    for name, arguments in (("none", {}), ("rcb", {"codebook": "lab-llava", "budget": Budget.tokens(options.keep)})):
        pruner = make_pruner(name, **arguments)
        seconds, answers = {}, {}
        ours(family, pruner, asked[: options.batch_size], options.batch_size)  # warm-up, thrown away
        for way, run in (("literal", literal), ("ours", lambda *given: ours(*given, options.batch_size))):
            began = time.perf_counter()
            answers[way] = run(family, pruner, asked)
            seconds[way] = time.perf_counter() - began
            print(f"{name:<5} {way:<8} {len(asked) / seconds[way]:8.1f} questions/s")
        result[f"{name}_speedup"] = round(seconds["literal"] / seconds["ours"], 2)
        result[f"{name}_equal_answers"] = answers["literal"] == answers["ours"]
    print(json.dumps(result | {"threads": torch.get_num_threads(), "device": str(family.device)}))


if __name__ == "__main__":
    main()
