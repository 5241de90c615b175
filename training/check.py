"""Does the laboratory's model look at the image, and at the objects in it? Accuracy under controls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from rcb_lmms.errors import exit_on_user_error
from rcb_lmms.lab.checkpoint import lab_checkpoint
from rcb_lmms.lab.scene_questions import KINDS_OF_QUESTION, PHRASE_SUFFIX, pope
from rcb_lmms.lab.scenes import IMAGE_SIZE_PX, Scene, make_scene
from rcb_lmms.lab.wordings import Question
from training.language import TOKENS, Wording
from training.packing import pack, run_packed

ASKED_KINDS = ("pope", "existence", "color", "count", "position", "side", "OCR", "probe")
# Each control says which tokens of a scene stay; "blank" shows a grey image instead.
CONTROLS: dict[str, Callable[[Scene, np.random.Generator], np.ndarray]] = {
    "unpruned": lambda scene, random: np.arange(TOKENS),
    "blank": lambda scene, random: np.arange(TOKENS),
    "background": lambda scene, random: np.flatnonzero(scene.patch_owner().ravel() < 0),
    "objects": lambda scene, random: np.flatnonzero(scene.patch_owner().ravel() >= 0),
    "random 25%": lambda scene, random: np.sort(random.permutation(TOKENS)[:36]),
    "random 11%": lambda scene, random: np.sort(random.permutation(TOKENS)[:16]),
}


def asked_of(scene: Scene) -> list[Question]:
    """A fixed, balanced set of questions about a scene: every kind, and POPE in its three categories."""
    random = np.random.default_rng(scene.index)
    asked = [q for category in ("random", "popular", "adversarial") for q in pope(scene, random, category)]
    return asked + [q for kind in ASKED_KINDS[1:] for q in KINDS_OF_QUESTION[kind](scene, random)]


def score(model, wording: Wording, scenes: list[Scene], features, control: str, batch: int = 16) -> dict[str, float]:
    """Accuracy of the first answer token per kind of question; `features (n, 144, d)` are projected tokens.

    The probe counts as right if it names a kind that is in the scene.
    """
    import torch

    hits: dict[str, list[bool]] = defaultdict(list)
    for first in range(0, len(scenes), batch):
        part = scenes[first : first + batch]
        kept = [CONTROLS[control](scene, np.random.default_rng(scene.index)) for scene in part]
        asked = [asked_of(scene) for scene in part]
        prompts = [[wording(q, "" if q.kind == "probe" else PHRASE_SUFFIX) for q in questions] for questions in asked]
        packed = pack(wording.prefix, [len(tokens) for tokens in kept], prompts, wording.pad)
        visible = features.new_zeros(len(part), packed.image_slots, features.shape[-1])
        for row, tokens in enumerate(kept):
            visible[row, : len(tokens)] = features[first + row][torch.from_numpy(tokens)]
        with torch.no_grad():
            answers = model.lm_head(run_packed(model, packed, visible)).argmax(-1).cpu().numpy()
        for row, (scene, questions) in enumerate(zip(part, asked, strict=True)):
            answered = packed.weights[row] > 0
            starts = np.flatnonzero(answered & ~np.roll(answered, 1))
            for question, at in zip(questions, starts, strict=True):
                nouns = {item.kind for item in scene.objects} if question.kind == "probe" else {question.answer}
                hits[question.kind].append(int(answers[row, at]) in {wording.word(noun) for noun in nouns})
    return {kind: float(np.mean(hits[kind])) for kind in ASKED_KINDS if hits[kind]}


def check(model_path: str | Path, *, scenes: int = 100, split: str = "test", device: str = "cpu") -> dict:
    """Accuracy of a checkpoint per control and kind of question, as `{control: {kind: accuracy}}`; prints the table.

    Wanted: blank at chance, background near chance, objects near unpruned, random tokens well below objects.
    """
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    processor = AutoProcessor.from_pretrained(model_path)
    model = LlavaForConditionalGeneration.from_pretrained(model_path, dtype=torch.float32).to(device).eval()
    examples = [make_scene(split, index) for index in range(scenes)]
    seen = _image_features(model, processor, [scene.pixels() for scene in examples])
    grey = np.full((IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3), 128, np.uint8)
    blank = _image_features(model, processor, [grey]).expand_as(seen)
    wording = Wording(processor.tokenizer)
    table = {
        control: score(model, wording, examples, blank if control == "blank" else seen, control) for control in CONTROLS
    }
    print(format_table(table))
    return table


def _image_features(model, processor, images: list[np.ndarray]):
    import torch

    parts = []
    for first in range(0, len(images), 32):
        pixels = processor.image_processor(images=images[first : first + 32], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            parts += model.get_image_features(pixel_values=pixels.to(model.device)).pooler_output
    return torch.stack(parts)


def format_table(table: dict[str, dict[str, float]]) -> str:
    """The controls as lines of text, accuracies in percent."""
    head = f"{'':<12}" + "".join(f"{kind:>10}" for kind in ASKED_KINDS)
    rows = [
        f"{name:<12}" + "".join(f"{100 * row.get(kind, np.nan):>10.1f}" for kind in ASKED_KINDS)
        for name, row in table.items()
    ]
    return "\n".join([head, *rows])


def main(
    model: Annotated[str, typer.Option(help="lab, or the folder of a laboratory checkpoint.")] = "lab",
    scenes: Annotated[int, typer.Option(help="Held-out scenes.", min=1)] = 100,
) -> None:
    """Print the controls: unpruned, blank image, background alone, objects alone, random tokens."""
    with exit_on_user_error():
        check(lab_checkpoint("llava") if model == "lab" else model, scenes=scenes)


if __name__ == "__main__":
    typer.run(main)
