"""The laboratory's MuirBench and MVBench: several images, and videos as real mp4 files, with lettered options."""

from __future__ import annotations

import fractions
import io
from pathlib import Path

import numpy as np

from rcb_lmms.files import write_atomic
from rcb_lmms.lab.choices import several_choices, video_choices
from rcb_lmms.lab.examples import several
from rcb_lmms.lab.moving import MovingScene, make_moving_scene
from rcb_lmms.lab.questions import COUNT_WORDS
from rcb_lmms.lab.scenes import make_scene

# Kind of question -> MuirBench's name for the task.
MUIRBENCH_TASKS = {
    "attribute": "Attribute Similarity",
    "retrieval": "Visual Retrieval",
    "existence_choice": "Scene Understanding",
}
# Subtask -> where MVBench keeps its videos, below HF_HOME/mvbench_video.
VIDEO_FOLDERS = dict.fromkeys(
    ("moving_direction", "moving_count", "moving_attribute", "object_existence"), "clevrer/video_validation"
)
VIDEO_FRAMES, VIDEO_FPS = 32, 16


def muirbench_rows(split: str, items: int) -> list[dict]:
    """`items` questions of each task about two to four scenes; every other text says where the images stand."""
    rows = []
    for kind, task in MUIRBENCH_TASKS.items():
        number = written = 0
        while written < items:
            random = np.random.default_rng(number)
            first = 4 * number
            number += 1
            example = several(f"{split}-{kind}", [first + k for k in range(2 + int(random.integers(3)))])
            found = several_choices(example.objects, kind, random)
            if not found:
                continue
            (choice,) = found
            written += 1
            marks = [f" image {COUNT_WORDS[k + 1]}: <image>\n" for k in range(len(example.panels))]
            rows.append(
                {
                    "idx": f"{kind}-{written}",
                    "task": task,
                    "image_relation": "Independent",
                    "image_type": "Synthetic",
                    "question": ("".join(marks) if written % 2 else "") + choice.text,
                    "options": list(choice.options),
                    "answer": choice.letter,
                    "image_list": [_png(scene_split, index) for scene_split, index in example.keys],
                }
            )
    return rows


def mvbench_rows(split: str, subtask: str, items: int, folder: Path) -> list[dict]:
    """`items` questions of a subtask, whose videos are written below `folder`."""
    rows: list[dict] = []
    number = 0
    while len(rows) < items:
        moving = make_moving_scene(f"{split}-{subtask}", number)
        random = np.random.default_rng(number)
        number += 1
        found = video_choices(moving.objects, moving.direction, True, subtask, random)
        if not found:
            continue
        (choice,) = found
        name = f"lab_{split}_{subtask}_{number:04d}.mp4"
        write_atomic(folder / VIDEO_FOLDERS[subtask] / name, mp4_of(moving))
        answer = choice.options[choice.right]
        rows.append({"video": name, "question": choice.text, "candidates": list(choice.options), "answer": answer})
    return rows


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


def _png(split: str, index: int) -> dict:
    buffer = io.BytesIO()
    make_scene(split, index).image().save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}
