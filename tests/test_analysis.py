"""The analyses, on a tiny random model against brute force, and on laboratory scenes whose objects are known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from PIL import Image
from scipy.spatial.distance import jensenshannon
from typer.testing import CliRunner

from rcb_lmms.analysis.curves import confident_shares, curves, explain_curves
from rcb_lmms.analysis.features import candidate_map, embed, explain_outliers, image_features
from rcb_lmms.analysis.images import open_shown, parse_tokens
from rcb_lmms.analysis.influence import (
    candidate_changes,
    changed_answers,
    explain_cascade,
    influence,
    influence_maps,
    influence_table,
)
from rcb_lmms.analysis.prototypes import coverage, crop, gallery
from rcb_lmms.analysis.study import ablate, ablation_table
from rcb_lmms.analysis.tokens import decoder_layers, read_tokens, token_maps
from rcb_lmms.cli import app
from rcb_lmms.codebook import Codebook
from rcb_lmms.codebook.build import build, threshold
from rcb_lmms.codebook.dpc import dpc_knn
from rcb_lmms.codebook.probe import ImageStatistics
from rcb_lmms.codebook.select import patch_scores
from rcb_lmms.codebook.settings import settings_for
from rcb_lmms.engine.layer_attention import last_token_attention
from rcb_lmms.engine.session import Session
from rcb_lmms.errors import UserError
from rcb_lmms.families import load_family
from rcb_lmms.families.places import painted
from rcb_lmms.lab.scenes import make_scene
from rcb_lmms.pruners import make_pruner

SCENE = 3


@pytest.fixture(scope="module")
def session(family):
    return Session(family, make_pruner("none"), batch_size=5)


@pytest.fixture(scope="module")
def settings():
    return settings_for("llava", "official", article="keep", prompt="Is it red?")


@pytest.fixture(scope="module")
def shown(session):
    return open_shown(session, tiny.random_image(1))


@pytest.fixture(scope="module")
def lab():
    return Session(load_family("lab"), make_pruner("none"), batch_size=32)


@pytest.fixture(scope="module")
def scene():
    return make_scene("codebook", SCENE)


def rcb(*arguments):
    result = CliRunner().invoke(app, ["analyze", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def logits_of(family, prompt, tokens):
    """The model's logits behind a prompt that shows tokens `(k, d)`, one by one and without padding."""
    embeds = family.embed(family.prompt(prompt), [family.pack_base(tokens)]).embeds
    with torch.inference_mode():
        return family.model(inputs_embeds=embeds[None]).logits[0, -1].double()


# Tokens


@pytest.mark.parametrize(
    ("text", "expected"), [("all", [0, 1, 2, 3]), ("3,0-1", [0, 1, 3]), (" 2 ", [2]), ("1-2,2", [1, 2])]
)
def test_tokens_are_named_by_number_and_range(text, expected):
    assert parse_tokens(text, 4) == expected


@pytest.mark.parametrize("text", ["4", "", "1-9", "3-1", "a", "1,,2", "-1"])
def test_tokens_that_are_none_are_refused(text):
    with pytest.raises(UserError, match="a view of 4 tokens"):
        parse_tokens(text, 4)


def test_layers_keep_their_share_of_the_depth():
    assert decoder_layers(32) == [2, 16, 30]
    assert decoder_layers(28) == [2, 14, 26]
    assert decoder_layers(4) == [1, 2, 4]
    assert decoder_layers(4, [3, 3, 1]) == [1, 3]
    with pytest.raises(UserError, match="a decoder of 4 layers"):
        decoder_layers(4, [5])


