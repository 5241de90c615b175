"""Videos as a few RGB frames: which ones, and how they are read."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcb_lmms.errors import UserError, choose
from rcb_lmms.families.images import as_rgb
from rcb_lmms.files import no_file

if TYPE_CHECKING:
    from PIL.Image import Image

# Backend -> module and the package it comes with.
BACKENDS = {"pyav": ("av", "av"), "decord": ("decord", "decord"), "torchcodec": ("torchcodec", "torchcodec")}
FOLDER_FPS, FOLDER_FIRST = 3.0, 1
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

# What a reader of files is asked for: indices of frames, given how many there are and how many a second.
Choice = Callable[[int, float], list[int]]


def frame_indices(
    n_frames: int, fps: float, start: float | None, end: float | None, segments: int, first: int = 0
) -> list[int]:
    """The middle frame of each of `segments` equal parts, as MVBench's evaluation chooses them.

    `int(low + size / 2 + round(size * i))` with `low = max(first, round(start * fps))`, `high = min(round(end * fps),
    last)` and `size = (high - low) / segments`; `round` goes to even at a half, as in the original. A short video
    repeats frames.

    Args:
        n_frames: frames of the whole video.
        fps: frames per second, which only `start` and `end` need.
        start: seconds, or `None` for the beginning.
        end: seconds, or `None` for the end.
        segments: how many frames.
        first: the first frame that may be chosen, counted from 0.

    Raises:
        UserError: no frame lies between `start` and `end`, or they are given without a frame rate.
    """
    last = n_frames - 1
    bounded = start is not None or end is not None
    first = max(0, min(first, last))
    low = first if start is None else max(first, round(start * fps))
    high = last if end is None else min(round(end * fps), last)
    if high < low or (bounded and fps <= 0):
        raise UserError(
            wanted=f"frames from {start or 0:g} s to {'the end' if end is None else f'{end:g} s'}",
            found=f"a video of {n_frames} frames at {fps:g} per second",
            allowed="a video with frames and a frame rate, and a start before its end",
            next_step="check the video, and the start and end of the question",
        )
    size = (high - low) / segments
    return [int(low + size / 2 + round(size * i)) for i in range(segments)]


def placed(item: dict[str, Any]) -> tuple[str, float | None, float | None]:
    """Path, start and end of an lmms-eval chat item of type `video`, which may carry them in either of two ways."""
    inner = item["url"] if isinstance(item["url"], dict) else item
    start, end = (
        inner.get(f"video_{name}", inner.get(f"{name}_time", item.get(f"{name}_time"))) for name in ("start", "end")
    )
    return str(inner.get("url") or inner["path"]), start, end


@dataclass(frozen=True)
class VideoReader:
    """Reads `max_frames` frames of a video file, or of a folder that holds its frames.

    Frames are counted in the order of display, so parts are equal in frames, and equal in time only if the frame rate
    is constant; `start` and `end` are converted at the average rate that the backend reports. Display rotation is not
    applied. Only the chosen frames are kept in memory. A cut-off file is refused where its container lets that be
    seen (MP4); others (Matroska, AVI) are read as far as they go.

    A folder is read as the paper's code reads MVBench's: 3 frames a second, each chosen frame once, the first of all
    never chosen (MVBench numbers frames from 1; that code takes the numbers for positions from 0). Differs: frames are
    in the order of their names, numbers by value (`2.jpg` before `10.jpg`), where that code takes the order in which
    the file system lists them.

    Attributes:
        backend: `pyav`, `decord` or `torchcodec`.
        max_frames: frames per video.

    Raises:
        UserError: an unknown backend, one that is not installed, or fewer than one frame.
    """

    backend: str = "pyav"
    max_frames: int = 16

    def __post_init__(self):
        choose("video_backend", self.backend, BACKENDS)
        if self.max_frames < 1:
            raise UserError(
                wanted=f"{self.max_frames} frames per video",
                found="no frames",
                allowed="whole numbers from 1",
                next_step="max_frames_num=16",
            )
        # A backend somebody asked for is missed before the weights are loaded, the default when a video comes.
        if self.backend != "pyav":
            self._check_installed()

    def read(self, path: str | Path, start: float | None = None, end: float | None = None) -> tuple[Image, ...]:
        """RGB frames between `start` and `end`, in seconds.

        Raises:
            UserError: the backend or the file is missing, the file is no video or is cut off, or it has no frames.
        """
        path = Path(path)
        folder = os.path.isdir(path)
        if not folder and (problem := no_file(path)):
            raise _unreadable(path, problem, "download the task's videos to where the path points")

        def chosen(n_frames: int, fps: float, first: int = 0) -> list[int]:
            if not n_frames:
                raise _unreadable(path, "no frames")
            return frame_indices(n_frames, fps, start, end, self.max_frames, first)

        if folder:
            return _read_folder(path, chosen)
        self._check_installed()
        return {"pyav": _read_pyav, "decord": _read_decord, "torchcodec": _read_torchcodec}[self.backend](path, chosen)

    def _check_installed(self) -> None:
        module, package = BACKENDS[self.backend]
        if importlib.util.find_spec(module) is None:
            present = [name for name, (other, _) in BACKENDS.items() if importlib.util.find_spec(other)]
            raise UserError(
                wanted=f"read videos with {self.backend}",
                found=f"the Python package {package} is not installed",
                allowed=f"installed backends: {', '.join(present) or 'none'}",
                next_step=f"pip install {package}" + (f", or video_backend={present[0]}" if present else ""),
            )


def _read_folder(path: Path, chosen: Callable[..., list[int]]) -> tuple[Image, ...]:
    names = sorted((file for file in path.iterdir() if file.suffix.lower() in FRAME_SUFFIXES), key=_natural)
    return tuple(as_rgb(names[position]) for position in dict.fromkeys(chosen(len(names), FOLDER_FPS, FOLDER_FIRST)))


def _natural(path: Path) -> list[Any]:
    # Text and digits alternate, so that parts at one position are always of one type.
    return [int(part) if position % 2 else part for position, part in enumerate(re.split(r"(\d+)", path.name))]


def _read_pyav(path: Path, chosen: Choice) -> tuple[Image, ...]:
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise _unreadable(path, "no video stream")
            stream = container.streams.video[0]
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            # Packets are counted without decoding them: the number in a container's header can be absent or wrong.
            count = sum(packet.size > 0 for packet in container.demux(stream))
        indices = chosen(count, fps)
        frames, shown = _decode_pyav(path, set(indices))
        if shown != count:
            # A video cut out of another one can begin or end with packets that show nothing.
            indices = chosen(shown, fps)
            frames, _ = _decode_pyav(path, set(indices))
    except av.FFmpegError as error:
        raise _unreadable(path, str(error)) from error
    return tuple(frames[index] for index in indices)


def _decode_pyav(path: Path, wanted: set[int]) -> tuple[dict[int, Image], int]:
    """The wanted frames by index, and how many there are."""
    import av

    frames, shown = {}, 0
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for shown, frame in enumerate(container.decode(stream), 1):
            if shown - 1 in wanted:
                frames[shown - 1] = frame.to_image()
    return frames, shown


def _read_decord(path: Path, chosen: Choice) -> tuple[Image, ...]:
    import decord

    try:
        video = decord.VideoReader(str(path), num_threads=1)
        indices = chosen(len(video), video.get_avg_fps())
        frames = {index: video[index].asnumpy() for index in sorted(set(indices))}
    except (decord.DECORDError, RuntimeError) as error:
        raise _unreadable(path, str(error)) from error
    return _images(frames, indices)


def _read_torchcodec(path: Path, chosen: Choice) -> tuple[Image, ...]:
    try:
        from torchcodec.decoders import VideoDecoder

        # `exact` scans the file, so that the count is of frames that exist.
        video = VideoDecoder(str(path), dimension_order="NHWC", seek_mode="exact")
        indices = chosen(len(video), video.metadata.average_fps or 0)
        frames = {index: video[index].numpy() for index in sorted(set(indices))}
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise _unreadable(path, str(error)) from error
    return _images(frames, indices)


def _images(frames: dict[int, Any], indices: Iterable[int]) -> tuple[Image, ...]:
    from PIL import Image as pil

    images = {index: pil.fromarray(pixels) for index, pixels in frames.items()}
    return tuple(images[index] for index in indices)


def _unreadable(path: Path, found: str, next_step: str = "replace the file, or try another video_backend") -> UserError:
    return UserError(
        wanted=f"read the video {path}",
        found=" ".join(found.split())[:300],
        allowed="a complete video file, or a folder of frames (" + ", ".join(FRAME_SUFFIXES) + ")",
        next_step=next_step,
    )
