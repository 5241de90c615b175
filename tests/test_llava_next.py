"""LLaVA-NeXT on a tiny checkpoint: views of 4 x 4 tokens, tiles of 56 x 56 pixels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tiled
import tiny
import tiny_next
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
from rcb_lmms.pruners.base import Selection
from rcb_lmms.pruners.prumerge import PruMerge
from rcb_lmms.pruners.random import RandomPruning
from rcb_lmms.pruners.rcb import RCB

NEEDS = frozenset({"encoder_features", "keys", "cls_attention", "cls_similarity"})
# (width, height); the first five fit the five grids exactly.
GRIDS = {(112, 56): 2, (56, 112): 2, (112, 112): 4, (56, 168): 3, (168, 56): 3}
AWKWARD = [
    (80, 60),
    (60, 81),
    (704, 396),
    (396, 704),
    (1000, 30),
    (333, 1000),
    (5, 5),
    (1, 1),
    (77, 3),
    (188, 47),
    (5000, 1),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_next.save_next(tmp_path_factory.mktemp("next"))


@pytest.fixture(scope="module")
def family(make):
    return make()


# Native packing


@pytest.mark.parametrize("size", [*GRIDS, *AWKWARD], ids=lambda size: "{}x{}".format(*size))
def test_keeping_everything_gives_the_unpruned_model(make, size):
    family = make(pack="spatial_unpad")
    image = Visual((tiny.random_image(3, *size),))
    if size in GRIDS:
        assert len(family.encode([image])[0]) == 1 + GRIDS[size]
    embeds, logits = tiled.unpruned(family, "What is it?", [image.image])
    tiled.assert_unpruned(family, family.prompt("What is it?"), [image], embeds, logits)


def test_keeping_everything_of_several_images_gives_the_unpruned_model(make):
    family = make(pack="spatial_unpad")
    images = [Visual((tiny.random_image(n, *size),)) for n, size in enumerate([(112, 56), (60, 81), (168, 56)])]
    text = "<image> or <image>, or this: <image>?"
    embeds, logits = tiled.unpruned(family, text, [image.image for image in images])
    prompt = tiled.assert_unpruned(family, family.prompt(text, 3), images, embeds, logits)
    assert (prompt.views, prompt.visuals) == (3 + 5 + 4, 3)


# 704 x 396 on 2 x 2 tiles, 8 x 8 tokens: int(396 * 8 / 704) = 4 rows of content, (8 - 4) // 2 = 2 cut on both sides.
# 80 x 60 on 2 x 2 tiles: 60 * 8 / 80 = 6 rows of content, 1 cut on both sides.
# 188 x 47 on 1 x 3 tiles, 4 x 12 tokens: 47 * 12 / 188 = 3 rows, just below in floating point; rounded first, as in
# Hugging Face, (4 - 3) // 2 = 0 are cut. The original code truncates to 2 and cuts one on both sides.
# 30 x 300 on 3 x 1 tiles, 12 x 4 tokens: int(30 * 12 / 300) = 1 column, (4 - 1) // 2 = 1 cut on both sides: 2 stay.
@pytest.mark.parametrize(
    ("size", "columns_of_tiles", "views", "rows", "columns", "original"),
    [
        ((704, 396), 2, 5, range(2, 6), range(8), False),
        ((80, 60), 2, 5, range(1, 7), range(8), False),
        ((30, 300), 1, 4, range(12), range(1, 3), False),
        ((188, 47), 3, 4, range(4), range(12), False),
        ((188, 47), 3, 4, range(1, 3), range(12), True),
        ((80, 60), 2, 5, range(1, 7), range(8), True),
    ],
)
def test_native_packing_by_hand(make, size, columns_of_tiles, views, rows, columns, original):
    family = make(pack="spatial_unpad", original=original)
    image = family.pack_selected(*tiled.marked(views), Visual((Image.new("RGB", size),)))
    assert tiled.names(family, image) == tiled.names_in_rows(rows, columns, columns_of_tiles)
    assert image.native == image.retained == 16 + len(rows) * len(columns)
    assert len(image.rows.newlines) == len(rows)


@pytest.mark.parametrize(
    ("size", "plane", "original", "converted"),
    [
        # 396 * (48 / 704) is 27, but comes out as 26.999999999999996: (48 - 26) // 2 and (48 - 27) // 2.
        ((704, 396), (48, 48), (11, 0), (10, 0)),
        ((396, 704), (48, 48), (0, 11), (0, 10)),
        # 110 * (48 / 176) is 30, and again just below.
        ((110, 176), (48, 48), (0, 9), (0, 9)),
        ((640, 480), (48, 48), (6, 0), (6, 0)),
    ],
)
def test_the_original_code_truncates_where_hugging_face_rounds(size, plane, original, converted):
    assert padding(size, plane, exact=True) == original
    assert padding(size, plane, exact=False) == converted


# Flat packing


def test_flat_packing_by_hand(make):
    visual = Visual((Image.new("RGB", (112, 56)),))
    kept = (1, 7, 8)
    rows = [*kept, *(100 + token for token in kept), *(200 + token for token in kept)]
    for pack, end in (("auto", []), ("flat", []), ("flat_newline", ["newline"])):
        family = make(pack=pack)
        image = family.pack_selected(*tiled.marked(3, kept), visual)
        assert tiled.names(family, image) == rows + end
        assert (image.native, image.retained, image.views) == (48, 9, 3)
        image = family.pack_selected(*tiled.marked(3), visual)
        assert tiled.names(family, image) == [*range(16), *range(100, 116), *range(200, 216), *end]
        assert (image.native, image.retained) == (48, 48)


@pytest.mark.parametrize(
    ("pack", "end"),
    [("auto", ["newline"]), ("flat", []), ("flat_newline", ["newline"]), ("spatial_unpad", ["newline"])],
)
def test_a_base_view_ends_with_one_newline_unless_flat(make, pack, end):
    family = make(pack=pack)
    for kept in (range(16), (1, 7, 8)):
        image = family.pack_selected(*tiled.marked(1, kept), Visual((Image.new("RGB", (112, 56)),), "base"))
        assert tiled.names(family, image) == [*kept, *end]
        assert (image.native, image.retained) == (16, len(kept))
    assert len(family.pack_base(torch.zeros(5, tiny.WIDTH)).embeds) == 5 + len(end)


def test_pruned_tiles_cannot_be_unpadded(make):
    family = make(pack="spatial_unpad")
    views, (whole, *_) = tiled.marked(3)
    pruned = Selection(torch.arange(15), torch.zeros(16))
    with pytest.raises(UserError, match=r"pack=flat or pack=flat_newline"):
        family.pack_selected(views, [whole, whole, pruned], Visual((Image.new("RGB", (112, 56)),)))


# Views


def fed_with(family, pixels):
    """Hidden states, projected tokens, and last-block queries and keys of the plain tower for `(3, 56, 56)` pixels."""
    tower = family.model.model.vision_tower
    attention, seen = tower.encoder.layers[-1].self_attn, {}
    hooks = [
        getattr(attention, name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out[0]}))
        for name in ("q_proj", "k_proj")
    ]
    with torch.inference_mode():
        hidden = tower(pixels[None], output_hidden_states=True).hidden_states[-2][0]
        tokens = family.model.model.multi_modal_projector(hidden[1:])
    for hook in hooks:
        hook.remove()
    return hidden.double(), tokens, seen["q_proj"].double(), seen["k_proj"].double()


def normalised(family, pixels):
    """Pixels `(h, w, 3)` from 0 to 255 as the tower reads them."""
    processor = family.processor.image_processor
    mean, deviation = (np.array(getattr(processor, name)) for name in ("image_mean", "image_std"))
    return torch.tensor((np.asarray(pixels) / 255 - mean) / deviation, dtype=torch.float32).permute(2, 0, 1)


def test_cls_tensors_of_every_view_are_those_of_the_plain_tower_fed_with_that_view(family):
    image, by_hand = tiled.image_and_views()
    (views,) = family.encode([image], NEEDS)
    for view, pixels in zip(views, by_hand, strict=True):
        hidden, tokens, queries, keys = fed_with(family, normalised(family, pixels))
        attention = torch.softmax(keys @ queries[0] / keys.shape[1] ** 0.5, 0)[1:]
        similarity = torch.cosine_similarity(hidden[1:], hidden[:1])
        assert view.grid == (4, 4)
        torch.testing.assert_close(view.features, tokens, rtol=0, atol=1e-5)
        torch.testing.assert_close(view.encoder_features.double(), hidden[1:], rtol=0, atol=1e-5)
        torch.testing.assert_close(view.keys.double(), keys[1:], rtol=0, atol=1e-5)
        torch.testing.assert_close(view.cls_attention.double(), attention, rtol=0, atol=1e-6)
        torch.testing.assert_close(view.cls_similarity.double(), similarity, rtol=0, atol=1e-6)


def test_batch_and_chunks_do_not_matter(make):
    sizes = [(112, 56), (80, 60), (56, 168), (704, 396)]
    visuals = [Visual((tiny.random_image(n, *size),)) for n, size in enumerate(sizes)]
    visuals.insert(2, Visual((tiny.random_image(9, 80, 60),), "base"))
    family, chunked = make(), make()
    chunked.tower_batch = 3
    alone = [family.encode([visual], NEEDS)[0] for visual in visuals]
    assert [len(views) for views in alone] == [3, 5, 1, 4, 5]
    for together in (family.encode(visuals, NEEDS), chunked.encode(visuals, NEEDS)):
        for ours, theirs in zip(itertools.chain(*together), itertools.chain(*alone), strict=True):
            assert ours.key == theirs.key
            for name in ("features", *NEEDS):
                torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=1e-5)


def test_views_have_keys_of_their_own_and_only_what_is_needed(family):
    image = tiny.random_image(0, 80, 60)
    views = family.encode([Visual((image,)), Visual((image,), "base")])
    keys = [view.key for view in itertools.chain(*views)]
    assert len(set(keys)) == 6
    assert all(view.encoder_features is view.keys is view.cls_similarity is None for view in itertools.chain(*views))
    assert [view.key for view in family.encode([image.copy()])[0]] == keys[:5]


def test_base_views_are_the_first_of_all_views(make):
    image = tiny.random_image(4, 704, 396)
    (views,) = make().encode([image])
    (base,) = make().encode([Visual((image,), "base")])
    (unsplit,) = make(split=False).encode([image])
    assert len(base) == len(unsplit) == 1
    for view in (base[0], unsplit[0]):
        torch.testing.assert_close(view.features, views[0].features, rtol=0, atol=1e-6)
    for preset in ("rcb", "native"):
        assert torch.equal(make(preprocess=preset).encode([image])[0][1].features, views[1].features)


# Pruning, view by view


def test_random_tokens_differ_from_view_to_view(family):
    visual = Visual((tiny.random_image(0, 80, 60),))
    (views,) = family.encode([visual])
    choices = [RandomPruning(Budget.tokens(4)).select(view).kept for view in views]
    assert len({tuple(kept.tolist()) for kept in choices}) > 1
    (image,) = tiled.packed(family, RandomPruning(Budget.tokens(4)), [visual])
    rows = [view.features[token] for view, kept in zip(views, choices, strict=True) for token in kept]
    assert torch.equal(image.embeds, torch.stack(rows))
    assert (image.native, image.retained, image.views) == (80, 20, 5)


def test_rcb_prunes_every_view_by_the_same_threshold(family):
    prototypes = torch.randn(12, tiny.WIDTH, generator=torch.Generator().manual_seed(5))
    visual = Visual((tiny.random_image(1, 168, 56),))
    (views,) = family.encode([visual])
    unit = torch.nn.functional.normalize(prototypes.double())
    redundancy = [(torch.nn.functional.normalize(view.features.double()) @ unit.T).amax(1) for view in views]
    threshold = float(torch.cat(redundancy).median()) + 1e-4
    rows = torch.cat([view.features[own < threshold] for view, own in zip(views, redundancy, strict=True)])
    counts = [int((own < threshold).sum()) for own in redundancy]
    assert len(set(counts)) > 1
    (image,) = tiled.packed(family, RCB(Budget.threshold(threshold), Codebook(prototypes, {"id": "tiny"})), [visual])
    assert torch.equal(image.embeds, rows)
    assert (image.native, image.retained) == (64, sum(counts))


def test_prumerge_merges_inside_each_view(make):
    family, pruner = make(pack="flat_newline"), PruMerge(Budget.ratio(0.25))
    visual = Visual((tiny.random_image(1, 80, 60),))
    (views,) = family.encode([visual], pruner.needs)
    rows = []
    for view in views:
        weights = view.cls_attention.double()
        centres = sorted(weights.argsort(descending=True)[:3].tolist())
        merged = []
        for centre in centres:
            # 15 other tokens, fewer than the 32 neighbours a centre may have.
            others = [token for token in range(16) if token != centre]
            merged.append(view.encoder_features[centre] + sum(weights[i] * view.encoder_features[i] for i in others))
        left = [token for token in range(16) if token not in centres]
        merged.append(sum(weights[i] * view.encoder_features[i] for i in left))
        with torch.inference_mode():
            rows.append(family.model.model.multi_modal_projector(torch.stack(merged).float()))
    (image,) = tiled.packed(family, pruner, [visual])
    rows.append(family.model.model.image_newline.detach()[None])
    torch.testing.assert_close(image.embeds, torch.cat(rows), rtol=0, atol=1e-5)
    assert (image.native, image.retained, image.rows.newlines) == (80, 20, (20,))


def test_adaptive_prumerge_decides_for_every_view(family):
    visual = Visual((tiny.random_image(6, 704, 396),))
    (views,) = family.encode([visual], PruMerge.needs)
    counts = []
    for view in views:
        values = view.cls_attention.float().numpy()
        lower, upper = np.percentile(values, [25, 75])
        counts.append(max(1, int((values > upper + 1.5 * (upper - lower)).sum())) + 1)
    assert len(set(counts)) > 1
    (image,) = tiled.packed(family, PruMerge(), [visual])
    assert image.retained == sum(counts)


# Prompts and choices


def test_the_llama_3_template_adds_the_original_system_prompt(make):
    family = make(template="llama_3")
    assert family.tokenizer.decode(family.prompt("Is it red? "), skip_special_tokens=False) == (
        "<s><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant. You are "
        "able to understand the visual content that the user provides, and assist the user with a variety of tasks "
        "using natural language.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<image>\nIs it red?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_options_pass_through_loading(checkpoint):
    family = load_family(str(checkpoint), family="llava_next", split=False, pack="flat")
    assert (family.split, family.packing) == (False, "flat")
    assert set(family.options) == {"split", "pack"}
    with pytest.raises(UserError, match="spatial_unpad"):
        load_family(str(checkpoint), pack="spatial")
    assert default_codebook("llava_next", family.checkpoint) == "llava-next-llama3-8b"


# Codebooks


def test_codebook_experiments_pack_a_base_view_with_its_newline(family, tmp_path, monkeypatch):
    image = tiny.random_image(8, 80, 60)
    # Thresholds that everything passes: every probed token becomes a prototype.
    settings = settings_for("llava_next", article="keep", probes=12, tau_prob=2, tau_jsd=99, tau_out=99, tau_in=0)
    codebook, prompts = tiled.codebook_and_prompts(family, image, settings, tmp_path, monkeypatch)
    hidden, tokens, *_ = fed_with(family, normalised(family, tiled.stretched(image)))
    order = torch.cosine_similarity(hidden[1:], hidden[:1]).argsort(descending=True).tolist()
    patches = [order[rank - 1] for rank in probed_ranks(16, 12)]
    assert sorted(codebook.meta["rows"]["patch"]) == sorted(patches)
    assert codebook.meta["experiment"]["single_repeats"] == 24
    pad = family.model.get_input_embeddings().weight[0]
    tiled.assert_experiments(family, prompts, tokens, patches, repeats=24, pad=pad)
