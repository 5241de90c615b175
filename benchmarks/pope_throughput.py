"""Questions per second: a literal loop in the field's manner, this package without shared prefixes, and with them.

The literal loop asks one question at a time and encodes the image twice for each: once to count its tokens, once to
answer. All three use the same weights, the same pruner and the same questions, and must give the same answers. Then a
random language model of 0.3 billion parameters shows what sharing alone saves where 576 or 64 visual tokens stand
before 18 questions an image.

    python benchmarks/pope_throughput.py [--images 8] [--keep 36] [--batch-size 32]

The last line is one JSON object; its figures are ratios of CPU seconds and of seconds, measured in this one run.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from tabulate import tabulate

from rcb_lmms import Question, Session
from rcb_lmms.budget import Budget
from rcb_lmms.engine.generation import generate
from rcb_lmms.engine.prefix import PrefixCache
from rcb_lmms.families import load_family
from rcb_lmms.families.packed import Prompt
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
    return [answer.strip() for answer in answers]


def ours(family, pruner, asked, batch_size: int, prefix_cache: str) -> list[str]:
    session = Session(family, pruner, batch_size=batch_size, prefix_cache=prefix_cache)
    questions = [Question(text, [image]) for image, text in asked]
    return [answer.text for answer in session.answer(questions, max_new_tokens=16)]


def measured(ways: dict[str, Callable[[], list]]) -> dict[str, Any]:
    """CPU seconds and seconds of each way, and whether all answers are equal."""
    found, answers = {}, []
    for name, run in ways.items():
        wall, cpu = time.perf_counter(), time.process_time()
        answers.append(run())
        found[name] = {"cpu_s": time.process_time() - cpu, "s": time.perf_counter() - wall}
    return found | {"equal_answers": all(own == answers[0] for own in answers)}


def random_model(tokens: int, images: int = 4, each: int = 18) -> dict[str, Any]:
    """What sharing alone saves, on random prompts of a random Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, **sizes)).eval()
    family = SimpleNamespace(model=model, tokenizer=load_family("lab").tokenizer)
    prompts = []
    for image in range(images):
        prefix = torch.randn(20 + tokens, 1024)
        for _ in range(each):
            rest = torch.randn(int(torch.randint(10, 20, ())), 1024)
            prompts.append(Prompt(torch.cat([prefix, rest]), prefix=len(prefix), prefix_name=image))

    def run(prefixes: PrefixCache | None) -> list[list[str]]:
        options = {"max_new_tokens": 2, "do_sample": False}
        batches = (prompts[begin : begin + 8] for begin in range(0, len(prompts), 8))
        return [generate(family, batch, options, prefixes=prefixes).texts for batch in batches]

    return measured({"whole": lambda: run(None), "shared": lambda: run(PrefixCache(family, always=True))})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--keep", type=int, default=36)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    family, asked = load_family("lab"), questions_about(options.images)
    found = {}
    for name, arguments in (("none", {}), ("rcb", {"codebook": "lab-llava", "budget": Budget.tokens(options.keep)})):
        pruner = make_pruner(name, **arguments)
        ours(family, pruner, asked[: options.batch_size], options.batch_size, "auto")  # warm-up, thrown away
        found[f"laboratory POPE, {name}"] = measured({
            "literal": lambda pruner=pruner: literal(family, pruner, asked),
            "whole": lambda pruner=pruner: ours(family, pruner, asked, options.batch_size, "off"),
            "shared": lambda pruner=pruner: ours(family, pruner, asked, options.batch_size, "auto"),
        })  # fmt: skip
    for tokens in (576, 64):
        found[f"random 0.3 B, {tokens} tokens"] = random_model(tokens)
    rows = []
    for name, own in found.items():
        row = {"": name, "equal answers": own["equal_answers"]}
        for way in ("literal", "whole"):
            if way in own:
                row[f"{way} / shared, CPU"] = own[way]["cpu_s"] / own["shared"]["cpu_s"]
                row[f"{way} / shared, clock"] = own[way]["s"] / own["shared"]["s"]
        rows.append(row)
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps({"questions": len(asked), **vars(options), **machine, "ways": found}))


if __name__ == "__main__":
    main()
