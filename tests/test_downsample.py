"""Smaller views through the vision towers, against the Hugging Face towers on pixels that Pillow made smaller."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import tiny_next
import tiny_onevision
import torch
from PIL import Image

from rcb_lmms.budget import Budget
from rcb_lmms.engine.encoding import ImageEncoder
from rcb_lmms.engine.session import Trace
from rcb_lmms.errors import UserError
from rcb_lmms.families import load_family
from rcb_lmms.families.images import Visual
from rcb_lmms.pruners import make_pruner
from rcb_lmms.regress.kept import kept_sets
from rcb_lmms.report.pictures import kept_tokens_picture

SIDE_PX, PATCH_PX = tiny.SIDE_PX, tiny.PATCH_PX


@pytest.fixture(scope="module")
def families(checkpoint, tmp_path_factory):
    folders = {
        "llava": checkpoint,
        "llava_next": tiny_next.save_next(tmp_path_factory.mktemp("next")),
        "llava_onevision": tiny_onevision.save_onevision(tmp_path_factory.mktemp("onevision")),
    }
    return {name: load_family(str(folder)) for name, folder in folders.items()}


def downsample(count):
    return make_pruner("downsample", budget=Budget.tokens(count))


def smaller(pixels, rows, columns):
    """Views `(v, 3, side, side)` made smaller by Pillow, channel by channel, in floating point."""
    size = columns * PATCH_PX, rows * PATCH_PX
    channels = [Image.fromarray(channel) for channel in pixels.reshape(-1, SIDE_PX, SIDE_PX).numpy()]
    resized = np.stack([np.asarray(channel.resize(size, Image.Resampling.BICUBIC)) for channel in channels])
    return torch.from_numpy(resized).unflatten(0, (-1, 3))


def tower(family, pixels):
    """What the model itself makes of views of any size, `(v, n, d)`."""
    model = family.model.model
    with torch.inference_mode():
        hidden = model.vision_tower(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
        hidden = hidden.hidden_states[model.config.vision_feature_layer]
        return model.multi_modal_projector(hidden[:, 1:] if getattr(family, "has_cls", False) else hidden)


def features(views):
    return torch.stack([view.features for view in views])


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision"])
def test_a_view_is_what_the_tower_makes_of_its_smaller_pixels(name, families):
    family, image = families[name], tiny.random_image(1, 112, 56)
    pixels = family.processor.image_processor([image], return_tensors="pt")["pixel_values"].float()
    pixels = pixels.reshape(-1, 3, SIDE_PX, SIDE_PX)  # LLaVA's one view; elsewhere a base view and two tiles
    assert len(pixels) == (1 if name == "llava" else 3)
    (views,) = family.encode([image], size=downsample(6).grid if name == "llava" else downsample(18).grid)
    assert {(view.grid, len(view), view.native) for view in views} == {((2, 3), 6, 16)}
    expected = tower(family, smaller(pixels, 2, 3))
    torch.testing.assert_close(features(views), expected, rtol=0, atol=2e-4)
    other = tower(family, smaller(pixels, 3, 2))
    assert not torch.allclose(features(views), other, atol=2e-2)


def test_frames_are_counted_behind_their_pooling(families):
    family = families["llava_onevision"]
    frames = tuple(tiny.random_image(seed, 64, 48) for seed in range(3))
    (views,) = family.encode([Visual(frames, "video")], size=lambda native, views: downsample(2).grid(native))
    assert {(view.grid, len(view), view.native) for view in views} == {((1, 2), 2, 4)}
    process = family.processor.image_processor
    pixels = torch.cat([process([frame], return_tensors="pt")["pixel_values"][0][:1] for frame in frames])
    rows = tower(family, smaller(pixels.float(), 2, 4)).transpose(1, 2).unflatten(2, (2, 4))
    # Half the side of an even grid, bilinear: means of two by two.
    expected = torch.nn.functional.avg_pool2d(rows, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(features(views), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision"])
def test_views_of_the_full_size_are_the_same_bit_for_bit(name, families):
    family = families[name]
    visuals = [Visual((tiny.random_image(0, 112, 56),)), Visual((tiny.random_image(1, 56, 56),), "base")]
    if name == "llava_onevision":
        visuals.append(Visual((tiny.random_image(2, 64, 48),), "video"))
    whole, same = family.encode(visuals), family.encode(visuals, size=lambda native, views: native)
    for own, other in zip(whole, same, strict=True):
        assert torch.equal(features(own), features(other))
        assert [view.grid for view in own] == [view.grid for view in other]


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision"])
def test_the_tower_works_on_the_smaller_view_alone(name, families, monkeypatch):
    family, seen = families[name], []
    layer = family.model.model.vision_tower.encoder.layers[0]
    monkeypatch.setattr(family, "tower_batch", 2)
    hook = layer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).shape[:2]), with_kwargs=True
    )
    visuals = [Visual((tiny.random_image(seed, 112, 56),)) for seed in range(2)]
    ImageEncoder(family, frozenset()).packed(visuals, downsample(4))
    hook.remove()
    views, cls = (2, 1) if name == "llava" else (6, 1)
    if name == "llava_onevision":
        cls = 0
    assert {length for _, length in seen} == {4 + cls}
    assert sum(count for count, _ in seen) == views


def test_visuals_of_unlike_sizes_share_a_call_and_come_out_as_alone(families):
    family = families["llava_onevision"]
    visuals = [
        Visual((tiny.random_image(0, 112, 56),)),  # three views
        Visual((tiny.random_image(1, 56, 56),), "base"),
        Visual(tuple(tiny.random_image(seed, 64, 48) for seed in range(2, 5)), "video"),
        Visual((tiny.random_image(5, 112, 112),)),  # five views
    ]
    encoder = ImageEncoder(family, frozenset(), per="image")
    together = encoder.packed(visuals, downsample(12))
    # 4 of each of 3, 12 as 3 x 4, at most the four of a pooled frame, and 2 of each of 5.
    assert [(own.native, own.retained) for own in together] == [(48, 12), (16, 12), (12, 12), (80, 10)]
    for visual, own in zip(visuals, together, strict=True):
        (alone,) = ImageEncoder(family, frozenset(), per="image").packed([visual], downsample(12))
        torch.testing.assert_close(own.embeds, alone.embeds, rtol=0, atol=1e-5)
    # Views of the full size beside smaller ones of the same visuals: neither is taken for the other.
    (chosen, *_), (again, *_) = (
        encoder.packed(visuals[:1], own) for own in (make_pruner("stride", budget=Budget.tokens(12)), downsample(12))
    )
    assert torch.equal(again.embeds, together[0].embeds)
    assert not torch.allclose(chosen.embeds, again.embeds, atol=1e-3)
    (small,) = encoder.views(visuals[:1], downsample(12))
    assert [len(own) for own in small] == [4, 4, 4]
    sets = kept_sets(Trace(*encoder.choices(visuals[:1], downsample(12)), {}, {}))
    assert [(own.native, own.kept) for own in sets] == [(4, frozenset(range(4)))] * 3


def test_a_picture_of_kept_tokens_is_refused(family, tmp_path):
    with pytest.raises(UserError, match="each of its tokens is a new one"):
        kept_tokens_picture(family, {"downsample": downsample(4)}, [tiny.random_image(0)], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
