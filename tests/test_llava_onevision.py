"""LLaVA-OneVision on a tiny checkpoint: views of 4 x 4 tokens, tiles of 56 x 56 pixels, frames of 2 x 2 tokens."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tiled
import tiny
import tiny_onevision
import torch
from PIL import Image
from tiny_onevision import WIDTH

from rcb_lmms.budget import Budget
from rcb_lmms.codebook.settings import settings_for
from rcb_lmms.errors import UserError
from rcb_lmms.families import default_codebook, load_family
from rcb_lmms.families.base import interleave
from rcb_lmms.families.images import Visual
from rcb_lmms.families.llava_onevision import LlavaOnevision
from rcb_lmms.families.video import VideoReader
from rcb_lmms.pruners.base import Selection, VisualTokens, check_needs
from rcb_lmms.pruners.prumerge import PruMerge
from rcb_lmms.pruners.random import RandomPruning

# (width, height) -> tiles; exact fits of every grid first. The last four need the 3 x 3 grid, and are interpolated.
SIZES = {
    (56, 56): 1,
    (112, 56): 2,
    (56, 112): 2,
    (112, 112): 4,
    (168, 56): 3,
    (56, 168): 3,
    (168, 168): 9,
    (90, 70): 4,
    (50, 150): 3,
    (300, 280): 9,
    (160, 130): 9,
    (704, 396): 9,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_onevision.save_onevision(tmp_path_factory.mktemp("onevision"))


@pytest.fixture(scope="module")
def family(make):
    return make()


def video(count, size=(80, 60)):
    return Visual(tuple(tiny.random_image(30 + number, *size) for number in range(count)), "video")


# Keeping everything gives the unpruned model


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "{}x{}".format(*size))
def test_one_image(make, size):
    family = make(pack="spatial_unpad")
    image = tiny.random_image(3, *size)
    assert len(family.encode([image])[0]) == 1 + SIZES[size]
    embeds, logits = tiled.unpruned(family, "What is it?", [image])
    tiled.assert_unpruned(family, family.prompt("What is it?"), [Visual((image,))], embeds, logits)


def test_several_images(make):
    family = make(preprocess="native")
    images = [tiny.random_image(n, *size) for n, size in enumerate([(112, 56), (60, 81), (168, 168)])]
    text = "<image> or <image>, or this: <image>?"
    visuals = [Visual((image,), family.several) for image in images]
    prompt = tiled.assert_unpruned(family, family.prompt(text, 3), visuals, *tiled.unpruned(family, text, images))
    assert (prompt.views, prompt.visuals, prompt.native, prompt.newlines) == (3, 3, 48, 3)


@pytest.mark.parametrize("pack", ["auto", "flat", "spatial_unpad"])
def test_video(make, pack):
    family, visual = make(preprocess="native", pack=pack), video(5)
    ids = family.chat([{"role": "user", "content": interleave("What happens?", ["video"])}])
    embeds, logits = tiled.unpruned(family, "What happens?", frames=visual.frames)
    prompt = tiled.assert_unpruned(family, ids, [visual], embeds, logits)
    assert (prompt.views, prompt.visuals, prompt.native, prompt.newlines) == (5, 1, 20, 1)


# Packing by hand


# 704 x 396 on 3 x 3 tiles, 12 x 12 tokens: int(396 * 12 / 704) = 6 rows of content, (12 - 6) // 2 = 3 cut on both
# sides: rows 3-8. 6 * 12 tokens are 1.06 squared of 4 views' 64, below the 1.1 that would shrink them.
# 90 x 70 on 2 x 2 tiles, 8 x 8 tokens: int(70 * 8 / 90) = 6 rows, 1 cut on both sides.
# 50 x 150 on 3 x 1 tiles, 12 x 4 tokens: the same shape, nothing is cut.
@pytest.mark.parametrize(
    ("size", "columns_of_tiles", "views", "rows", "columns"),
    [
        ((704, 396), 3, 10, range(3, 9), range(12)),
        ((90, 70), 2, 5, range(1, 7), range(8)),
        ((50, 150), 1, 4, range(12), range(4)),
    ],
)
def test_native_packing(make, size, columns_of_tiles, views, rows, columns):
    family = make(pack="spatial_unpad")
    image = family.pack_selected(*tiled.marked(views), Visual((Image.new("RGB", size),)))
    assert tiled.names(family, image) == tiled.names_in_rows(rows, columns, columns_of_tiles)
    assert image.native == image.retained == 16 + len(rows) * len(columns)


def test_native_packing_shrinks_many_tiles(make):
    """12 x 12 tokens of nine tiles are 1.5 squared times those of four views: 8 x 8 are left, 1.5 apart."""
    family = make(pack="spatial_unpad")
    views, selections = tiled.marked(10)
    whole = torch.arange(12.0)[:, None] * 100 + torch.arange(12.0)
    for number in range(9):
        top, left = number // 3 * 4, number % 3 * 4
        tile = whole[top : top + 4, left : left + 4].reshape(16, 1)
        views[1 + number] = VisualTokens(tile.expand(-1, WIDTH), (4, 4))
    image = family.pack_selected(views, selections, Visual((Image.new("RGB", (168, 168)),)))
    assert (image.native, image.retained, len(image.embeds)) == (80, 80, 88)
    assert image.rows.newlines == tuple(range(16 + 8, 88, 9))
    # Samples lie at 0.25, 1.75, ... 10.75, where bilinear interpolation of a plane is the plane itself.
    sampled = 0.25 + 1.5 * torch.arange(8.0)
    grid = image.embeds[16:].reshape(8, 9, WIDTH)[:, :8]
    expected = (sampled[:, None] * 100 + sampled)[:, :, None].expand(-1, -1, WIDTH)
    torch.testing.assert_close(grid, expected, rtol=1e-6, atol=1e-4)


def test_the_checkpoints_limit_of_tiles_is_used(make, monkeypatch):
    family = make(pack="spatial_unpad")
    monkeypatch.setattr(family.model.config, "vision_aspect_ratio", "anyres_max_9")
    image = family.pack_selected(*tiled.marked(10), Visual((Image.new("RGB", (168, 168)),)))
    assert (image.native, len(image.rows.newlines)) == (16 + 144, 12)


@pytest.mark.parametrize("kept", [range(16), (1, 7, 8), ()])
@pytest.mark.parametrize(
    ("pack", "tiles_end", "base_end"),
    [("auto", 0, 1), ("flat", 0, 0), ("flat_newline", 1, 1), ("spatial_unpad", None, 1)],
)
def test_flat_packing(make, kept, pack, tiles_end, base_end):
    family, picture = make(pack=pack), Image.new("RGB", (112, 56))
    if tiles_end is not None:
        image = family.pack_selected(*tiled.marked(3, kept), Visual((picture,)))
        tiles = [*kept, *(100 + token for token in kept), *(200 + token for token in kept)]
        assert tiled.names(family, image) == [*tiles, *["newline"] * tiles_end]
        assert (image.native, image.retained, image.views) == (48, 3 * len(kept), 3)
    for role in ("base", "image"):  # an image that is not split has one view too
        image = family.pack_selected(*tiled.marked(1, kept), Visual((picture,), role))
        assert tiled.names(family, image) == [*kept, *["newline"] * base_end]
        assert (image.native, image.retained) == (16, len(kept))
    assert len(family.pack_base(torch.zeros(5, WIDTH)).embeds) == 5 + base_end


@pytest.mark.parametrize("pack", ["auto", "flat", "flat_newline", "spatial_unpad"])
def test_frames_are_packed_in_order_with_one_newline_at_the_very_end(make, pack):
    family = make(pack=pack)
    image = family.pack_selected(*tiled.marked(3, (0, 3), side=2), video(3))
    assert tiled.names(family, image) == [0, 3, 100, 103, 200, 203, "newline"]
    assert (image.native, image.retained, image.views) == (12, 6, 3)


def test_pruned_tiles_cannot_be_unpadded(make):
    views, (whole, *_) = tiled.marked(3)
    pruned = Selection(torch.arange(15), torch.zeros(16))
    with pytest.raises(UserError, match=r"pack=flat or pack=flat_newline"):
        make(pack="spatial_unpad").pack_selected(views, [whole, whole, pruned], Visual((Image.new("RGB", (112, 56)),)))


# Views


def fed_with(family, pixels):
    """Tower features and projected tokens of an image of 56 x 56 pixels, one image at a time."""
    # SigLIP's own normalisation, which the checkpoint names; the processor's default is CLIP's.
    values = torch.tensor((np.asarray(pixels) / 255 - 0.5) / 0.5, dtype=torch.float32).permute(2, 0, 1)
    model = family.model.model
    with torch.inference_mode():
        output = model.vision_tower(values[None], output_hidden_states=True)
        # What the projector reads comes before the tower's last norm.
        torch.testing.assert_close(
            model.vision_tower.post_layernorm(output.hidden_states[-1]), output.last_hidden_state, rtol=0, atol=1e-5
        )
        return output.hidden_states[-1][0], model.multi_modal_projector(output.hidden_states[-1])[0]


def test_views_are_those_of_the_plain_tower_fed_with_each_view(family):
    image, by_hand = tiled.image_and_views()
    (views,) = family.encode([image], {"encoder_features"})
    for view, pixels in zip(views, by_hand, strict=True):
        encoder, tokens = fed_with(family, pixels)
        assert view.grid == (4, 4)
        torch.testing.assert_close(view.encoder_features, encoder, rtol=0, atol=1e-5)
        torch.testing.assert_close(view.features, tokens, rtol=0, atol=1e-5)
        torch.testing.assert_close(family.project(view.encoder_features), view.features, rtol=0, atol=1e-5)


def test_several_images_are_stretched_or_padded(make):
    image = tiny.random_image(2, 90, 40)
    square = Image.new("RGB", (90, 90), (127, 127, 127))
    square.paste(image, (0, 25))
    found = {name: make(preprocess=name).encode([Visual((image,), "base")])[0] for name in ("rcb", "native")}
    for preset, pixels in (("rcb", tiled.stretched(image)), ("native", tiled.stretched(square))):
        (view,) = found[preset]
        torch.testing.assert_close(view.features, fed_with(make(), pixels)[1], rtol=0, atol=1e-5)
    assert (found["rcb"][0].features - found["native"][0].features).abs().max() > 0.01
    # A single image that is not split is stretched in both, as the base view among its tiles.
    for preset in found:
        (view,) = make(preprocess=preset, split=False).encode([image])[0]
        torch.testing.assert_close(view.features, found["rcb"][0].features, rtol=0, atol=1e-6)


def test_frames_are_pooled_by_halves(family):
    visual = video(3)
    (views,) = family.encode([visual])
    for frame, view in zip(visual.frames, views, strict=True):
        tokens = fed_with(family, tiled.stretched(frame))[1].reshape(2, 2, 2, 2, WIDTH)
        assert view.grid == (2, 2)
        torch.testing.assert_close(view.features, tokens.mean((1, 3)).reshape(4, WIDTH), rtol=0, atol=1e-5)


def test_presets_of_frames_are_a_grey_level_apart(make):
    (ours,), (native,) = (make(preprocess=preset).encode([video(1)]) for preset in ("rcb", "native"))
    assert 0 < (ours[0].features - native[0].features).abs().max() < 0.02


def test_frames_may_differ_in_size(family):
    frames = (tiny.random_image(0, 80, 60), tiny.random_image(1, 60, 90))
    (views,) = family.encode([Visual(frames, "video")])
    for frame, view in zip(frames, views, strict=True):
        ((alone,),) = family.encode([Visual((frame,), "video")])
        torch.testing.assert_close(view.features, alone.features, rtol=0, atol=1e-5)


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


def test_batch_and_chunks_do_not_matter(make):
    visuals = [
        Visual((tiny.random_image(0, 112, 56),)),
        video(5),
        Visual((tiny.random_image(1, 90, 70),), "base"),
        Visual((tiny.random_image(2, 168, 168),)),
        video(1),
    ]
    family, chunked = make(), make()
    chunked.tower_batch = 3
    alone = [family.encode([visual], {"encoder_features"})[0] for visual in visuals]
    assert [len(views) for views in alone] == [3, 5, 1, 10, 1]
    views = list(itertools.chain(*alone))
    assert len({view.key for view in views}) == len(views)
    for other in (family, chunked):
        together = list(itertools.chain(*other.encode(visuals, {"encoder_features"})))
        for ours, theirs in zip(together, views, strict=True):
            assert (ours.key, ours.grid) == (theirs.key, theirs.grid)
            torch.testing.assert_close(ours.features, theirs.features, rtol=0, atol=1e-5)
            if ours.grid == (4, 4):
                torch.testing.assert_close(ours.encoder_features, theirs.encoder_features, rtol=0, atol=1e-5)
            else:
                assert ours.encoder_features is None  # pooled behind the projector


def test_the_tower_never_sees_more_than_a_bounded_number_of_views(family):
    sizes = []
    tower = family.model.model.vision_tower
    hook = tower.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    family.encode([video(20), Visual((tiny.random_image(2, 168, 168),))])
    hook.remove()
    assert sizes == [16, 14]


@pytest.mark.parametrize("size", [(1, 1), (3, 77), (1, 600), (600, 1)])
def test_extreme_shapes_are_packed_as_the_unpruned_model_packs_them(make, size):
    family, image = make(pack="spatial_unpad"), Image.new("RGB", size, "blue")
    tiled.assert_unpruned(family, family.prompt("Q"), [Visual((image,))], *tiled.unpruned(family, "Q", [image]))


# Pruning


def test_random_tokens_differ_from_frame_to_frame(family):
    visual, pruner = video(6), RandomPruning(Budget.tokens(2))
    (views,) = family.encode([visual])
    choices = [pruner.choose(view).kept for view in views]
    assert len({tuple(kept.tolist()) for kept in choices}) > 1
    (image,) = tiled.packed(family, pruner, [visual])
    rows = [view.features[token] for view, kept in zip(views, choices, strict=True) for token in kept]
    assert torch.equal(image.embeds, torch.stack([*rows, family.model.model.image_newline.detach()]))
    assert (image.native, image.retained, image.views) == (24, 12, 6)


def test_methods_that_need_a_cls_token_are_refused(family):
    assert family.provides == {"encoder_features"}
    for visual in (Visual((tiny.random_image(0),)), video(1)):
        for view in family.encode([visual], PruMerge.needs)[0]:
            with pytest.raises(UserError, match="use rcb, fastv or random"):
                check_needs(view, PruMerge())


# Prompts and choices


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


def test_a_video_is_one_visual(make, tmp_path):
    for number in range(1, 13):
        Image.new("RGB", (60, 40), (20 * number,) * 3).save(tmp_path / f"{number}.png")
    family = make()
    family.reader = VideoReader(max_frames=4)
    (visual,) = family.open_video(tmp_path)
    assert (visual.role, len(visual.frames)) == ("video", 4)
    # Positions 1 to 11: size 2.5, 1 + 1.25 + 0, 2, 5, 8.
    assert [frame.getpixel((0, 0))[0] // 20 for frame in visual.frames] == [3, 5, 8, 11]


def test_options_pass_through_loading(checkpoint):
    family = load_family(str(checkpoint), family="llava_onevision", split=False, pack="flat")
    assert (family.split, family.packing) == (False, "flat")
    with pytest.raises(UserError, match="spatial_unpad"):
        load_family(str(checkpoint), pack="spatial")
    assert default_codebook("llava_onevision", family.checkpoint) == "llava-onevision-qwen2-7b"


# Codebooks


def test_ablated_tokens_become_the_embedding_of_endoftext(family, make):
    assert LlavaOnevision.pad_token_id == 151643
    table = family.model.get_input_embeddings().weight
    # The tiny vocabulary has no such row, and its <|endoftext|> where other families have their empty slot.
    assert torch.equal(family.pad_embedding, table[family.tokenizer.convert_tokens_to_ids("<|endoftext|>")])
    other = make()
    other.pad_token_id = 9
    assert torch.equal(other.pad_embedding, table[9])


def test_codebook_experiments_repeat_a_token_27_times_on_a_uniform_grid(make, tmp_path, monkeypatch):
    family, image = make(), tiny.random_image(8, 80, 60)
    family.pad_token_id = 9
    # Thresholds that everything passes: every probed token becomes a prototype.
    settings = settings_for("llava_onevision", article="keep", probes=9, tau_prob=2, tau_jsd=99, tau_out=99, tau_in=0)
    codebook, prompts = tiled.codebook_and_prompts(family, image, settings, tmp_path, monkeypatch)
    # Three rows and columns of four, at the middles of thirds: 0.67, 2, 3.33.
    patches = [0, 2, 3, 8, 10, 11, 12, 14, 15]
    assert sorted(codebook.meta["rows"]["patch"]) == patches
    assert codebook.meta["experiment"]["single_repeats"] == 27
    tokens = fed_with(family, tiled.stretched(image))[1]
    pad = family.model.get_input_embeddings().weight[9]
    tiled.assert_experiments(family, prompts, tokens, patches, repeats=27, pad=pad)