def test_attention_is_the_row_that_eager_attention_returns(family, shown):
    prompt = family.embed(family.prompt("Is it red?"), [family.pack_base(shown.view.features)])
    decoder = family.model.get_decoder()
    hooks = sum(len(module._forward_pre_hooks) for module in family.model.modules())
    rows = last_token_attention(family.model, prompt.embeds, [1, 3, 4])
    assert sum(len(module._forward_pre_hooks) for module in family.model.modules()) == hooks
    decoder.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            eager = decoder(inputs_embeds=prompt.embeds[None], output_attentions=True).attentions
    finally:
        decoder.set_attn_implementation("sdpa")
    for layer, row in rows.items():
        torch.testing.assert_close(row, eager[layer - 1][0].mean(0)[-1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("repeats", [1, 3])
def test_readings_are_what_the_model_says_about_one_token(session, shown, repeats):
    family = session.family
    settings = settings_for("llava", "official", article="keep", prompt="Is it red?", single_repeats=repeats)
    readings, attention = read_tokens(session, shown, [0, 3, 7, 8, 9, 15], settings, [2])
    assert [row.token for row in readings] == [0, 3, 7, 8, 9, 15]
    for row in readings:
        assert (row.row, row.column) == (row.token // 4, row.token % 4)
        logits = logits_of(family, "Is it red?", shown.view.features[row.token].expand(repeats, -1))
        assert row.probability == pytest.approx(float(logits.topk(50).values.softmax(-1)[0]), abs=1e-5)
        assert row.logit == pytest.approx(float(logits.max()), abs=1e-4)
        assert row.attention == {2: pytest.approx(float(attention[2][row.token]))}
        assert row.cls_similarity == pytest.approx(float(shown.view.cls_similarity[row.token]))
    maps = token_maps(shown, readings, attention)
    assert list(maps) == ["top-1 probability", "similarity to CLS", "attention in layer 2"]
    assert np.isnan(maps["top-1 probability"]).sum() == 10


def test_tokens_of_a_scene_name_their_object_and_the_others_nothing(lab, scene):
    shown = open_shown(lab, scene.image())
    settings = settings_for("llava", "lab")
    readings, _ = read_tokens(lab, shown, range(144), settings, [1])
    owner, coverage = scene.patch_owner().ravel(), scene.patch_coverage().ravel()
    assert {item.kind for item in scene.objects} == {"square"}
    inside = [row for row in readings if coverage[row.token] == 1]
    background = [row for row in readings if owner[row.token] < 0]
    assert (len(inside), len(background)) == (6, 116)
    assert {row.word for row in inside} == {"square"}
    assert min(row.probability for row in inside) > 0.8
    assert max(row.probability for row in background) < 0.3


def test_maps_colour_the_pixels_of_their_tokens():
    boxes = np.array([[0, 0, 3.4, 4], [3.4, 0, 6.8, 4], [6.8, 0, 10, 4]])
    drawn = painted((10, 5), boxes, np.array([1.0, np.nan, 3.0]))
    assert drawn[:4, :3].tolist() == [[1, 1, 1]] * 4
    assert np.isnan(drawn[:4, 3:7]).all()
    assert (drawn[:4, 7:] == 3).all()
    assert np.isnan(drawn[4]).all()


def test_tokens_command_writes_a_table_and_overlays(checkpoint, tmp_path):
    tiny.random_image(1).save(tmp_path / "noise.png")
    options = ["--model", checkpoint, "--out", tmp_path / "out", "--prompt", "Is it red?", "--prompt", "What?"]
    rcb("tokens", tmp_path / "noise.png", "--tokens", "1,5-6", *options)
    table = pd.read_csv(tmp_path / "out" / "tokens-noise.tsv", sep="\t")
    assert table[["prompt", "token"]].to_numpy().tolist() == [[1, 1], [1, 5], [1, 6], [2, 1], [2, 5], [2, 6]]
    document = json.loads((tmp_path / "out" / "tokens-noise.json").read_text())
    assert document["prompts"] == ["Is it red?", "What?"]
    assert document["rows"][4]["probability"] == pytest.approx(table["probability"][4], rel=1e-4)
    for ending in ("png", "svg", "pdf"):
        assert (tmp_path / "out" / f"tokens-noise-prompt2.{ending}").stat().st_size > 5000
    with Image.open(tmp_path / "out" / "tokens-noise-prompt1.png") as picture:
        assert picture.width > 1000


# Influence


def jensen_shannon(intact, ablated, top_k):
    """Eq. 7 to 10 by scipy, which returns the root."""
    ids = intact.topk(top_k).indices
    return jensenshannon(intact[ids].softmax(-1).numpy(), ablated[ids].softmax(-1).numpy()) ** 2


def test_divergences_are_those_of_prompts_made_by_hand(session, shown):
    settings = settings_for("llava", "paper", article="keep", prompt="Is it red?")
    found = influence(session, shown, [0, 6, 15], settings)
    family, tokens = session.family, shown.view.features
    pad = family.pad_embedding
    around = {0: [0, 1, 2, 4, 5, 6, 8, 9, 10], 6: [1, 2, 3, 5, 6, 7, 9, 10, 11], 15: [5, 6, 7, 9, 10, 11, 13, 14, 15]}

    def without(slots):
        changed = tokens.clone()
        changed[slots] = pad
        return changed

    intact = logits_of(family, "Is it red?", tokens)
    for row, (token, window) in enumerate(around.items()):
        region = jensen_shannon(
            logits_of(family, "Is it red?", tokens[window]),
            logits_of(family, "Is it red?", without([token])[window]),
            20,
        )
        whole = jensen_shannon(intact, logits_of(family, "Is it red?", without(window)), 20)
        direct = jensen_shannon(intact, logits_of(family, "Is it red?", without([token])), 20)
        assert float(found.region[row]) == pytest.approx(region, rel=1e-3)
        assert float(found.whole[row]) == pytest.approx(whole, rel=1e-3)
        assert float(found.direct[row]) == pytest.approx(direct, rel=1e-3)
        assert float(found.combined[row]) == pytest.approx(region + 16 * whole, rel=1e-3)
    assert 0 < found.noise < 1e-8
    table = influence_table(shown, found)
    assert table[["token", "row", "column"]].to_numpy().tolist() == [[0, 0, 0], [6, 1, 2], [15, 3, 3]]
    drawn = influence_maps(shown, found)["divergence, direct (nats)"]
    assert np.flatnonzero(~np.isnan(drawn)).tolist() == [0, 6, 15]


def test_the_candidates_that_move_most_are_named_with_both_logits(session, shown, settings):
    found = influence(session, shown, [2, 9], settings)
    changes = candidate_changes(session, found, [1], count=3)
    assert changes["token"].unique().tolist() == [9]
    direct = changes[changes["level"] == "direct"]
    tokens = shown.view.features.clone()
    intact = logits_of(session.family, "Is it red?", tokens)
    tokens[9] = session.family.pad_embedding
    ablated = logits_of(session.family, "Is it red?", tokens)
    likeliest = intact.topk(50).indices
    moved = likeliest[(intact - ablated)[likeliest].abs().topk(3).indices]
    assert direct["with"].tolist() == pytest.approx(intact[moved].tolist(), abs=1e-4)
    assert direct["without"].tolist() == pytest.approx(ablated[moved].tolist(), abs=1e-4)
    assert (direct["change"] == direct["with"] - direct["without"]).all()
    assert changed_answers(found, "direct") <= 2


def test_a_scene_answers_otherwise_without_the_window_on_its_object(lab, scene):
    settings = settings_for("llava", "lab")
    found = influence(lab, open_shown(lab, scene.image()), range(144), settings)
    owner = scene.patch_owner().ravel()
    # What is left out is a 3 x 3 window, so that neighbours of an object's patches count as well.
    top = found.combined.argsort(descending=True)[:4].tolist()
    assert {int(owner[token]) for token in top} == {0, 1}
    red = next(number for number, item in enumerate(scene.objects) if item.colour == "red")
    (best,) = [token for token in top[:1] if owner[token] == red]
    changes = candidate_changes(lab, found, [best]).query("level == 'global'").set_index("candidate")["change"]
    assert changes["red"] > 1 > -1 > changes["black"]
    facts, told = explain_cascade(found)
    assert facts["direct"]["median"] < facts["whole"]["median"] / 10
    assert facts["rank_correlation"]["direct_combined"] > 0.5
    assert "of 144 tokens" in told


def test_influence_command_writes_maps_and_candidates(checkpoint, tmp_path):
    tiny.random_image(1).save(tmp_path / "noise.png")
    arguments = ["--model", checkpoint, "--out", tmp_path, "--tokens", "0,3-5", "--candidates", 2]
    said = rcb("influence", tmp_path / "noise.png", *arguments)
    document = json.loads((tmp_path / "influence-noise.json").read_text())
    assert [row["token"] for row in document["rows"]] == [0, 3, 4, 5]
    assert len({row["token"] for row in document["candidates"]}) == 2
    assert document["cascade"]["tokens"] == 4
    assert "one rounding step" in said
    assert (tmp_path / "influence-noise-candidates.svg").exists()


# Curves


def patches_of(values, keys):
    """A table of `(images, k)` probabilities and similarities; divergences are the probabilities' doubles."""
    rows = [
        {"image": f"i{image}", "token": token, "probability": p, "divergence": 2 * p, "cls_similarity": key}
        for image, (line, own) in enumerate(zip(values, keys, strict=True))
        for token, (p, key) in enumerate(zip(line, own, strict=True))
    ]
    return pd.DataFrame(rows)


def test_curves_average_what_stands_at_one_rank():
    values = np.array([[0.1, 0.9, 0.5, 0.3], [0.8, 0.2, 0.4, 0.6], [0.2, 0.4, 0.9, 0.1]])
    keys = np.array([[1, 2, 3, 4], [4, 3, 2, 1], [1, 3, 2, 4]])
    table = patches_of(values, keys)
    by_probability, by_divergence = curves(table)
    ranked = np.array([[0.3, 0.5, 0.9, 0.1], [0.8, 0.2, 0.4, 0.6], [0.1, 0.4, 0.9, 0.2]])
    assert by_probability.mean == pytest.approx(ranked.mean(0))
    half = 4.302652729911275 * ranked.std(0, ddof=1) / 3**0.5  # Student's t for two degrees of freedom
    assert by_probability.half_width == pytest.approx(half)
    assert by_divergence.mean == pytest.approx(2 * ranked.mean(0))
    # Ranks 1 4 3 2, 4 1 2 3 and 2 3 4 1 beside 1 2 3 4, 4 3 2 1 and 1 3 2 4: 1 - 6 sum d^2 / 60.
    assert by_probability.correlation == pytest.approx(np.mean([1 - 6 * 8 / 60, 1 - 6 * 8 / 60, 1 - 6 * 14 / 60]))
    own = by_probability
    assert (own.first, own.middle, own.last) == pytest.approx((0.4, (0.5 + 0.2 + 0.4 + 0.9 + 0.4 + 0.9) / 6, 0.3))
    assert not by_probability.falls
    assert confident_shares(table) == {"cls_similarity": pytest.approx(1 / 3)}
    told = explain_curves(curves(table), table)
    assert "claim that neither falls is not contradicted here (3 images, 12 patches)" in told
    with pytest.raises(UserError, match="1 image"):
        curves(table[table["image"] == "i0"])


def test_a_value_that_follows_the_order_falls_with_it():
    random = np.random.default_rng(0)
    keys = random.random((12, 9))
    table = patches_of(keys + 0.3 * random.random((12, 9)), keys)
    table["attention"] = random.random(len(table))
    found = {(curve.order, curve.value): curve for curve in curves(table)}
    assert found["cls_similarity", "probability"].falls
    assert found["cls_similarity", "probability"].correlation > 0.8
    assert not found["attention", "probability"].falls
    assert "fails in part" in explain_curves(list(found.values()), table)


def test_curves_command_measures_an_even_grid(checkpoint, session, tmp_path):
    for seed in range(3):
        tiny.random_image(seed).save(tmp_path / f"{seed}.png")
    arguments = ["--model", checkpoint, "--out", tmp_path / "out", "--patches", 4, "--layers", "2,3", "--limit", 2]
    said = rcb("curves", "--images", tmp_path, *arguments)
    assert "(2 images, 8 patches)" in said
    table = pd.read_csv(tmp_path / "out" / "curves.tsv", sep="\t", dtype={"image": str})
    assert table["token"].tolist() == [5, 7, 13, 15] * 2
    assert table["image"].unique().tolist() == ["0", "1"]
    shown = open_shown(session, tmp_path / "1.png")
    settings = settings_for("llava", "official")
    readings, attention = read_tokens(session, shown, [5, 7, 13, 15], settings, [2, 3])
    own = table[table["image"] == "1"]
    assert own["probability"].tolist() == pytest.approx([row.probability for row in readings], rel=1e-4)
    expected = [float(attention[2][t] + attention[3][t]) for t in own["token"]]
    assert own["attention"].tolist() == pytest.approx(expected, rel=1e-5)  # six digits are written
    assert len(json.loads((tmp_path / "out" / "curves.json").read_text())["curves"]) == 4


# Feature space


@pytest.fixture(scope="module")
def stats(family, tmp_path_factory):
    """Finished statistics of four tiny images, and settings of which every threshold lets a part of the tokens pass."""
    folder = tmp_path_factory.mktemp("built")
    for seed in range(4):
        tiny.random_image(seed).save(folder / f"{seed}.png")
    out = folder / "all.safetensors"
    loose = {"tau_prob": 2, "tau_jsd": 1e9, "tau_in": 1, "clusters_across": 3, "clusters_per_image": 3, "probes": 12}
    settings = settings_for("llava", "official", **loose)
    build(family, sorted(folder.glob("*.png")), out, settings, progress=False)
    files = sorted(Path(f"{out}.stats").glob("*.safetensors"))
    scores = [patch_scores(ImageStatistics.read(file), settings) for file in files]
    probability, divergence = (torch.cat(parts).quantile(0.8).item() for parts in zip(*scores, strict=True))
    return Path(f"{out}.stats"), replace(settings, tau_prob=probability, tau_jsd=divergence, tau_out=5)


def test_the_plane_of_a_pca_is_that_of_the_singular_vectors():
    tokens = np.random.default_rng(0).normal(size=(30, 6)) * [5, 3, 1, 1, 1, 1]
    centred = tokens - tokens.mean(0)
    expected = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
    assert np.abs(embed(tokens, "pca")) == pytest.approx(np.abs(expected))
    assert (embed(tokens, "tsne") == embed(tokens, "tsne")).all()
    with pytest.raises(UserError, match="method=umap"):
        embed(tokens, "umap")
    with pytest.raises(UserError, match="2 tokens"):
        embed(tokens[:2], "pca")


def test_an_images_tokens_carry_their_cluster_and_what_they_say(session, shown):
    settings = settings_for("llava", "paper", article="keep", prompt="Is it red?", clusters_per_image=3)
    table = image_features(session, shown, settings, "pca")
    labels = dpc_knn(shown.view.features, 3, 16, include_self=False).labels
    assert table["cluster"].tolist() == labels.tolist()
    assert table["cluster_size"].tolist() == [int((labels == label).sum()) for label in labels]
    readings, _ = read_tokens(session, shown, range(16), settings, [1])
    assert table["probability"].tolist() == [row.probability for row in readings]
    assert "16 of 16 tokens" in explain_outliers(table, 1.1)


def test_small_clusters_of_silent_tokens_are_called_outliers():
    table = pd.DataFrame({"probability": [0.1] * 6 + [0.9] * 20, "cluster_size": [2] * 6 + [10] * 20})
    assert explain_outliers(table, 0.3).endswith("as here.")
    table["cluster_size"] = table["cluster_size"].max() + 2 - table["cluster_size"]
    assert explain_outliers(table, 0.3).endswith("not here.")
    assert explain_outliers(table.iloc[5:8], 0.3).endswith("too few differ to say.")


def test_candidates_of_many_images_are_those_of_the_codebook(stats):
    codebook = threshold(*stats)
    table, told = candidate_map(*stats, "pca")
    common = table[table["common"]]
    rows = codebook.meta["rows"]
    assert sorted(zip(common["image"], common["token"], strict=True)) == sorted(
        zip(rows["image"], rows["patch"], strict=True)
    )
    assert codebook.meta["counts"]["candidates"] == len(table)
    assert f"images; {len(common)} of them, from {common['image'].nunique()} images, lie" in told


def test_a_codebook_of_the_first_images_is_that_of_a_build_of_them(family, stats, tmp_path):
    folder, settings = stats
    images = sorted(folder.parent.glob("*.png"))[:3]
    alone = build(family, images, tmp_path / "three.safetensors", settings, progress=False)
    chosen = threshold(folder, settings, limit=3)
    assert chosen.sha256 == alone.sha256
    assert chosen.meta["images"] == alone.meta["images"] == 3
    assert len(chosen) < len(threshold(folder, settings))


def test_features_command_draws_an_image_or_candidates(checkpoint, stats, tmp_path):
    folder, settings = stats
    image = folder.parent / "1.png"
    rcb("features", image, "--model", checkpoint, "--out", tmp_path, "--method", "pca")
    assert len(pd.read_csv(tmp_path / "features-1.tsv", sep="\t")) == 16
    names = ("tau_prob", "tau_jsd", "tau_in", "tau_out", "probes", "clusters_across", "clusters_per_image")
    chosen = [f"--setting={name}={getattr(settings, name)}" for name in names]
    said = rcb("features", "--stats", folder, "--model", checkpoint, "--out", tmp_path, *chosen)
    assert "of 4 images" in said
    assert (tmp_path / "candidates.pdf").stat().st_size > 3000
    result = CliRunner().invoke(app, ["analyze", "features", str(image), "--stats", str(folder)])
    assert isinstance(result.exception, UserError)


# The codebook study


def test_every_threshold_left_out_lets_more_pass(stats):
    folder, settings = stats
    variants = ablate(folder, settings, shares=(0.75, 0.2))
    assert [own.name for own in variants] == [
        "all", "no-tau_prob", "no-tau_jsd", "no-tau_out", "no-tau_in", "75-percent-images", "100-images"
    ]  # fmt: skip
    whole = variants[0].codebook
    for own in variants[1:4]:
        assert own.codebook.meta["counts"]["candidates"] > whole.meta["counts"]["candidates"]
    # Without the last threshold all candidates are prototypes.
    without_in = variants[4].codebook
    assert len(without_in) == without_in.meta["counts"]["candidates"] == whole.meta["counts"]["candidates"]
    assert [(own.images, own.settings.tau_in) for own in variants[5:]] == [(3, 0), (1, 0)]
    table = ablation_table(variants, folder)
    assert table["prototypes"].tolist() == [len(own.codebook) for own in variants]
    assert table["agreement"].iloc[0] == 1
    assert table["agreement"].between(0, 1).all()
    assert table["tau_prob"].tolist()[:2] == [settings.tau_prob, "-"]


def test_agreement_counts_tokens_that_both_keep(stats):
    folder, settings = stats
    variants = ablate(folder, settings, shares=())
    shares = []
    for file in sorted(folder.glob("*.safetensors")):
        tokens = torch.nn.functional.normalize(ImageStatistics.read(file).features, dim=-1)
        kept = []
        for own in (variants[0], variants[4]):
            prototypes = torch.nn.functional.normalize(own.codebook.prototypes, dim=-1)
            redundancy = (tokens @ prototypes.T).amax(-1)
            kept.append(set(redundancy.argsort(stable=True)[: round(len(tokens) / 9)].tolist()))
        shares.append(len(kept[0] & kept[1]) / len(kept[0]))
    assert ablation_table(variants, folder)["agreement"][4] == pytest.approx(np.mean(shares))


def test_coverage_is_the_share_of_tokens_near_a_prototype(session, stats):
    folder, settings = stats
    codebook, images = threshold(folder, settings), sorted(folder.parent.glob("*.png"))
    table, facts = coverage(session, codebook, images)
    cosines = []
    for image in images:
        tokens = torch.nn.functional.normalize(open_shown(session, image).view.features, dim=-1)
        cosines.append(tokens @ torch.nn.functional.normalize(codebook.prototypes, dim=-1).T)
    largest = torch.cat(cosines).amax(-1)
    for row in table.itertuples():
        assert row.tokens == pytest.approx(float((largest >= row.cosine).float().mean()))
    assert (facts["tokens"], facts["prototypes"]) == (64, len(codebook))
    assert facts["nearest"] == len(codebook)  # each prototype is a token of these images
    assert table["images_without"].iloc[0] == 0


def test_the_gallery_shows_the_patches_behind_the_prototypes(session, stats):
    folder, settings = stats
    codebook, images = threshold(folder, settings), sorted(folder.parent.glob("*.png"))
    found = gallery(session, codebook, images)
    assert sum(count for count, _ in found) == len(codebook)
    for name, patch, _ in found[0][1]:
        token = open_shown(session, folder.parent / f"{name}.png").view.features[patch]
        assert (codebook.prototypes - token).abs().amax(-1).min() < 1e-5
    # Of patch 5 of a grid of 4 x 4, the window is the upper left nine, and its frame a third of the crop.
    pixels = np.asarray(crop(open_shown(session, Image.new("RGB", (80, 80), "green")), 5))
    white = np.argwhere((pixels == 255).all(-1))
    assert pixels.shape == (96, 96, 3)
    assert white.min(0).tolist() == [33, 33]
    assert white.max(0).tolist() == [63, 63]
    with pytest.raises(UserError, match="3 other images"):
        gallery(session, codebook, images[:3])
    with pytest.raises(UserError, match="does not say where"):
        gallery(session, Codebook(codebook.prototypes, {"id": "x"}), images)


def test_codebook_and_coverage_commands_write_what_they_made(checkpoint, stats, tmp_path):
    folder, settings = stats
    names = ("tau_prob", "tau_jsd", "tau_in", "tau_out", "probes", "clusters_across", "clusters_per_image")
    chosen = [f"--setting={name}={getattr(settings, name)}" for name in names]
    said = rcb("codebook", folder, "--model", checkpoint, "--out", tmp_path, *chosen)
    assert f"next: cd {tmp_path} && rcb eval table-3_llava-next-8b" in said
    made = {file.stem for file in (tmp_path / "codebooks" / "ablation").glob("*.safetensors")}
    assert {"all", "no-tau_prob", "no-tau_jsd", "no-tau_out", "no-tau_in"} <= made
    table = pd.read_csv(tmp_path / "ablation.tsv", sep="\t")
    assert table["codebook"].tolist()[:2] == ["all four thresholds", "without tau_prob"]
    file = tmp_path / "codebooks" / "ablation" / "all.safetensors"
    options = ["--images", folder.parent, "--model", checkpoint, "--out", tmp_path]
    said = rcb("coverage", file, "--gallery", *options)
    assert "64 tokens of 4 images" in said
    assert (tmp_path / "gallery-all.png").stat().st_size > 2000
