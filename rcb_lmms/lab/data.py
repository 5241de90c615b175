"""The laboratory's benchmarks as files, in the exact schemas of the true ones.

`write_data` makes a tree in which lmms-eval's own tasks (`pope`, `mme`, ...) and this package's run unmodified and
offline when it is the current directory: `datasets` prefers a local folder of the data set's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from rcb_lmms.errors import UserError
from rcb_lmms.files import unwritable, write_atomic
from rcb_lmms.lab.caption_data import write_flickr30k, write_nocaps
from rcb_lmms.lab.image_data import (
    ORGANISATION,
    write_mmbench,
    write_mme,
    write_pope,
    write_realworldqa,
    write_seed,
)
from rcb_lmms.lab.media_data import write_mantis, write_muirbench, write_mvbench
from rcb_lmms.lab.scenes import make_large_scene, make_scene
from rcb_lmms.lab.tree import png

FORMER_ORGANISATION = "lmms-lab"
BENCHMARKS: dict[str, Callable[..., None]] = {
    "pope": write_pope,
    "mme": write_mme,
    "mmbench": write_mmbench,
    "seed": write_seed,
    "realworldqa": write_realworldqa,
    "nocaps": write_nocaps,
    "flickr30k": write_flickr30k,
    "mantis": write_mantis,
    "muirbench": write_muirbench,
    "mvbench": write_mvbench,
}
# Images of POPE (18 questions each), NoCaps and Flickr30k; images per subtask of MME (two questions each); questions
# per task of MuirBench; videos per subtask of MVBench; else questions, MMBench's before their options are rotated.
DEFAULT_SIZES = {
    "pope": 40,
    "mme": 40,
    "mmbench": 60,
    "seed": 60,
    "realworldqa": 60,
    "nocaps": 60,
    "flickr30k": 60,
    "mantis": 60,
    "muirbench": 40,
    "mvbench": 10,
}
# This package's tasks that ask them.
TASKS = {
    "pope": "rcb_pope",
    "mme": "rcb_mme",
    "mmbench": "rcb_mmbench_en_dev",
    "seed": "rcb_seed_image",
    "realworldqa": "rcb_realworldqa",
    "nocaps": "rcb_nocaps_val",
    "flickr30k": "rcb_flickr30k",
    "mantis": "rcb_mantis",
    "muirbench": "rcb_muirbench",
    "mvbench": "rcb_mvbench",
}
# The models of the other families were taught one image at a time.
SEVERAL_IMAGES = ("mantis", "muirbench", "mvbench")


def write_data(
    out: str | Path,
    *,
    family: str = "llava",
    seed_split: str = "test",
    benchmarks: Sequence[str] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Path:
    """Write all ten benchmarks (or those named) below `out`.

    Args:
        out: the folder, which must then be the current one.
        family: `llava_next` is shown large scenes with small objects where a question has one image.
        seed_split: of the scenes, any name but those that models and codebooks are made from.
        benchmarks: some of `BENCHMARKS`.
        sizes: instead of those in `DEFAULT_SIZES`.

    Raises:
        UserError: a family, benchmark or size is unknown or impossible, or the folder cannot be written.
    """
    from rcb_lmms.lab.checkpoint import FAMILIES

    out, sizes = Path(out), dict(sizes or {})
    benchmarks = tuple(BENCHMARKS if benchmarks is None else benchmarks)
    _check_known("family of the laboratory", [family], FAMILIES)
    _check_known("benchmarks of the laboratory", [*benchmarks, *sizes], BENCHMARKS)
    if wrong := [f"{name}={size}" for name, size in sizes.items() if size < 1]:
        raise UserError(
            wanted="sizes of benchmarks",
            found=", ".join(wrong),
            allowed="whole numbers from 1",
            next_step="name larger ones, or leave the benchmark out",
        )
    for name in benchmarks:
        BENCHMARKS[name](out, seed_split, (DEFAULT_SIZES | sizes)[name], _drawn(family))
    if (out / ORGANISATION).is_dir():
        _link_former_organisation(out)
    return out


def family_tasks(family: str, benchmarks: Iterable[str] = BENCHMARKS) -> list[str]:
    """This package's tasks for the benchmarks that a family's laboratory model was taught to answer."""
    return [TASKS[name] for name in benchmarks if family == "llava_onevision" or name not in SEVERAL_IMAGES]


def codebook_images(out_dir: str | Path, count: int, family: str = "llava") -> list[Path]:
    """Write `count` scenes of the codebook split as PNG files, and return their paths; large ones for LLaVA-NeXT.

    Raises:
        UserError: the folder cannot be written.
    """
    out, draw = Path(out_dir), _drawn(family)
    return [write_atomic(out / f"scene-{n:05d}.png", png(draw("codebook", n))["bytes"]) for n in range(count)]


def _drawn(family: str):
    return make_large_scene if family == "llava_next" else make_scene


def _check_known(wanted: str, given: Sequence[str], known: Iterable[str]) -> None:
    if unknown := sorted(set(given) - set(known)):
        raise UserError(
            wanted=wanted,
            found=", ".join(unknown),
            allowed=", ".join(known),
            next_step="name only the allowed ones",
        )


def _link_former_organisation(out: Path) -> None:
    """Older releases of lmms-eval ask for the same data under the organisation's former name."""
    link = out / FORMER_ORGANISATION
    if link.is_symlink() or link.exists():
        return
    try:
        link.symlink_to(ORGANISATION, target_is_directory=True)
    except OSError as error:
        raise unwritable(link, error) from error
