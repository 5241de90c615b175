"""Families with tiles, on tiny checkpoints: views of 4 x 4 tokens, tiles of 56 x 56 pixels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tiled
import tiny
import tiny_next
import tiny_onevision
import torch
from PIL import Image

from rcb_lmms.budget import Budget
from rcb_lmms.codebook import Codebook
from rcb_lmms.codebook.probe import probed_ranks
from rcb_lmms.codebook.settings import settings_for
from rcb_lmms.errors import UserError
from rcb_lmms.families import default_codebook, load_family
from rcb_lmms.families.images import Visual
from rcb_lmms.families.tiles import padding
from rcb_lmms.pruners.base import Selection, VisualTokens
from rcb_lmms.pruners.prumerge import PruMerge
from rcb_lmms.pruners.random import RandomPruning
from rcb_lmms.pruners.rcb import RCB

FAMILIES = ("llava_next", "llava_onevision")
CLS = frozenset({"encoder_features", "keys", "cls_attention", "cls_similarity"})
# (width, height) -> tiles; exact fits of every grid first.
TILES = {
    "llava_next": {(112, 56): 2, (56, 112): 2, (112, 112): 4, (56, 168): 3, (168, 56): 3},
    "llava_onevision": {(56, 56): 1, (112, 56): 2, (112, 112): 4, (168, 56): 3, (168, 168): 9, (90, 70): 4},
}
AWKWARD = [(80, 60), (60, 81), (704, 396), (1000, 30), (333, 1000), (1, 1), (77, 3), (188, 47), (1, 600)]
SIZES = [(name, size) for name in FAMILIES for size in (*TILES[name], *AWKWARD)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("tiles")
    return {
        "llava_next": tiny_next.save_next(home / "next"),
        "llava_onevision": tiny_onevision.save_onevision(home / "onevision"),
    }


@pytest.fixture(scope="module")
def make(folders):
    """A family by name, around weights that are loaded once, with options."""
    loaded = {name: load_family(str(folder)) for name, folder in folders.items()}

    def build(name, **options):
        own = loaded[name]
        return type(own)(own.model, own.processor, pretrained="tiny", **options)

    return build


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


def picture(*size):
    return Visual((Image.new("RGB", size),))


def test_one_resolution_for_every_image(make, name):
    known = [list(own) for own in make(name).model.config.image_grid_pinpoints]
    height, width = known[-1]
    family = make(name, grid=f"{height}x{width}" if height != width else str(height))
    sizes = [(112, 56), (40, 160), (90, 90)]
    tiles = height * width // family.side_px**2
    for size in sizes:
        image = Visual((tiny.random_image(1, *size),))
        assert len(family.encode([image])[0]) == 1 + tiles
        assert len(family.places(image)) == 1 + tiles
    assert len({len(make(name).encode([Visual((tiny.random_image(1, *size),))])[0]) for size in sizes}) > 1
    with pytest.raises(UserError, match=f"{height}x{width}"):
        make(name, grid="77")


# Native packing


@pytest.mark.parametrize(("name", "size"), SIZES, ids=lambda value: value if isinstance(value, str) else str(value))
def test_keeping_everything_gives_the_unpruned_model(make, name, size):
    family, image = make(name, pack="spatial_unpad"), tiny.random_image(3, *size)
    if size in TILES[name]:
        assert len(family.encode([image])[0]) == 1 + TILES[name][size]
    tiled.assert_unpruned(
        family, family.prompt("What is it?"), [Visual((image,))], *tiled.unpruned(family, "What is it?", [image])
    )


def test_keeping_everything_of_several_images_gives_the_unpruned_model(make):
    family = make("llava_next", pack="spatial_unpad")
    images = [tiny.random_image(n, *size) for n, size in enumerate([(112, 56), (60, 81), (168, 56)])]
    text = "<image> or <image>, or this: <image>?"
    visuals = [Visual((image,)) for image in images]
    prompt = tiled.assert_unpruned(family, family.prompt(text, 3), visuals, *tiled.unpruned(family, text, images))
    assert (prompt.views, prompt.visuals) == (3 + 5 + 4, 3)


# 704 x 396 on 2 x 2 tiles, 8 x 8 tokens: int(396 * 8 / 704) = 4 rows of content, (8 - 4) // 2 = 2 cut on both sides; on
# 3 x 3 tiles, 12 x 12 tokens: 6 rows, 3 cut. 6 * 12 are 1.06 squared of 4 views' 64, below the 1.1 that would shrink
# them. 80 x 60 and 90 x 70 on 2 x 2: 6 rows, 1 cut. 30 x 300 on 3 x 1 tiles, 12 x 4 tokens: 1 column, 1 cut: 2 stay.
# 188 x 47 on 1 x 3 tiles, 4 x 12 tokens: 47 * 12 / 188 = 3 rows, just below in floating point; rounded first, as in
# Hugging Face, (4 - 3) // 2 = 0 are cut. The original code truncates to 2 and cuts one on both sides.
@pytest.mark.parametrize(
    ("name", "size", "columns_of_tiles", "views", "rows", "columns", "original"),
    [
        ("llava_next", (704, 396), 2, 5, range(2, 6), range(8), False),
        ("llava_next", (80, 60), 2, 5, range(1, 7), range(8), False),
        ("llava_next", (30, 300), 1, 4, range(12), range(1, 3), False),
        ("llava_next", (188, 47), 3, 4, range(4), range(12), False),
        ("llava_next", (188, 47), 3, 4, range(1, 3), range(12), True),
        ("llava_onevision", (704, 396), 3, 10, range(3, 9), range(12), False),
        ("llava_onevision", (90, 70), 2, 5, range(1, 7), range(8), True),
        ("llava_onevision", (50, 150), 1, 4, range(12), range(4), False),
    ],
)
def test_native_packing_by_hand(make, name, size, columns_of_tiles, views, rows, columns, original):
    family = make(name, pack="spatial_unpad", original=original)
    image = family.pack_selected(*tiled.marked(views), picture(*size))
    assert tiled.names(family, image) == tiled.names_in_rows(rows, columns, columns_of_tiles)
    assert image.native == image.retained == 16 + len(rows) * len(columns)
    assert len(image.rows.newlines) == len(rows)


@pytest.mark.parametrize(
    ("size", "plane", "original", "converted"),
    [
        # 396 * (48 / 704) is 27, but comes out as 26.999999999999996: (48 - 26) // 2 and (48 - 27) // 2.
        ((704, 396), (48, 48), (11, 0), (10, 0)),
        ((396, 704), (48, 48), (0, 11), (0, 10)),
        ((640, 480), (48, 48), (6, 0), (6, 0)),
    ],
)
def test_the_original_code_truncates_where_hugging_face_rounds(size, plane, original, converted):
    assert padding(size, plane, exact=True) == original
    assert padding(size, plane, exact=False) == converted


def test_many_tiles_are_shrunk_as_far_as_the_checkpoint_says(make, monkeypatch):
    """12 x 12 tokens of nine tiles are 1.5 squared times those of four views: 8 x 8 are left, 1.5 apart."""
    family = make("llava_onevision", pack="spatial_unpad")
    views, selections = tiled.marked(10)
    whole = torch.arange(12.0)[:, None] * 100 + torch.arange(12.0)
    for number in range(9):
        top, left = number // 3 * 4, number % 3 * 4
        tile = whole[top : top + 4, left : left + 4].reshape(16, 1)
        views[1 + number] = VisualTokens(tile.expand(-1, tiny.WIDTH), (4, 4))
    image = family.pack_selected(views, selections, picture(168, 168))
    assert (image.native, image.retained, len(image.embeds)) == (80, 80, 88)
    assert image.rows.newlines == tuple(range(16 + 8, 88, 9))
    # Samples lie at 0.25, 1.75, ... 10.75, where bilinear interpolation of a plane is the plane itself.
    sampled = 0.25 + 1.5 * torch.arange(8.0)
    grid = image.embeds[16:].reshape(8, 9, tiny.WIDTH)[:, :8]
    expected = (sampled[:, None] * 100 + sampled)[:, :, None].expand(-1, -1, tiny.WIDTH)
    torch.testing.assert_close(grid, expected, rtol=1e-6, atol=1e-4)
    monkeypatch.setattr(family.model.config, "vision_aspect_ratio", "anyres_max_9")
    image = family.pack_selected(views, selections, picture(168, 168))
    assert (image.native, len(image.rows.newlines)) == (16 + 144, 12)


# Flat packing


@pytest.mark.parametrize("kept", [range(16), (1, 7, 8), ()])
@pytest.mark.parametrize(
    ("pack", "tiles_end", "base_end"),
    [("auto", 0, 1), ("flat", 0, 0), ("flat_newline", 1, 1), ("spatial_unpad", None, 1)],
)
def test_flat_packing(make, name, kept, pack, tiles_end, base_end):
    family = make(name, pack=pack)
    if tiles_end is not None:
        image = family.pack_selected(*tiled.marked(3, kept), picture(112, 56))
        tokens = [100 * view + token for view in range(3) for token in kept]
        assert tiled.names(family, image) == [*tokens, *["newline"] * tiles_end]
        assert (image.native, image.retained, image.views) == (48, 3 * len(kept), 3)
    image = family.pack_selected(*tiled.marked(1, kept), picture(112, 56))  # an image that is not split
    assert tiled.names(family, image) == [*kept, *["newline"] * base_end]
    assert (image.native, image.retained) == (16, len(kept))
    assert len(family.pack_base(torch.zeros(5, tiny.WIDTH)).embeds) == 5 + base_end


def test_pruned_tiles_cannot_be_unpadded(make, name):
    views, (whole, *_) = tiled.marked(3)
    pruned = Selection(torch.arange(15), torch.zeros(16))
    with pytest.raises(UserError, match=r"pack=flat or pack=flat_newline"):
        make(name, pack="spatial_unpad").pack_selected(views, [whole, whole, pruned], picture(112, 56))


# Views: which pixels they see is asked in test_pixels


def test_views_are_those_of_the_plain_tower_fed_with_each_view(make, name):
    family, image = make(name), tiny.random_image(2, 84, 112)
    pixels = family.pixels(Visual((image,)))
    (views,) = family.encode([image], family.provides)
    assert len(views) == len(pixels) == 5
    for view, own in zip(views, pixels, strict=True):
        plain = tiled.fed_with(family, own)
        assert view.grid == (4, 4)
        for field, expected in plain.items():
            torch.testing.assert_close(getattr(view, field).double(), expected.double(), rtol=0, atol=1e-5)
        torch.testing.assert_close(family.project(view.encoder_features), view.features, rtol=0, atol=1e-5)
    assert set(plain) <= {"features", *family.provides}  # test_methods.py has the others, against eager attention
    bare = family.encode([image])[0]
    assert all(view.encoder_features is view.keys is view.cls_similarity is None for view in bare)


def test_batch_and_chunks_do_not_matter(make, name):
    family, chunked = make(name), make(name)
    visuals = [Visual((tiny.random_image(n, *size),)) for n, size in enumerate([(112, 56), (90, 70), (168, 168)])]
    visuals.insert(2, Visual((tiny.random_image(1, 90, 70),), "base"))
    visuals += [tiled.video(5), tiled.video(1)] if name == "llava_onevision" else []
    chunked.tower_batch = 3
    alone = [family.encode([visual], family.provides)[0] for visual in visuals]
    keys = [view.key for view in itertools.chain(*alone)]
    assert len(set(keys)) == len(keys)
    for other in (family, chunked):
        together = itertools.chain(*other.encode(visuals, family.provides))
        for ours, theirs in zip(together, itertools.chain(*alone), strict=True):
            assert (ours.key, ours.grid) == (theirs.key, theirs.grid)
            for field in ("features", *family.provides):
                own, expected = getattr(ours, field), getattr(theirs, field)
                assert (own is None) == (expected is None)
                if own is not None:
                    torch.testing.assert_close(own, expected, rtol=0, atol=1e-5)


def test_the_tower_never_sees_more_than_a_bounded_number_of_views(make):
    family, sizes = make("llava_onevision"), []
    tower = family.model.model.vision_tower
    hook = tower.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    family.encode([tiled.video(20), Visual((tiny.random_image(2, 168, 168),))])
    hook.remove()
    assert sizes == [16, 14]


def test_base_views_are_the_first_of_all_views(make, name):
    image = tiny.random_image(4, 704, 396)
    (views,) = make(name).encode([image])
    for family, visual in ((make(name), Visual((image,), "base")), (make(name, split=False), Visual((image,)))):
        ((only,),) = family.encode([visual])
        torch.testing.assert_close(only.features, views[0].features, rtol=0, atol=1e-6)


# Pruning, view by view


def test_random_tokens_differ_from_view_to_view(make, name):
    family, pruner = make(name), RandomPruning(Budget.tokens(4))
    visual = Visual((tiny.random_image(0, 90, 70),))
    (views,) = family.encode([visual])
    choices = [pruner.choose(view).kept for view in views]
    assert len({tuple(kept.tolist()) for kept in choices}) > 1
    (image,) = tiled.packed(family, pruner, [visual])
    rows = [view.features[token] for view, kept in zip(views, choices, strict=True) for token in kept]
    assert torch.equal(image.embeds, torch.stack(rows))
    assert (image.native, image.retained, image.views) == (80, 20, 5)


def test_rcb_prunes_every_view_by_the_same_threshold(make):
    family = make("llava_next")
    prototypes = torch.randn(12, tiny.WIDTH, generator=torch.Generator().manual_seed(5))
    visual = Visual((tiny.random_image(1, 168, 56),))
    (views,) = family.encode([visual])
    unit = torch.nn.functional.normalize(prototypes.double())
    redundancy = [(torch.nn.functional.normalize(view.features.double()) @ unit.T).amax(1) for view in views]
    threshold = float(torch.cat(redundancy).median()) + 1e-4
    rows = torch.cat([view.features[own < threshold] for view, own in zip(views, redundancy, strict=True)])
    assert len({int((own < threshold).sum()) for own in redundancy}) > 1
    (image,) = tiled.packed(family, RCB(Budget.threshold(threshold), Codebook(prototypes, {"id": "tiny"})), [visual])
    assert torch.equal(image.embeds, rows)
    assert (image.native, image.retained) == (64, len(rows))


def test_rewritten_tokens_are_projected_view_by_view(make):
    family, pruner = make("llava_next", pack="flat_newline"), PruMerge(Budget.ratio(0.25))
    visual = Visual((tiny.random_image(1, 80, 60),))
    (views,) = family.encode([visual], pruner.needs)
    rows = [family.project(pruner.choose(view).features) for view in views]
    (image,) = tiled.packed(family, pruner, [visual])
    rows.append(family.model.model.image_newline.detach()[None])
    torch.testing.assert_close(image.embeds, torch.cat(rows), rtol=0, atol=1e-5)
    assert (image.native, image.retained, image.rows.newlines) == (80, 20, (20,))


# Prompts, choices and codebooks


def test_the_llama_3_template_adds_the_original_system_prompt(make):
    family = make("llava_next", template="llama_3")
    assert family.tokenizer.decode(family.prompt("Is it red? "), skip_special_tokens=False) == (
        "<s><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant. You are "
        "able to understand the visual content that the user provides, and assist the user with a variety of tasks "
        "using natural language.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<image>\nIs it red?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_options_pass_through_loading(folders, name):
    family = load_family(str(folders[name]), family=name, split=False, pack="flat")
    assert (family.split, family.packing) == (False, "flat")
    with pytest.raises(UserError, match="spatial_unpad"):
        load_family(str(folders[name]), pack="spatial")
    released = {"llava_next": "llava-next-llama3-8b", "llava_onevision": "llava-onevision-qwen2-7b"}
    assert default_codebook(name, family.checkpoint) == released[name]


@pytest.mark.parametrize(("name", "probes", "repeats"), [("llava_next", 12, 24), ("llava_onevision", 9, 27)])
def test_codebook_experiments_pack_a_base_view_with_its_newline(make, tmp_path, monkeypatch, name, probes, repeats):
    family, image = make(name), tiny.random_image(8, 80, 60)
    family.pad_token_id = 9
    # Thresholds that everything passes: every probed token becomes a prototype.
    settings = settings_for(name, article="keep", probes=probes, tau_prob=2, tau_jsd=99, tau_out=99, tau_in=0)
    codebook, prompts = tiled.codebook_and_prompts(family, image, settings, tmp_path, monkeypatch)
    plain = tiled.fed_with(family, family.pixels(Visual((image,), "base"))[0])
    if "cls_similarity" in plain:
        order = plain["cls_similarity"].argsort(descending=True).tolist()
        patches = [order[rank - 1] for rank in probed_ranks(16, 12)]
    else:
        # Three rows and columns of four, at the middles of thirds: 0.67, 2, 3.33.
        patches = [0, 2, 3, 8, 10, 11, 12, 14, 15]
    assert sorted(codebook.meta["rows"]["patch"]) == sorted(patches)
    assert codebook.meta["experiment"]["single_repeats"] == repeats
    pad = family.model.get_input_embeddings().weight[9]
    tiled.assert_experiments(family, prompts, plain["features"], patches, repeats=repeats, pad=pad)


# Places on the original image


def shaded(width, height):
    """Red rises from 20 to 250 from left to right, green from top to bottom; blue is 255, which no padding is."""
    across, down = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray(np.rint(np.stack([20 + 230 * across, 20 + 230 * down, 0 * down + 255], -1)).astype(np.uint8))


@pytest.mark.parametrize("size", [(112, 56), (168, 56), (200, 120), (121, 250), (300, 100), (333, 310)])
@pytest.mark.parametrize("role", ["image", "base"])
@pytest.mark.parametrize("preprocess", ["rcb", "native"])
def test_every_token_lies_where_its_pixels_come_from(make, name, size, role, preprocess):
    family = make(name, preprocess=preprocess)
    visual = Visual((shaded(*size),), role)
    processor = family.processor.image_processor
    deviation, mean = (torch.tensor(values)[:, None, None] for values in (processor.image_std, processor.image_mean))
    pixels = (family.pixels(visual) * deviation + mean) * 255  # (v, 3, 56, 56), as the tower sees them
    places = family.places(visual)
    assert len(places) == len(pixels)
    seen_all = 0
    for place, view in zip(places, pixels.numpy(), strict=True):
        boxes = place.boxes(family.grid)
        patches = view.reshape(3, 4, 14, 4, 14).transpose(1, 3, 0, 2, 4).reshape(16, 3, -1)
        inside = (boxes > -1e-6).all(1) & (boxes[:, 2] < size[0] + 1e-6) & (boxes[:, 3] < size[1] + 1e-6)
        outside = (boxes[:, 2:] < 0).any(1) | (boxes[:, 0] > size[0]) | (boxes[:, 1] > size[1])
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2 / size
        assert np.abs(patches[inside, :2].mean(-1) - 20 - 230 * centres[inside]).max(initial=0) < 2.5
        assert patches[inside, 2].min(initial=255) > 240
        if role == "image":  # the tiles' padding is black
            assert patches[outside].max(initial=0) < 1
        seen_all += inside.sum()
    assert seen_all >= 8 or role == "base"  # a padded square may show no patch that lies wholly on the image


def test_a_pooled_frame_lies_on_its_whole_frame(make):
    family = make("llava_onevision")
    visual = Visual((tiny.random_image(1, 80, 60), tiny.random_image(2, 40, 90)), "video")
    places = family.places(visual)
    assert [place.frame for place in places] == [0, 1]
    assert places[1].boxes(family.pooled_grid).tolist() == [
        [0, 0, 20, 45], [20, 0, 40, 45], [0, 45, 20, 90], [20, 45, 40, 90]
    ]  # fmt: skip
