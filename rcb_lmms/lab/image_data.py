"""The laboratory's benchmarks about one image: POPE, MME, MMBench, SEED-Bench and RealWorldQA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rcb_lmms.lab import wordings
from rcb_lmms.lab.choices import IMAGE_KINDS, image_choices
from rcb_lmms.lab.scene_questions import (
    KINDS_OF_QUESTION,
    YES_NO_SUFFIX,
    absent_phrases,
    open_question,
    pope_question,
    present_phrases,
)
from rcb_lmms.lab.scenes import Scene, generator, make_scene
from rcb_lmms.lab.tree import IMAGE, columns, png, write_configurations
from rcb_lmms.scoring.mmbench import ROTATION
from rcb_lmms.scoring.pope import CATEGORIES as POPE_CATEGORIES

ORGANISATION = "lmms-lab-encoder"
# Declared are the subtasks that the shipped model answers: counting, places and digits are below 90%.
MME_SUBTASKS = ("existence", "color")
# Kind of question -> MMBench's names for what it asks, the finer first.
MMBENCH_CATEGORIES = {
    "attribute": ("attribute_recognition", "finegrained_perception (instance-level)"),
    "identity": ("identity_reasoning", "attribute_reasoning"),
    "retrieval": ("image_topic", "coarse_perception"),
    "existence_choice": ("object_localization", "finegrained_perception (instance-level)"),
}
# How many options questions have at most, in turn; those of existence have two.
_OPTIONS = (4, 3, 2, 4)
_SEED_LETTERS = "abcd"

Draw = Callable[[str, int], Scene]


def write_pope(out: Path, split: str, images: int, draw: Draw = make_scene) -> None:
    """POPE: three categories of six questions per image, half answered by yes; configurations default and Full."""
    rows: dict[str, list[dict]] = {category: [] for category in POPE_CATEGORIES}
    for index in range(images):
        scene = draw(split, index)
        random = np.random.default_rng(index)
        image = png(scene)
        positives = random.permutation(present_phrases(scene))[:3]
        for category in POPE_CATEGORIES:
            negatives = random.permutation(absent_phrases(scene, category))[:3]
            for phrase in np.stack([positives, negatives], 1).ravel():
                question = pope_question(scene, str(phrase))
                row = {"question": question.text, "answer": question.answer.lower(), "image": image}
                rows[category].append({**row, "image_source": f"{split}_{index:06d}", "category": category})
    # Numbers run within a category, as in the true file.
    numbered = {
        category: [{"id": str(n), "question_id": str(n + 1), **row} for n, row in enumerate(part)]
        for category, part in rows.items()
    }
    schema = columns(("id", "question_id", "question", "answer", "image_source", "category")) | {"image": IMAGE}
    everything = [row for part in numbered.values() for row in part]
    everything = [{**row, "id": str(n)} for n, row in enumerate(everything)]
    write_configurations(out / ORGANISATION / "POPE", {"default": {"test": everything}, "Full": numbered}, schema)


def write_mme(out: Path, split: str, images: int, draw: Draw = make_scene) -> None:
    """MME: for every subtask images with two questions, one answered by yes and one by no."""
    rows = []
    for subtask in MME_SUBTASKS:
        index = written = 0
        while written < images:
            scene = draw(f"{split}-{subtask}", index)
            index += 1
            pair = KINDS_OF_QUESTION[subtask](scene, np.random.default_rng(index))
            if not pair:
                continue
            written += 1
            image, identity = png(scene), f"{subtask}/{index:04d}.png"
            for question in pair:
                text = question.text + YES_NO_SUFFIX
                row = {"question_id": identity, "question": text, "answer": question.answer}
                rows.append({**row, "category": subtask, "image": image})
    schema = columns(("question_id", "question", "answer", "category")) | {"image": IMAGE}
    write_configurations(out / ORGANISATION / "MME", {"default": {"test": rows}}, schema)


def write_mmbench(out: Path, split: str, questions: int, draw: Draw = make_scene) -> None:
    """MMBench, English dev: questions of two to four options, once for every rotation; first orders come first."""
    rows = []
    for number, (scene, choice) in enumerate(_asked(f"{split}-mmbench", questions, draw, _choice)):
        count, image = len(choice.options), png(scene)
        category, ability = MMBENCH_CATEGORIES[choice.kind]
        for turn in range(count):
            options = choice.options[turn:] + choice.options[:turn]
            row = {"index": number + turn * ROTATION, "question": choice.text, "hint": "nan"}
            row |= {letter: option for letter, option in zip("ABCD", (*options, "nan", "nan"), strict=False)}
            row |= {"answer": "ABCD"[(choice.right - turn) % count], "category": category, "L2-category": ability}
            rows.append(row | {"source": "laboratory", "comment": "nan", "split": "dev", "image": image})
    rows.sort(key=lambda row: row["index"])
    texts = ("question", "hint", "answer", *"ABCD", "category", "L2-category", "source", "comment", "split")
    schema = {"index": "int64", **columns(texts), "image": IMAGE}
    write_configurations(out / ORGANISATION / "MMBench", {"en": {"dev": rows}}, schema)


def write_seed(out: Path, split: str, questions: int, draw: Draw = make_scene) -> None:
    """SEED-Bench, its questions about images: always four options."""

    def ask(number: int, scene: Scene, random: np.random.Generator) -> list:
        return image_choices(scene.objects, IMAGE_KINDS[number % 3], random)

    rows = []
    for number, (scene, choice) in enumerate(_asked(f"{split}-seed", questions, draw, ask)):
        row = {"question_id": str(number), "question": choice.text, "answer": choice.letter, "data_type": "image"}
        row |= {f"choice_{letter}": option for letter, option in zip(_SEED_LETTERS, choice.options, strict=True)}
        rows.append(row | {"data_id": f"{scene.split}_{scene.index:06d}", "image": [png(scene)]})
    texts = ("question_id", "question", "answer", "data_type", *(f"choice_{letter}" for letter in _SEED_LETTERS))
    schema = columns((*texts, "data_id")) | {"image": [IMAGE]}
    write_configurations(out / ORGANISATION / "SEED-Bench", {"default": {"test": rows}}, schema)


def write_realworldqa(out: Path, split: str, questions: int, draw: Draw = make_scene) -> None:
    """RealWorldQA: lettered questions, and every third with a word or a number for an answer."""

    def ask(number: int, scene: Scene, random: np.random.Generator) -> list:
        return open_question(scene, random) if number % 3 == 2 else _choice(number, scene, random)

    rows = []
    for number, (scene, found) in enumerate(_asked(f"{split}-realworldqa", questions, draw, ask)):
        if number % 3 == 2:
            row = {"question": wordings.realworldqa_open(found.text), "answer": found.answer}
        else:
            row = {"question": wordings.realworldqa(found), "answer": found.letter}
        rows.append(row | {"image_path": f"{number}.webp", "image": png(scene)})
    schema = columns(("question", "answer", "image_path")) | {"image": IMAGE}
    write_configurations(out / ORGANISATION / "RealWorldQA", {"default": {"test": rows}}, schema)


def _choice(number: int, scene: Scene, random: np.random.Generator) -> list:
    """A lettered question about a scene: kinds take turns, and so do numbers of options."""
    kind = IMAGE_KINDS[number % len(IMAGE_KINDS)]
    return image_choices(scene.objects, kind, random, _OPTIONS[number // len(IMAGE_KINDS) % len(_OPTIONS)])


def _asked(split: str, count: int, draw: Draw, ask: Callable[..., list]) -> Iterator[tuple[Scene, Any]]:
    """`count` scenes with what is asked about each; scenes that a question does not fit are passed over."""
    index = 0
    for number in range(count):
        found: list = []
        while not found:
            scene = draw(split, index)
            found = ask(number, scene, generator(split, index, "question"))
            index += 1
        yield scene, found[0]
