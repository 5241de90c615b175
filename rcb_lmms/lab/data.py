"""The laboratory's benchmarks as files, in the exact schemas of the true ones.

`write_data` makes a tree in which lmms-eval's own tasks (`pope`, `mme`, ...) run unmodified and offline when it is the
current directory: `datasets` prefers a local folder of the data set's name. One writer function per benchmark.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from rcb_lmms.errors import UserError
from rcb_lmms.files import unwritable, write_atomic
from rcb_lmms.lab.questions import (
    KINDS_OF_QUESTION,
    YES_NO_SUFFIX,
    absent_phrases,
    pope_question,
    present_phrases,
)
from rcb_lmms.lab.scenes import Scene, make_large_scene, make_scene

ORGANISATION, FORMER_ORGANISATION = "lmms-lab-encoder", "lmms-lab"
POPE_CATEGORIES = ("random", "popular", "adversarial")
# Declared are the subtasks that the shipped model answers: counting, places and digits are below 90%.
MME_SUBTASKS = ("existence", "color")
_TEXT = "string"


def write_data(
    out: str | Path,
    *,
    family: str = "llava",
    seed_split: str = "test",
    benchmarks: Sequence[str] | None = None,
    pope_images: int = 40,
    mme_images: int = 40,
    muirbench_items: int = 40,
    mvbench_videos: int = 40,
) -> Path:
    """Write the benchmarks a family's laboratory model answers (or those named) below `out`.

    LLaVA-NeXT is shown large scenes with small objects. Sizes are images of POPE (18 questions each), images per MME
    subtask (two each), questions per MuirBench task, and videos per MVBench subtask.

    Raises:
        UserError: a benchmark is unknown, or the folder cannot be written.
    """
    out = Path(out)
    benchmarks = FAMILY_BENCHMARKS[family] if benchmarks is None else benchmarks
    unknown = sorted(set(benchmarks) - set(BENCHMARKS))
    if unknown:
        raise UserError(
            wanted="benchmarks of the laboratory",
            found=", ".join(unknown),
            allowed=", ".join(BENCHMARKS),
            next_step="name only the allowed ones",
        )
    sizes = {"pope": pope_images, "mme": mme_images, "muirbench": muirbench_items, "mvbench": mvbench_videos}
    for name in benchmarks:
        BENCHMARKS[name](out, seed_split, sizes[name], make_large_scene if family == "llava_next" else make_scene)
    if (out / ORGANISATION).is_dir():
        _link_former_organisation(out)
    return out


def write_pope(out: Path, split: str, images: int, draw: Callable[[str, int], Scene] = make_scene) -> None:
    """POPE: three categories of six questions per image, half answered by yes; configurations default and Full."""
    rows: dict[str, list[dict]] = {category: [] for category in POPE_CATEGORIES}
    for index in range(images):
        scene = draw(split, index)
        random = np.random.default_rng(index)
        image = _png(scene)
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
    schema = dict.fromkeys(("id", "question_id", "question", "answer", "image_source", "category"), _TEXT)
    everything = [row for part in numbered.values() for row in part]
    everything = [{**row, "id": str(n)} for n, row in enumerate(everything)]
    _write_configurations(out / ORGANISATION / "POPE", {"default": {"test": everything}, "Full": numbered}, schema)


def write_mme(out: Path, split: str, images: int, draw: Callable[[str, int], Scene] = make_scene) -> None:
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
            image, identity = _png(scene), f"{subtask}/{index:04d}.png"
            for question in pair:
                text = question.text + YES_NO_SUFFIX
                row = {"question_id": identity, "question": text, "answer": question.answer}
                rows.append({**row, "category": subtask, "image": image})
    schema = dict.fromkeys(("question_id", "question", "answer", "category"), _TEXT)
    _write_configurations(out / ORGANISATION / "MME", {"default": {"test": rows}}, schema)


def write_muirbench(out: Path, split: str, items: int, draw: Callable[[str, int], Scene] = make_scene) -> None:
    """MuirBench: questions about two to four images, which stand first or where the text has them."""
    from rcb_lmms.lab.media_data import muirbench_rows

    schema = dict.fromkeys(("idx", "task", "image_relation", "image_type", "question", "answer"), _TEXT)
    rows = muirbench_rows(split, items)
    _write_configurations(
        out / "MUIRBENCH" / "MUIRBENCH", {"default": {"test": rows}}, schema | {"options": [_TEXT]}, "image_list"
    )


def write_mvbench(out: Path, split: str, videos: int, draw: Callable[[str, int], Scene] = make_scene) -> None:
    """MVBench: the subtasks with laboratory videos; `rcb_lmms.local_videos` lets lmms-eval find the files."""
    from rcb_lmms.lab.media_data import VIDEO_FOLDERS, mvbench_rows

    schema = {**dict.fromkeys(("video", "question", "answer"), _TEXT), "candidates": [_TEXT]}
    rows = {name: {"train": mvbench_rows(split, name, videos, out / "mvbench_video")} for name in VIDEO_FOLDERS}
    _write_configurations(out / "OpenGVLab" / "MVBench", rows, schema, None)


BENCHMARKS: dict[str, Callable[..., None]] = {
    "pope": write_pope,
    "mme": write_mme,
    "muirbench": write_muirbench,
    "mvbench": write_mvbench,
}
FAMILY_BENCHMARKS = {
    "llava": ("pope", "mme"),
    "llava_next": ("pope", "mme"),
    "llava_onevision": ("pope", "mme", "muirbench", "mvbench"),
}


def codebook_images(out_dir: str | Path, count: int, family: str = "llava") -> list[Path]:
    """Write `count` scenes of the codebook split as PNG files, and return their paths; large ones for LLaVA-NeXT.

    Raises:
        UserError: the folder cannot be written.
    """
    out = Path(out_dir)
    draw = make_large_scene if family == "llava_next" else make_scene
    return [write_atomic(out / f"scene-{n:05d}.png", _png(draw("codebook", n))["bytes"]) for n in range(count)]


def _png(scene: Scene) -> dict:
    buffer = io.BytesIO()
    scene.image().save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def _write_configurations(
    folder: Path, configurations: dict[str, dict[str, list[dict]]], schema: dict, images: str | None = "image"
) -> None:
    """One parquet file per configuration and split, and the card by which `datasets` finds them.

    `schema` maps columns to types, a list of one type for lists; `images` is the column of pictures, if any.
    """
    from datasets import Dataset, Features, Image, List, Value

    columns = {name: List(Value(kind[0])) if isinstance(kind, list) else Value(kind) for name, kind in schema.items()}
    if images is not None:
        columns[images] = List(Image()) if images.endswith("_list") else Image()
    features = Features(columns)
    card = ["---", "configs:"]
    for name, splits in configurations.items():
        card += [f"- config_name: {name}", "  data_files:"]
        for split, rows in splits.items():
            buffer = io.BytesIO()
            Dataset.from_list(rows, features=features).to_parquet(buffer)
            # `datasets` keys its cache by names alone: without the digest another tree's rows would be served.
            path = f"{name}/{split}-{hashlib.sha256(buffer.getvalue()).hexdigest()[:12]}.parquet"
            for old in (folder / name).glob(f"{split}-*.parquet"):
                old.unlink()
            write_atomic(folder / path, buffer.getvalue())
            card += [f"  - split: {split}", f"    path: {path}"]
    write_atomic(folder / "README.md", "\n".join([*card, "---", ""]))


def _link_former_organisation(out: Path) -> None:
    """Older releases of lmms-eval ask for the same data under the organisation's former name."""
    link = out / FORMER_ORGANISATION
    if link.is_symlink() or link.exists():
        return
    try:
        link.symlink_to(ORGANISATION, target_is_directory=True)
    except OSError as error:
        raise unwritable(link, error) from error
