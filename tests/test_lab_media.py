"""The laboratory's large scenes, moving scenes, several images and lettered choices."""

import io
import re

import av
import numpy as np
import pytest
import torch

from rcb_lmms.lab import data
from rcb_lmms.lab.choices import SEVERAL_KINDS, VIDEO_KINDS, several_choices, video_choices
from rcb_lmms.lab.media_data import MUIRBENCH_TASKS, VIDEO_FRAMES, mp4_of
from rcb_lmms.lab.moving import DIRECTIONS, FRAMES, make_moving_scene
from rcb_lmms.lab.scenes import GRID, IMAGE_SIZE_PX, make_large_scene, make_scene
from training import examples, language, views
from training.model import make_model, make_processor
from training.packing import pack, run_packed


@pytest.fixture(scope="module", params=["llava_next", "llava_onevision"])
def started(request):
    """An untrained model of a family with its processor and wording."""
    torch.manual_seed(0)
    processor = make_processor(request.param)
    model = make_model(processor.tokenizer, request.param).eval()
    return request.param, model, processor, language.Wording(processor.tokenizer)


def test_large_scenes_show_every_object_in_the_base_view_and_in_one_tile():
    sizes = set()
    for index in range(80):
        scene = make_large_scene("test", index)
        sizes.add((scene.size[0] // IMAGE_SIZE_PX, scene.size[1] // IMAGE_SIZE_PX))
        example = examples.large("test", index)
        seen = [set(panel.owner.tolist()) - {-1} for panel in example.panels]
        assert seen[0] == set(range(len(scene.objects)))
        assert sorted(number for tile in seen[1:] for number in tile) == list(range(len(scene.objects)))
    assert sizes == {(2, 1), (1, 2), (2, 2), (3, 1), (1, 3)}


def test_panels_are_what_the_image_processor_cuts():
    processor = make_processor("llava_next").image_processor
    for index in range(5):
        scene = make_large_scene("test", index)
        (pixels,) = processor(images=[scene.image()], return_tensors="pt")["pixel_values"]
        ours = language_pixels(scene)
        torch.testing.assert_close(ours, pixels[: len(ours)], atol=0.02, rtol=0)


def language_pixels(scene):
    from training.vision import preprocess

    return preprocess(np.stack(scene.panel_pixels()))


def test_moving_scenes_move_as_they_say_and_touch_nothing():
    counts, directions = set(), set()
    for index in range(60):
        moving = make_moving_scene("test", index)
        first, last = (moving.frame(number).objects[0].centre for number in (0, FRAMES - 1))
        way = np.subtract(last, first)
        step = DIRECTIONS[moving.direction]
        assert way @ step == np.abs(way).sum() >= 40
        owners = [moving.frame(number).patch_owner() for number in range(FRAMES)]
        assert {tuple(np.unique(owner)) for owner in owners} == {tuple(range(-1, len(moving.objects)))}
        counts.add(len(moving.objects))
        directions.add(moving.direction)
    assert counts == {1, 2, 3}
    assert directions == set(DIRECTIONS)


def test_the_right_option_is_the_only_right_one():
    for seed in range(200):
        random = np.random.default_rng(seed)
        example = examples.several("test", [3 * seed, 3 * seed + 1, 3 * seed + 2])
        kind = SEVERAL_KINDS[seed % len(SEVERAL_KINDS)]
        for choice in several_choices(example.objects, kind, random):
            holds = [true_of(option, choice.text, example) for option in choice.options]
            assert holds == [number == choice.right for number in range(len(holds))], (choice, example.objects)
            assert len(set(choice.options)) == len(choice.options)
            assert choice.letter == "ABCD"[choice.right]


def true_of(option, text, example):
    """What a reader of the words would say."""
    objects = example.objects
    if match := re.match(r"What color is the (\w+) in", text):
        return [item.colour for item in objects if item.kind == match[1]] == [option]
    if match := re.match(r"Is there a ([\w ]+) in any", text):
        return (option == "yes") == any(match[1] in (item.kind, item.phrase) for item in objects)
    return option in {item.phrase for item in objects}


def test_letters_of_video_choices_are_spread():
    right = []
    for seed in range(120):
        moving = make_moving_scene("test", seed)
        for choice in video_choices(
            moving.objects, moving.direction, True, VIDEO_KINDS[seed % 4], np.random.default_rng(seed)
        ):
            right.append(choice.right)
    assert {0, 1, 2, 3} == set(right)


def test_pooled_tokens_are_the_mean_of_four_behind_the_projector(started):
    family, model, _, wording = started
    if family == "llava_next":
        example, side = examples.large("test", 1), GRID
    else:
        example, side = examples.video("test", 1, frames=4), GRID // 2
    view = views.make_view(example, GRID * GRID, wording, np.random.default_rng(3), 1.0)
    features = np.random.default_rng(0).normal(size=(len(example.panels), GRID * GRID, 128)).astype(np.float16)
    with torch.no_grad():
        rows = language.projected(model, [view], [features])[0]
        whole = model.model.multi_modal_projector(torch.from_numpy(features).float())
        if side != GRID:
            whole = model.model.apply_pooling(whole)
    sight = torch.from_numpy((view.panel >= 0) & ~view.blanked)
    expected = torch.cat(list(whole))
    if family == "llava_onevision":  # frames in time order, one newline at the end
        assert (view.panel[:-1] >= 0).all()
        assert view.panel[-1] == views.NEWLINE
        torch.testing.assert_close(rows[:-1][sight[:-1]], expected[sight[:-1]], atol=1e-4, rtol=0)
    newlines = torch.from_numpy(view.panel == views.NEWLINE)
    torch.testing.assert_close(rows[newlines], model.model.image_newline.expand(int(newlines.sum()), -1))


def test_a_view_is_what_the_processor_lays_out(started):
    """Words, images and newlines stand where chat template and Hugging Face's own packing put them."""
    family, _, processor, wording = started
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    if family == "llava_next":
        example, text = examples.large("test", 2), "<image>\nQ"
        pictures = [example.scene.image()]
    else:
        example = examples.several("test", [4, 5])
        text, pictures = "<image>\n<image>\nQ", [make_scene("test", index).image() for index in (4, 5)]
    laid = None
    for seed in range(40):  # one of the packings is the native one
        view = views.make_view(example, GRID * GRID, wording, np.random.default_rng(seed), 1.0)
        ids = [*wording.prefix] + [
            image if panel != views.TEXT else word for panel, word in zip(view.panel, view.words, strict=True)
        ]
        expected = processor(images=[pictures], text=f"USER: {text}", return_tensors="pt")["input_ids"][0].tolist()
        head = expected[: len(expected) - len(wording.text("\nQ"))]
        if ids == head:
            laid = view
    assert laid is not None
    if family == "llava_next":
        columns = example.scene.size[0] // IMAGE_SIZE_PX
        line = laid.panel[GRID * GRID :][: columns * GRID + 1]
        assert line.tolist() == [1 + tile for tile in range(columns) for _ in range(GRID)] + [views.NEWLINE]


def test_packed_choices_learn(started):
    """One step of training lowers the loss of the very batch, for every medium of the family."""
    family, model, _, wording = started
    media = set()
    for seed in range(12):
        random = np.random.default_rng(seed)
        batch = language.draw_examples(family, "train", [1, 2], random)
        media.add(batch[0].medium)
        drawn = [views.make_view(example, 8, wording, random, 0.5) for example in batch]
        packed = language.pack_views(drawn, wording)
        features = [random.normal(size=(len(example.panels), GRID * GRID, 128)) for example in batch]
        with torch.no_grad():
            hidden = run_packed(model, packed, language.projected(model, drawn, features))
            loss, _ = language.answer_loss(model, hidden, packed)
        assert torch.isfinite(loss)
        assert packed.weights.sum() == pytest.approx(sum(len(view.questions) for view in drawn), rel=1e-5)
    assert media == ({"tiled"} if family == "llava_next" else {"doubled", "several", "video"})


def test_videos_are_files_that_show_the_scene():
    moving = make_moving_scene("test", 5)
    with av.open(io.BytesIO(mp4_of(moving))) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == VIDEO_FRAMES
    for number in (0, VIDEO_FRAMES - 1):
        drawn = moving.frame(number, VIDEO_FRAMES).pixels().astype(float)
        assert np.abs(frames[number] - drawn).mean() < 6
    assert mp4_of(moving) == mp4_of(moving)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    out = tmp_path_factory.mktemp("media")
    return data.write_data(out, family="llava_onevision", benchmarks=["muirbench"], sizes={"muirbench": 2})


def test_muirbenchs_tree_has_the_true_schema(tree, tmp_path):
    from datasets import Image, List, load_dataset

    (file,) = (tree / "MUIRBENCH/MUIRBENCH/default").glob("*.parquet")
    rows = load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path))
    assert rows.features["image_list"] == List(Image())
    assert rows.features["options"].feature.dtype == "string"
    assert set(rows.column_names) == {
        "idx", "task", "image_relation", "image_type", "question", "answer", "options", "image_list"
    }  # fmt: skip
    assert set(rows["task"]) == set(MUIRBENCH_TASKS.values())
    assert all(row["answer"] in "ABCD"[: len(row["options"])] for row in rows)
    assert all(row["question"].count("<image>") in (0, len(row["image_list"])) for row in rows)
    assert not (tree / "lmms-lab-encoder").is_symlink()
    assert pack([1], [2], [[]], 0).tokens.shape == (1, 3)
