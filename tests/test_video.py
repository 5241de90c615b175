"""Which frames of a video are read, against a literal version of MVBench's rule, and from real files."""

from __future__ import annotations

import importlib.util
import wave

import numpy as np
import pytest
import tiny
from PIL import Image

from rcb_lmms.errors import UserError
from rcb_lmms.families.video import BACKENDS, VideoReader, frame_indices, placed

INSTALLED = [name for name, (module, _) in BACKENDS.items() if importlib.util.find_spec(module)]
# Grey level of frame i is 20 + 4 i, which codecs for video keep to within one level.
FRAMES, FPS, STEP = 50, 10, 4


def write_video(path, frames=FRAMES, times_ms=None, **options):
    """Grey frames that say their number, with frames that are stored out of order (B-frames), as real videos have."""
    from fractions import Fraction

    import av

    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 8
        stream.options = {"bf": "2"}
        if times_ms:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(frames):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 48), (20 + STEP * number,) * 3))
            if times_ms:
                frame.pts, frame.time_base = times_ms[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(frames):
    """Which frames of `write_video` these are."""
    return [round((float(np.asarray(frame).mean()) - 20) / STEP) for frame in frames]


def literal_indices(bound, fps, max_frame, first, segments):
    """The evaluation's own way to say it: no bound is one that every video lies in."""
    begin, end = bound or (-100000, 100000)
    low, high = max(first, round(begin * fps)), min(round(end * fps), max_frame)
    size = float(high - low) / segments
    return [int(low + size / 2 + np.round(size * number)) for number in range(segments)]


@pytest.mark.parametrize("bound", [None, (0, 2), (1.5, 4.26), (0.05, 0.4), (3, 1000)])
@pytest.mark.parametrize("fps", [2.0, 10, 23.976, 30])
def test_the_choice_of_frames_is_mvbenchs(bound, fps):
    for count in (7, 8, 9, 17, 100, 333, 5000):
        for segments in (1, 4, 16):
            for first in (0, 1):
                begin, end = bound or (None, None)
                if bound and round(begin * fps) > count - 1:
                    continue
                expected = literal_indices(bound, fps, count - 1, first, segments)
                found = frame_indices(count, fps, begin, end, segments, first)
                assert found == expected
                assert first <= min(found) <= max(found) < count


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        # size 0.5: halves are rounded to even, so frame 2 stands for 1.5, 2 and 2.5.
        (9, [0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5, 6, 6, 6, 7, 8]),
        # size 2: the middle of 0-2, 2-4, ...
        (33, [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31]),
        (1, [0] * 16),
        # size 6.1875: 3.09375 + round(6.1875 i)
        (100, [3, 9, 15, 22, 28, 34, 40, 46, 53, 59, 65, 71, 77, 83, 90, 96]),
    ],
)
def test_indices_counted_by_hand(count, expected):
    assert frame_indices(count, 25, None, None, 16) == expected


def test_bounds_are_seconds():
    # Frames 20 to 40: size 5.
    assert frame_indices(100, 10, 2, 4, 4) == [22, 27, 32, 37]
    assert frame_indices(100, 10, 9, None, 3) == [91, 94, 97]
    for bounds in ((11, 12), (3, 2)):
        with pytest.raises(UserError, match="100 frames at 10 per second"):
            frame_indices(100, 10, *bounds, 4)
    with pytest.raises(UserError, match="at 0 per second"):
        frame_indices(100, 0, 1, 2, 4)


@pytest.mark.parametrize("backend", INSTALLED)
@pytest.mark.parametrize("name", ["video.mp4", "video.mkv"])  # the second has no number of frames in its header
def test_files_give_the_chosen_frames_in_order_of_display(tmp_path, backend, name):
    path = write_video(tmp_path / name)
    frames = VideoReader(backend).read(path)
    assert numbers(frames) == [1, 4, 7, 10, 13, 16, 19, 22, 25, 29, 32, 35, 38, 41, 44, 47]
    assert {(frame.mode, frame.size) for frame in frames} == {("RGB", (64, 48))}
    # Seconds 1 to 3 are frames 10 to 30.
    assert numbers(VideoReader(backend, 4).read(str(path), 1, 3)) == [12, 17, 22, 27]
    assert numbers(VideoReader(backend, 3).read(path, None, 0.9)) == [1, 4, 7]


