"""Seconds of a codebook's experiments on an image: a literal loop, this package as it was at `fceb859`, and as it is.

The literal loop is the field's manner: one `generate` of eight tokens for every experiment, four for each probed patch
and one for the whole view (385 for 96 patches), and the image encoded before each of them. The older package, whose
experiments came in batches that shared nothing, is taken from this repository's history. All work on the same weights
and images and must find the same statistics and the same candidates.

    python benchmarks/codebook_build.py [--images 2] [--random-probes 12]

The laboratory's model comes in two rows: as its answers are, none of which begins with an article and which end after
a word, and as if every answer began with one, so that its second token is read. The third row is a random language
model of 0.27 billion parameters over 576 random tokens, of which 12 are probed. On the clock, a build of today in a
process on each core (`accelerate launch`), which the older package did not have, stands beside the others, whose one
process may use all cores. The last line is one JSON object; its figures are seconds an image of this one run.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from rcb_lmms.codebook import probe
from rcb_lmms.codebook.probe import ImageStatistics, probed_patches, window
from rcb_lmms.codebook.select import candidates, patch_scores
from rcb_lmms.codebook.settings import BuildSettings, settings_for
from rcb_lmms.families import load_family
from rcb_lmms.families.llava import Llava
from rcb_lmms.lab.scenes import make_scene
from rcb_lmms.pruners.base import VisualTokens

BEFORE = "fceb859"
ROOT = Path(__file__).parents[1]
CASES = {
    "laboratory": "",
    "laboratory, all articles": "every answer's first token is skipped",
    "random, 576 tokens": "",
}


def prepared(case: str, images: int, probes: int) -> tuple[Llava, list[Any], BuildSettings]:
    """The model, its images (or, for the random model, their tokens) and settings."""
    family = load_family("lab")
    if not case.startswith("random"):
        return (
            family,
            [make_scene("codebook", number).image() for number in range(images)],
            settings_for("llava", "lab"),
        )
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16}
    own = family.model.config
    text = LlamaConfig(vocab_size=own.text_config.vocab_size, max_position_embeddings=8192, **sizes)
    config = LlavaConfig(text_config=text, vision_config=own.vision_config, image_token_index=own.image_token_id)
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 3
    views = [VisualTokens(torch.randn(576, 1024), (24, 24), cls_similarity=torch.rand(576)) for _ in range(images)]
    return Llava(model, family.processor, pretrained="random"), views, settings_for("llava", "lab", probes=probes)


def view_of(family: Llava, image: Any) -> VisualTokens:
    return (
        image
        if isinstance(image, VisualTokens)
        else family.encode([family.open(image, "base")], {"cls_similarity"})[0][0]
    )


def built(family: Llava, images: list[Any], settings: BuildSettings) -> list[ImageStatistics]:
    return [probe.measure(family, view_of(family, image), settings, 32) for image in images]


def literal(
    family: Llava, images: list[Any], settings: BuildSettings, spent: dict[str, float]
) -> list[ImageStatistics]:
    """One `generate` at a time; `spent` is told the CPU seconds of encoding and the number of generations."""
    ids, pad = family.prompt(settings.prompt), family.pad_embedding
    found = []

    def logits(image: Any, change: Any) -> torch.Tensor:
        began = time.process_time()
        tokens = change(view_of(family, image).features)
        spent["encode_cpu_s"] += time.process_time() - began
        spent["generations"] += 1
        prompt = family.embed(ids, [family.pack_base(tokens)])
        steps = family.model.generate(
            inputs_embeds=prompt.embeds[None], attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True,
        ).logits  # fmt: skip
        skips = probe.is_article(family.tokenizer, int(steps[0][0].argmax()), settings.article)
        return steps[min(skips, len(steps) - 1)][0].float()

    def ablated(tokens: torch.Tensor, slots: list[int]) -> torch.Tensor:
        without = tokens.clone()
        without[slots] = pad
        return without

    for image in images:
        view = view_of(family, image)
        index = probed_patches(view, settings.probes)
        whole = logits(image, lambda tokens: tokens)
        rows: list[list[torch.Tensor]] = [[], [], [], []]
        for patch in index:
            slots = window(patch, *view.grid)
            changes = (
                lambda tokens, patch=patch: tokens[[patch]],
                lambda tokens, slots=slots: tokens[slots],
                lambda tokens, slots=slots, patch=patch: ablated(tokens, [patch])[slots],
                lambda tokens, slots=slots: ablated(tokens, slots),
            )
            for kind, change in zip(rows, changes, strict=True):
                kind.append(logits(image, change))
        single, region, region_ablated, whole_ablated = map(torch.stack, rows)
        (s, s_ids), (r, r_ids), (w, w_ids) = (own.topk(50) for own in (single, region, whole[None]))
        parts = (s_ids, s, r_ids, r, region_ablated.gather(1, r_ids), w_ids, w, whole_ablated[:, w_ids[0]])
        found.append(ImageStatistics(torch.tensor(index), view.features[index], *parts))
    return found


def work(case: str, images: int, probes: int, way: str, out: Path) -> None:
    """One way of one case in a process of its own; statistics go to a folder, seconds to standard output."""
    family, given, settings = prepared(case, images, probes)
    if CASES[case]:
        probe.is_article = lambda *_: True
    spent = {"encode_cpu_s": 0.0, "generations": 0}
    with torch.inference_mode():
        probe.measure(family, view_of(family, given[0]), settings, 32, [0, 1])  # warm-up, thrown away
        cpu, wall = time.process_time(), time.perf_counter()
        found = literal(family, given, settings, spent) if way == "literal" else built(family, given, settings)
        seconds = {"cpu_s": time.process_time() - cpu, "s": time.perf_counter() - wall}
    for number, own in enumerate(found):
        (out / f"{number}.safetensors").write_bytes(own.to_bytes())
    print(json.dumps({name: value / images for name, value in (seconds | (spent if way == "literal" else {})).items()}))


def compared(case: str, options: argparse.Namespace, before: Path) -> dict[str, Any]:
    """Seconds per image of the ways, in processes that take turns, and how far their results are apart."""
    found: dict[str, Any] = {}
    results: dict[str, list[ImageStatistics]] = {}
    images = 1 if case.startswith("random") else options.images
    given = ["--images", str(images), "--random-probes", str(options.random_probes)]
    cores = len(os.sched_getaffinity(0))
    ways = {"literal": (ROOT, 1), "before": (before, 1), "now": (ROOT, 1), "cores": (ROOT, cores)}
    for way, (package, processes) in ways.items():
        own = {**os.environ, "PYTHONPATH": str(package), **({"OMP_NUM_THREADS": "1"} if way == "cores" else {})}
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--work", case, way, folder, *given]
            started = [subprocess.Popen(command, env=own, cwd=package, stdout=subprocess.PIPE, text=True)
                       for _ in range(processes)]  # fmt: skip
            said = [process.communicate()[0] for process in started]
            if any(process.returncode for process in started):
                sys.exit(f"a process of {case}, {way}, failed")
            told = [json.loads(text.splitlines()[-1]) for text in said]
            results[way] = [ImageStatistics.read(Path(folder) / f"{number}.safetensors") for number in range(images)]
        # Processes that work side by side share the clock.
        found[way] = told[0] | {"s": max(one["s"] for one in told) / processes, "processes": processes}
    settings = settings_for("llava", "lab")
    for way in ("literal", "before", "cores"):
        pairs = list(zip(results[way], results["now"], strict=True))
        scores = [(patch_scores(one, settings), patch_scores(other, settings)) for one, other in pairs]
        found[way]["scores_apart"] = max(
            float((a - b).abs().max()) for one, other in scores for a, b in zip(one, other, strict=True)
        )
        found[way]["same_candidates"] = all(
            torch.equal(candidates(one, settings).patches, candidates(other, settings).patches) for one, other in pairs
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2, help="of the laboratory; the random model has one")
    parser.add_argument("--random-probes", type=int, default=12)
    parser.add_argument("--case", action="append", choices=CASES, help="all by default; repeatable")
    parser.add_argument("--work", nargs=3, metavar=("CASE", "WAY", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        case, way, out = options.work
        work(case, options.images, options.random_probes, way, Path(out))
        return
    with tempfile.TemporaryDirectory() as before:
        archive = subprocess.run(
            ["git", "archive", BEFORE, "rcb_lmms"], cwd=ROOT, capture_output=True, check=True
        ).stdout
        tarfile.open(fileobj=io.BytesIO(archive)).extractall(before, filter="data")
        found = {case: compared(case, options, Path(before)) for case in options.case or CASES}
    rows = []
    for case, own in found.items():
        loop, now = own["literal"], own["now"]["cpu_s"]
        rows.append({
            "": case,
            "literal, CPU s": loop["cpu_s"],
            "generations": loop["generations"],
            f"{BEFORE}, CPU s": own["before"]["cpu_s"],
            "now, CPU s": now,
            "literal / now": loop["cpu_s"] / now,
            "... encoded once": (loop["cpu_s"] - loop["encode_cpu_s"]) / now,
            f"{BEFORE} / now": own["before"]["cpu_s"] / now,
            "clock: literal / now on all cores": loop["s"] / own["cores"]["s"],
            f"clock: {BEFORE} / now on all cores": own["before"]["s"] / own["cores"]["s"],
            "same candidates": all(one.get("same_candidates", True) for one in own.values()),
        })  # fmt: skip
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps({"images": options.images, "random_probes": options.random_probes, **machine, "cases": found}))


if __name__ == "__main__":
    main()
