"""What a user could run instead: the field's literal loop, lmms-eval's own model, and vLLM, beside this package.

    python benchmarks/engines.py [--images 12] [--repeats 3] [--vllm-python VENV/bin/python]

Two models answer 18 questions about each image, as POPE asks them (a third of them stand there twice more). On the
laboratory's LLaVA-1.5: `literal` asks one question at a time and encodes its image twice, to count its tokens and to
answer; `llava_hf` is lmms-eval's own model, unpruned (it needs decord); `whole` is this package where every question
is answered by itself (`prefix_cache=off`); `ours` is this package. On a LLaVA of random weights, whose language model
has 0.3 billion parameters and reads 576 visual tokens: `whole`, `ours`, and `vllm`, unpruned with prefix caching, in
an environment of its own.

All of one model use the same weights and, round by round, the same new questions; rounds take turns, and medians count,
in processor seconds of a way's processes and on the clock. Loading is not counted. Rows without their package are left
out, which is said. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tabulate import tabulate

from rcb_lmms import Budget, Codebook, Question, Session, make_pruner
from rcb_lmms.engine.generation import generate
from rcb_lmms.families import load_family
from rcb_lmms.lab.checkpoint import lab_checkpoint
from rcb_lmms.lab.scene_questions import absent_phrases, pope_question, present_phrases
from rcb_lmms.lab.scenes import make_scene
from rcb_lmms.resources import machine

KEEP, NEW_TOKENS = 36, 16  # of the laboratory's 144 visual tokens
RANDOM_KEEP, RANDOM_TOKENS, WIDTH = 64, 2, 1024
SUFFIX = "\nAnswer the question using a single word or phrase."

Way = Callable[[Sequence[Question]], list[str]]


def questions_about(images: range) -> list[Question]:
    """18 questions an image, as POPE asks them: what is there is asked about once in each of three categories."""
    asked = []
    for number in images:
        scene = make_scene("test", number)
        image = scene.image()
        phrases = [*present_phrases(scene)[:3]] * 3 + [
            phrase
            for category in ("random", "popular", "adversarial")
            for phrase in absent_phrases(scene, category)[:3]
        ]
        asked += [Question(pope_question(scene, phrase).text + SUFFIX, [image]) for phrase in phrases]
    return asked


def literal(family: Any, pruner: Any) -> Way:
    """One question at a time, its image encoded to count its tokens, and again to answer."""

    def answers(asked: Sequence[Question]) -> list[str]:
        told = []
        for question in asked:
            for _ in range(2):
                ((view,),) = family.encode([family.open(question.images[0])], pruner.needs)
                packed = family.pack_selected([view], [pruner.choose(view)])
            prompt = family.embed(family.prompt(question.text), [packed])
            told += generate(family, [prompt], {"max_new_tokens": NEW_TOKENS, "do_sample": False}).texts
        return [text.strip() for text in told]

    return answers


def session(family: Any, pruner: Any, new_tokens: int, **options: Any) -> Way:
    """This package; a session of its own for each round, so that nothing is known of the questions."""
    return lambda asked: _told(Session(family, pruner, **options), asked, new_tokens)


def _told(ready: Session, asked: Sequence[Question], new_tokens: int) -> list[str]:
    answers = ready.answer(asked, max_new_tokens=new_tokens)
    assert not (errors := [answer.error for answer in answers if answer.error]), errors[0]
    return [answer.text for answer in answers]


def llava_hf() -> Way:
    """lmms-eval's own, on the laboratory's checkpoint; it asks one question at a time."""
    from lmms_eval.models import get_model

    model = get_model("llava_hf")(pretrained=str(lab_checkpoint()), device="cpu", device_map="cpu", dtype="float32")
    model._rank = 1  # whose progress bars are not shown

    def answers(asked: Sequence[Question]) -> list[str]:
        model.task_dict = {"pope": {"test": asked}}
        requests = [
            SimpleNamespace(args=("", lambda own: own.turns, {"max_new_tokens": NEW_TOKENS}, number, "pope", "test"))
            for number in range(len(asked))
        ]
        return [result.text.strip() for result in model.generate_until(requests)]

    return answers


def save_random(folder: Path) -> str:
    """A LLaVA of random weights: a small tower of 576 visual tokens, a language model of 0.3 billion parameters."""
    import torch
    from transformers import (
        AutoProcessor,
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    torch.manual_seed(0)
    processor = AutoProcessor.from_pretrained(lab_checkpoint())
    processor.image_processor = CLIPImageProcessorPil()
    processor.image_processor.size = {"shortest_edge": 336}
    processor.image_processor.crop_size = {"height": 336, "width": 336}
    processor.patch_size = 14
    own = load_family("lab", weights=False).model.config
    tower = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"hidden_size": WIDTH, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16}
    ids = {name: getattr(own.text_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower, image_size=336, patch_size=14),
        text_config=LlamaConfig(**text, **ids, vocab_size=own.text_config.vocab_size, max_position_embeddings=2048),
        image_token_id=own.image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["eos_token_id"]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def processor_seconds() -> float:
    """Of this process and of those that it has started and that run."""
    spent, ticks = time.process_time(), os.sysconf("SC_CLK_TCK")
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # gone since
            continue
        parents[int(stat.parent.name)] = (int(fields[1]), (int(fields[11]) + int(fields[12])) / ticks)
    for parent, seconds in parents.values():
        while parent in parents and parent != os.getpid():
            parent = parents[parent][0]
        spent += seconds if parent == os.getpid() else 0
    return spent


def measured(ways: dict[str, Way], images: int, repeats: int, warm_up: int) -> dict[str, dict[str, list]]:
    """Seconds and answers of each way, round by round, after a smaller round that is thrown away."""
    found: dict[str, dict[str, list]] = {name: {"cpu_s": [], "s": [], "answers": []} for name in ways}
    for number in range(-1, repeats):
        begin = (number + 1) * images
        asked = questions_about(range(begin, begin + (images if number >= 0 else warm_up)))
        for name, answers in ways.items():
            cpu, wall = processor_seconds(), time.perf_counter()
            told = answers(asked)
            if number >= 0:
                found[name]["cpu_s"].append(processor_seconds() - cpu)
                found[name]["s"].append(time.perf_counter() - wall)
                found[name]["answers"] += told
    return found


def laboratory(images: int, repeats: int) -> dict[str, Any]:
    family = load_family("lab")
    pruned = make_pruner("rcb", codebook="lab-llava", budget=Budget.tokens(KEEP))
    ways = {}
    for name, pruner in (("unpruned", make_pruner("none")), (f"RCB, {KEEP} of 144 tokens", pruned)):
        ways[f"literal, {name}"] = literal(family, pruner)
        if name == "unpruned" and importlib.util.find_spec("decord"):
            ways["llava_hf, unpruned"] = llava_hf()
        ways[f"whole, {name}"] = session(family, pruner, NEW_TOKENS, batch_size=32, prefix_cache="off")
        ways[f"ours, {name}"] = session(family, pruner, NEW_TOKENS, batch_size=32)
    return measured(ways, images, repeats, warm_up=2)


def random_model(folder: str, images: int, repeats: int, vllm_python: str | None) -> dict[str, Any]:
    import torch

    family = load_family(folder)
    book = Codebook(torch.randn(454, WIDTH, generator=torch.Generator().manual_seed(5)), {"id": "random", "model": "-"})
    pruned = make_pruner("rcb", codebook=book, budget=Budget.tokens(RANDOM_KEEP))
    ways = {}
    for name, pruner in (("576 tokens", make_pruner("none")), (f"RCB, {RANDOM_KEEP} tokens", pruned)):
        ways[f"whole, {name}"] = session(family, pruner, RANDOM_TOKENS, prefix_cache="off")
        ways[f"ours, {name}"] = session(family, pruner, RANDOM_TOKENS)
    found = measured(ways, images, repeats, warm_up=1)
    if vllm_python:
        given = [vllm_python, __file__, "--vllm", folder, "--random-images", str(images), "--repeats", str(repeats)]
        root = str(Path(__file__).parents[1])
        own = {**os.environ, "PYTHONPATH": root}
        done = subprocess.run(given, env=own, check=True, stdout=subprocess.PIPE, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]  # vLLM says behind it that it ends
        found["vllm, 576 tokens"] = json.loads(lines[-1])
    return found


def vllm(folder: str, images: int, repeats: int) -> None:
    """What the other environment does: one engine answers all rounds, whose images it has not seen before."""
    ready = Session(load_family(folder), make_pruner("none"), engine="vllm")
    found = measured({"vllm": lambda asked: _told(ready, asked, RANDOM_TOKENS)}, images, repeats, warm_up=1)
    print(json.dumps(found["vllm"]))


def table(found: dict[str, dict[str, Any]], questions: int) -> list[dict[str, Any]]:
    """One row a way: medians, and how many times as long it takes as this package unpruned, and with RCB."""
    ours = [name for name in found if name.startswith("ours")]
    rows = []
    for name, own in found.items():
        kind = name.partition(", ")[2]
        like = found.get(f"ours, {kind}", found[ours[0]])["answers"]
        row: dict[str, Any] = {"way": name}
        row |= {unit: statistics.median(own[unit]) for unit in ("cpu_s", "s")}
        row |= {"cpu_s range": max(own["cpu_s"]) - min(own["cpu_s"]), "questions / cpu_s": questions / row["cpu_s"]}
        for other in ours:
            for unit in ("cpu_s", "s"):
                row[f"{unit} / {other.split(', ')[1]}"] = row[unit] / statistics.median(found[other][unit])
        row["equal answers"] = f"{sum(a == b for a, b in zip(own['answers'], like, strict=True))} of {len(like)}"
        rows.append(row)
    return rows


def told(name: str, found: dict[str, dict[str, Any]], images: int) -> dict[str, Any]:
    """What was found for one model, once it is printed as a table."""
    asked = questions_about(range(images))
    facts = {"questions": len(asked), "distinct": len({(own.text, id(own.images[0])) for own in asked})}
    rows = table(found, len(asked))
    print(f"\n{name}: {len(asked)} questions about {images} images, {facts['distinct']} of them distinct")
    print(tabulate(rows, headers="keys", floatfmt=".2f"), flush=True)
    return {name: {**facts, "rows": rows}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=12, help="of each round on the laboratory's model")
    parser.add_argument("--random-images", type=int, default=2, help="of each round on the random one; 0 leaves it out")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vllm-python", help="Python of an environment with vLLM")
    parser.add_argument("--vllm", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.vllm:
        return vllm(options.vllm, options.random_images, options.repeats)
    result: dict[str, Any] = {"machine": machine(), "repeats": options.repeats, "settings": {}}
    result["settings"] |= told("laboratory POPE", laboratory(options.images, options.repeats), options.images)
    if options.random_images:
        with tempfile.TemporaryDirectory() as folder:
            given = (save_random(Path(folder)), options.random_images, options.repeats, options.vllm_python)
            result["settings"] |= told("random weights, 0.3 B", random_model(*given), options.random_images)
    if not importlib.util.find_spec("decord"):
        print("\nwithout llava_hf, which needs the Python package decord")
    if not options.vllm_python:
        print("\nwithout vLLM, for want of --vllm-python")
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
