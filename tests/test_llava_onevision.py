"""LLaVA-OneVision's several images and video on a tiny checkpoint: frames of 2 x 2 tokens; tiles are in test_tiles."""

from __future__ import annotations

import pytest
import tiled
import tiny
import tiny_onevision
import torch
from PIL import Image
from tiny_onevision import WIDTH

from rcb_lmms.budget import Budget
from rcb_lmms.errors import UserError
from rcb_lmms.families import load_family
from rcb_lmms.families.base import interleave
from rcb_lmms.families.images import Visual
from rcb_lmms.families.llava_onevision import LlavaOnevision
from rcb_lmms.families.video import VideoReader
from rcb_lmms.pruners.base import check_needs
from rcb_lmms.pruners.prumerge import PruMerge
from rcb_lmms.pruners.random import RandomPruning


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_onevision.save_onevision(tmp_path_factory.mktemp("onevision"))


@pytest.fixture(scope="module")
def family(make):
    return make()


def test_several_images_are_those_of_the_unpruned_model(make):
    family = make(preprocess="native")
    images = [tiny.random_image(n, *size) for n, size in enumerate([(112, 56), (60, 81), (168, 168)])]
    text = "<image> or <image>, or this: <image>?"
    visuals = [Visual((image,), family.several) for image in images]
    prompt = tiled.assert_unpruned(family, family.prompt(text, 3), visuals, *tiled.unpruned(family, text, images))
    assert (prompt.views, prompt.visuals, prompt.native, prompt.newlines) == (3, 3, 48, 3)


@pytest.mark.parametrize("pack", ["auto", "flat", "spatial_unpad"])
def test_a_video_is_that_of_the_unpruned_model(make, pack):
    family, visual = make(preprocess="native", pack=pack), tiled.video(5)
    ids = family.chat([{"role": "user", "content": interleave("What happens?", ["video"])}])
    embeds, logits = tiled.unpruned(family, "What happens?", frames=visual.frames)
    prompt = tiled.assert_unpruned(family, ids, [visual], embeds, logits)
    assert (prompt.views, prompt.visuals, prompt.native, prompt.newlines) == (5, 1, 20, 1)


@pytest.mark.parametrize("pack", ["auto", "flat", "flat_newline", "spatial_unpad"])
def test_frames_are_packed_in_order_with_one_newline_at_the_very_end(make, pack):
    family = make(pack=pack)
    image = family.pack_selected(*tiled.marked(3, (0, 3), side=2), tiled.video(3))
    assert tiled.names(family, image) == [0, 3, 100, 103, 200, 203, "newline"]
    assert (image.native, image.retained, image.views) == (12, 6, 3)


def test_several_images_are_stretched_or_padded(make):
    image = tiny.random_image(2, 90, 40)
    square = Image.new("RGB", (90, 90), (127, 127, 127))
    square.paste(image, (0, 25))
    for preset, seen in (("rcb", image), ("native", square)):
        ((view,),) = make(preprocess=preset).encode([Visual((image,), "base")])
        ((expected,),) = make(split=False).encode([seen])
        torch.testing.assert_close(view.features, expected.features, rtol=0, atol=1e-6)
        # A single image that is not split is stretched in both, as the base view among its tiles.
        ((whole,),) = make(preprocess=preset, split=False).encode([image])
        ((stretched,),) = make().encode([Visual((image,), "base")])
        torch.testing.assert_close(whole.features, stretched.features, rtol=0, atol=1e-6)


def test_frames_of_any_size_are_pooled_by_halves(family):
    frames = (tiny.random_image(0, 80, 60), tiny.random_image(1, 60, 90))
    (views,) = family.encode([Visual(frames, "video")])
    for frame, view in zip(frames, views, strict=True):
        ((whole,),) = family.encode([Visual((frame,), "base")])
        assert view.grid == (2, 2)
        pooled = whole.features.reshape(2, 2, 2, 2, WIDTH).mean((1, 3)).reshape(4, WIDTH)
        torch.testing.assert_close(view.features, pooled, rtol=0, atol=1e-5)