@pytest.mark.parametrize("backend", INSTALLED)
def test_backends_agree_on_pixels(tmp_path, backend):
    import av

    blocks = np.random.default_rng(0).integers(0, 256, (20, 6, 8, 3), dtype=np.uint8)
    with av.open(str(tmp_path / "blocks.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for block in blocks:
            image = Image.fromarray(block).resize((64, 48), Image.Resampling.NEAREST)
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    reference, other = (VideoReader(name, 6).read(tmp_path / "blocks.mp4") for name in ("pyav", backend))
    for first, second in zip(reference, other, strict=True):
        # Conversion to RGB is free to differ by rounding.
        assert np.abs(np.asarray(first, int) - np.asarray(second, int)).max() <= 3


def test_short_videos_repeat_frames(tmp_path):
    frames = VideoReader(max_frames=16).read(write_video(tmp_path / "short.mp4", 5))
    assert numbers(frames) == frame_indices(5, FPS, None, None, 16)
    assert len({id(frame) for frame in frames}) == 5


def test_parts_are_equal_in_frames_when_the_rate_varies(tmp_path):
    # The second half runs three times slower.
    times = [100 * n if n < 25 else 2500 + 300 * (n - 25) for n in range(FRAMES)]
    path = write_video(tmp_path / "varying.mp4", times_ms=times)
    assert numbers(VideoReader(max_frames=5).read(path)) == frame_indices(FRAMES, FPS, None, None, 5)


def test_packets_that_show_nothing_are_not_counted(tmp_path):
    """A piece cut out without encoding anew begins behind its key frame: what comes before the next one is lost."""
    import av

    with av.open(str(write_video(tmp_path / "whole.mp4"))) as source, av.open(str(tmp_path / "cut.mp4"), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in [packet for packet in source.demux(stream) if packet.size][5:]:
            packet.stream = copy
            target.mux(packet)
    found = numbers(VideoReader(max_frames=4).read(tmp_path / "cut.mp4"))
    # Frames 8 to 49 can be shown (42 of 45 packets): size 10.25.
    assert [number - 8 for number in found] == frame_indices(42, FPS, None, None, 4) == [5, 15, 25, 36]


def write_folder(folder, count, name="{}.jpg"):
    folder.mkdir()
    for number in range(1, count + 1):
        Image.new("RGB", (32, 32), (20 + STEP * number,) * 3).save(folder / name.format(number))
    (folder / "notes.txt").write_text("not a frame")
    return folder


@pytest.mark.parametrize("bound", [None, (2, 6), (0, 3.2), (11, 100)])
@pytest.mark.parametrize("count", [1, 2, 3, 17, 48])
def test_folders_are_read_as_the_release_reads_them(tmp_path, bound, count):
    """Its numbers count from 1 and are taken for positions in a listing from 0, each once: here a sorted listing."""
    folder = write_folder(tmp_path / "frames", count, "frame_{}_b.PNG")
    begin, end = bound or (None, None)
    if bound and round(3 * begin) > count - 1:
        with pytest.raises(UserError, match=f"{count} frames at 3 per second"):
            VideoReader().read(folder, begin, end)
        return
    expected = sorted(set(literal_indices(bound, 3, count - 1, 1, 16)))
    listing = list(range(1, count + 1))
    assert numbers(VideoReader().read(folder, begin, end)) == [listing[position] for position in expected]


def test_unreadable_videos_name_the_file(tmp_path):
    write_video(tmp_path / "whole.mp4", movflags="faststart")
    whole = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "headless.mp4").write_bytes(whole[len(whole) // 3 :])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "folder").mkdir()
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(1600))
    for backend in INSTALLED:
        for name in ("absent.mp4", "cut.mp4", "headless.mp4", "empty.mp4", "text.mp4", "folder", "sound.wav"):
            with pytest.raises(UserError, match=name):
                VideoReader(backend).read(tmp_path / name)
    (tmp_path / "folder" / "1.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"1\.png"):
        VideoReader().read(tmp_path / "folder")


def test_backends_that_are_not_installed_say_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "av" else None)
    for backend in ("decord", "torchcodec"):
        with pytest.raises(UserError, match=f"pip install {backend}, or video_backend=pyav"):
            VideoReader(backend)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reader = VideoReader()  # images need none
    with pytest.raises(UserError, match=r"pip install av$"):
        reader.read(write_video(tmp_path / "video.mp4"))
    assert numbers(reader.read(write_folder(tmp_path / "frames", 3))) == [2, 3]


def test_arguments_are_checked():
    with pytest.raises(UserError, match="pyav, decord, torchcodec"):
        VideoReader("opencv")
    with pytest.raises(UserError, match="max_frames_num=16"):
        VideoReader(max_frames=0)


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"type": "video", "url": "a.mp4"}, ("a.mp4", None, None)),
        ({"type": "video", "url": "a.mp4", "start_time": 1.5, "end_time": 2.0}, ("a.mp4", 1.5, 2.0)),
        ({"type": "video", "url": {"path": "a.mp4", "video_start": 0, "video_end": 3}}, ("a.mp4", 0, 3)),
        ({"type": "video", "url": {"url": "a.mp4", "video_end": 3}, "start_time": None}, ("a.mp4", None, 3)),
    ],
)
def test_where_lmms_eval_puts_start_and_end(item, expected):
    assert placed(item) == expected


def test_frames_are_images_of_one_view_to_families_without_video(family, tmp_path):
    visuals = family.open_video(write_video(tmp_path / "video.mp4", 20))
    assert [visual.role for visual in visuals] == ["base"] * 16
    assert numbers(visual.image for visual in visuals) == frame_indices(20, FPS, None, None, 16)
    views = family.encode(visuals[:3])
    assert [len(own) for own in views] == [1] * 3
    assert views[0][0].features.shape == (16, tiny.WIDTH)
