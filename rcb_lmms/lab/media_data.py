"""The laboratory's benchmarks about several images and videos: Mantis-Eval, MuirBench and MVBench."""

from __future__ import annotations

import fractions
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rcb_lmms.files import write_atomic
from rcb_lmms.lab import wordings
from rcb_lmms.lab.choices import SEVERAL_KINDS, several_choices, video_choices
from rcb_lmms.lab.image_data import Draw
from rcb_lmms.lab.moving import MovingScene, make_moving_scene
from rcb_lmms.lab.scene_questions import COUNT_WORDS, open_question
from rcb_lmms.lab.scenes import NUMBER, Scene, SceneObject, generator, make_scene
from rcb_lmms.lab.tree import IMAGE, TEXT, columns, png, write_configurations

# Kind of question -> MuirBench's name for the task.
MUIRBENCH_TASKS = {
    "attribute": "Attribute Similarity",
    "retrieval": "Visual Retrieval",
    "existence_choice": "Scene Understanding",
}
VIDEO_FRAMES, VIDEO_FPS = 32, 16


class Subtask(NamedTuple):
    """A subtask of MVBench: the kind of question that stands for it, its options, and where its videos lie."""

    kind: str
    options: int
    folder: str


_CLEVRER, _PERCEPTION, _STAR = "clevrer/video_validation", "perception/videos", "star/Charades_segment"
SUBTASKS = {
    "action_antonym": Subtask("moving_direction", 2, "ssv2_video_mp4"),
    "action_count": Subtask("moving_count", 3, _PERCEPTION),
    "action_localization": Subtask("object_existence", 2, "sta/sta_video_segment"),
    "action_prediction": Subtask("moving_direction", 4, _STAR),
    "action_sequence": Subtask("moving_direction", 4, _STAR),
    "character_order": Subtask("moving_count", 3, _PERCEPTION),
    "counterfactual_inference": Subtask("object_existence", 2, _CLEVRER),
    "egocentric_navigation": Subtask("moving_direction", 4, "vlnqa"),
    "episodic_reasoning": Subtask("moving_direction", 4, "tvqa/video_fps3_hq_segment"),
    "fine_grained_action": Subtask("moving_attribute", 4, "Moments_in_Time_Raw/videos"),
    "fine_grained_pose": Subtask("moving_attribute", 3, "nturgbd_convert"),
    "moving_attribute": Subtask("moving_attribute", 4, _CLEVRER),
    "moving_count": Subtask("moving_count", 3, _CLEVRER),
    "moving_direction": Subtask("moving_direction", 4, _CLEVRER),
    "object_existence": Subtask("object_existence", 2, _CLEVRER),
    "object_interaction": Subtask("moving_attribute", 3, _STAR),
    "object_shuffle": Subtask("moving_attribute", 4, _PERCEPTION),
    "scene_transition": Subtask("moving_count", 3, "scene_qa/video"),
    "state_change": Subtask("moving_attribute", 2, _PERCEPTION),
    "unexpected_action": Subtask("object_existence", 2, "FunQA_test/test"),
}
# The true benchmark has no videos for it, but folders of frames.
FRAMES_SUBTASK = "episodic_reasoning"