def test_odd_grids_are_pooled_bilinearly(tmp_path):
    """Five to three: samples at 1/3, 2 and 11/3, as 27 to 14 in the real model."""
    family = load_family(str(tiny_onevision.save_onevision(tmp_path, 70)))
    frame = tiny.random_image(0, 70, 70)
    ((whole,),) = family.encode([Visual((frame,), "base")])
    ((pooled,),) = family.encode([Visual((frame,), "video")])
    assert (whole.grid, pooled.grid) == ((5, 5), (3, 3))
    weights = torch.tensor([[2, 1, 0, 0, 0], [0, 0, 3, 0, 0], [0, 0, 0, 1, 2]]) / 3
    expected = torch.einsum("ai,bj,ijd->abd", weights, weights, whole.features.reshape(5, 5, WIDTH))
    torch.testing.assert_close(pooled.features, expected.reshape(9, WIDTH), rtol=0, atol=1e-5)


def test_presets_of_frames_are_a_grey_level_apart(make):
    (ours,), (native,) = (make(preprocess=preset).encode([tiled.video(1)]) for preset in ("rcb", "native"))
    assert 0 < (ours[0].features - native[0].features).abs().max() < 0.02


def test_random_tokens_differ_from_frame_to_frame(family):
    visual, pruner = tiled.video(6), RandomPruning(Budget.tokens(2))
    (views,) = family.encode([visual])
    choices = [pruner.choose(view).kept for view in views]
    assert len({tuple(kept.tolist()) for kept in choices}) > 1
    (image,) = tiled.packed(family, pruner, [visual])
    rows = [view.features[token] for view, kept in zip(views, choices, strict=True) for token in kept]
    assert torch.equal(image.embeds, torch.stack([*rows, family.model.model.image_newline.detach()]))
    assert (image.native, image.retained, image.views) == (24, 12, 6)


def test_methods_that_need_a_cls_token_are_refused(family):
    for visual in (Visual((tiny.random_image(0),)), tiled.video(1)):
        for view in family.encode([visual], PruMerge.needs)[0]:
            with pytest.raises(UserError, match="use rcb, fastv, divprune or random"):
                check_needs(view, PruMerge())


def test_the_qwen_template_adds_the_original_system_prompt(make):
    family = make(template="qwen")
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    decode = family.tokenizer.decode
    assert decode(family.prompt("Is it red?")) == text.format("<image>\nIs it red?")
    assert decode(family.prompt("A <image> B?", 2)) == text.format("<image>\nA <image> B?")
    ids = family.chat([{"role": "user", "content": interleave("What happens?", ["video"])}])
    assert decode(ids) == text.format("<video>\nWhat happens?")
    assert family.model.config.video_token_id in ids


@pytest.mark.parametrize("template", ["checkpoint", "qwen"])
def test_a_video_mark_that_somebody_wrote_is_text(make, template):
    family, visual = make(template=template), tiled.video(2)
    ids = family.chat([{"role": "user", "content": interleave("Is <video> a tag?<video>", ["video"])}])
    assert ids.count(family.model.config.video_token_id) == 1
    assert family.tokenizer.decode(ids).count("Is <video> a tag?<video>") == 1
    assert family.embed(ids, tiled.packed(family, RandomPruning(Budget.tokens(2)), [visual])).visuals == 1


def test_a_video_is_one_visual(make, tmp_path):
    for number in range(1, 13):
        Image.new("RGB", (60, 40), (20 * number,) * 3).save(tmp_path / f"{number}.png")
    (visual,) = make(reader=VideoReader(max_frames=4)).open_video(tmp_path)
    assert (visual.role, len(visual.frames)) == ("video", 4)
    # Positions 1 to 11: size 2.5, 1 + 1.25 + 0, 2, 5, 8.
    assert [frame.getpixel((0, 0))[0] // 20 for frame in visual.frames] == [3, 5, 8, 11]


def test_ablated_tokens_become_the_embedding_of_endoftext(family, make):
    assert LlavaOnevision.pad_token_id == 151643
    table = family.model.get_input_embeddings().weight
    # The tiny vocabulary has no such row, and its <|endoftext|> where other families have their empty slot.
    assert torch.equal(family.pad_embedding, table[family.tokenizer.convert_tokens_to_ids("<|endoftext|>")])
    other = make()
    other.pad_token_id = 9
    assert torch.equal(other.pad_embedding, table[9])