def write_mantis(out: Path, split: str, questions: int, draw: Draw = make_scene) -> None:
    """Mantis-Eval: lettered questions about two to four images, and every third with a short answer."""
    rows: list[dict] = []
    number = 0
    while len(rows) < questions:
        random = generator(f"{split}-mantis", number, "question")
        scenes = _scenes(f"{split}-mantis", number, random)
        objects = tuple(item for scene in scenes for item in scene.objects)
        number += 1
        short = len(rows) % 3 == 2
        kind = SEVERAL_KINDS[len(rows) // 3 % len(SEVERAL_KINDS)]
        found = _short_questions(objects, random) if short else several_choices(objects, kind, random)
        if not found:
            continue
        row = {"question": found[0].text, "images": [png(scene) for scene in scenes], "id": f"laboratory_{len(rows)}"}
        if short:
            row |= {"question_type": "short-answer", "options": [], "answer": found[0].answer}
        else:
            options = wordings.bracketed(found[0].options)
            row |= {"question_type": "multi-choice", "options": options, "answer": found[0].letter}
        rows.append(row | {"data_source": "laboratory", "category": found[0].kind})
    texts = ("id", "question_type", "question", "answer", "data_source", "category")
    schema = {**columns(texts), "options": [TEXT], "images": [IMAGE]}
    write_configurations(out / "TIGER-Lab" / "Mantis-Eval", {"default": {"test": rows}}, schema)


def write_muirbench(out: Path, split: str, items: int, draw: Draw = make_scene) -> None:
    """MuirBench: `items` questions of each task; every other text says where the images stand."""
    rows = []
    for kind, task in MUIRBENCH_TASKS.items():
        number = written = 0
        while written < items:
            random = np.random.default_rng(number)
            scenes = _scenes(f"{split}-{kind}", number, random)
            number += 1
            found = several_choices([item for scene in scenes for item in scene.objects], kind, random)
            if not found:
                continue
            (choice,) = found
            written += 1
            marks = [f" image {COUNT_WORDS[k + 1]}: <image>\n" for k in range(len(scenes))]
            row = {"idx": f"{kind}-{written}", "task": task, "image_relation": "Independent", "image_type": "Synthetic"}
            row |= {"question": ("".join(marks) if written % 2 else "") + choice.text, "answer": choice.letter}
            rows.append(row | {"options": list(choice.options), "image_list": [png(scene) for scene in scenes]})
    schema = columns(("idx", "task", "image_relation", "image_type", "question", "answer"))
    schema |= {"options": [TEXT], "image_list": [IMAGE]}
    write_configurations(out / "MUIRBENCH" / "MUIRBENCH", {"default": {"test": rows}}, schema)


def write_mvbench(out: Path, split: str, videos: int, draw: Draw = make_scene) -> None:
    """MVBench: names, files and columns are the benchmark's, the questions are those that moving scenes can answer.

    Videos are real mp4 files, for episodic_reasoning folders of frames, below `mvbench_video`;
    `rcb_lmms.runs.local_videos` lets lmms-eval find them there.
    """
    schema = {**columns(("video", "question", "answer")), "candidates": [TEXT]}
    rows = {name: {"train": _mvbench_rows(split, name, videos, out / "mvbench_video")} for name in SUBTASKS}
    write_configurations(out / "OpenGVLab" / "MVBench", rows, schema)


def mp4_of(moving: MovingScene) -> bytes:
    """Two seconds of a moving scene as an H.264 file; the same bytes each time on the same libraries."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=VIDEO_FPS, options={"crf": "14", "threads": "1"})
        stream.width = stream.height = 168
        stream.pix_fmt = "yuv420p"
        stream.time_base = fractions.Fraction(1, VIDEO_FPS)
        for number in range(VIDEO_FRAMES):
            frame = av.VideoFrame.from_ndarray(moving.frame(number, VIDEO_FRAMES).pixels(), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def _mvbench_rows(split: str, name: str, videos: int, folder: Path) -> list[dict]:
    """`videos` questions of a subtask, whose files are written below `folder`."""
    subtask, rows = SUBTASKS[name], []
    number = 0
    while len(rows) < videos:
        moving = make_moving_scene(f"{split}-{name}", number)
        random = np.random.default_rng(number)
        number += 1
        found = video_choices(moving.objects, moving.direction, True, subtask.kind, random, subtask.options)
        if not found:
            continue
        (choice,) = found
        video = f"lab_{split}_{name}_{number:04d}" + ("" if name == FRAMES_SUBTASK else ".mp4")
        _write_video(folder / subtask.folder / video, moving)
        answer = choice.options[choice.right]
        rows.append({"video": video, "question": choice.text, "candidates": list(choice.options), "answer": answer})
    return rows


def _write_video(path: Path, moving: MovingScene) -> None:
    """An mp4 file, or where the name has no ending a folder of frames, numbered from 1."""
    if path.suffix:
        write_atomic(path, mp4_of(moving))
        return
    for number in range(VIDEO_FRAMES):
        buffer = io.BytesIO()
        moving.frame(number, VIDEO_FRAMES).image().save(buffer, format="JPEG", quality=95)
        write_atomic(path / f"{number + 1:05d}.jpg", buffer.getvalue())


def _scenes(split: str, number: int, random: np.random.Generator) -> list[Scene]:
    """The two to four scenes of question `number`."""
    return [make_scene(split, 4 * number + k) for k in range(2 + int(random.integers(3)))]


def _short_questions(objects: tuple[SceneObject, ...], random: np.random.Generator) -> list:
    """An open question about all images together; with two numbers in them it would not be clear which is meant."""
    if sum(item.kind == NUMBER for item in objects) > 1:
        return []
    return open_question(Scene("", 0, "plain", objects), random)
