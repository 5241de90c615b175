"""All entries of the three families on tiny checkpoints: images, several images and videos, asked as lmms-eval asks."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_next
import tiny_onevision
import torch

from rcb_lmms.budget import Budget
from rcb_lmms.calibration import passes
from rcb_lmms.engine.encoding import ImageEncoder
from rcb_lmms.errors import UserError
from rcb_lmms.families.images import Visual
from rcb_lmms.models import ENTRIES, METHODS, class_name, entries, table
from rcb_lmms.pruners import make_pruner
from rcb_lmms.pruners.base import VisualTokens
from rcb_lmms.pruners.views import choose_views as select

ALL = [(family, method) for family in ENTRIES for method in ENTRIES[family]]
REFUSED = [("llava_onevision", "prumerge"), ("llava_onevision", "prumerge_plus")]
# Four by four patches hardly have attention outliers: PruMerge keeps one centre and the residual token. EVS keeps the
# first frame whole, and an image's only view with it.
BUDGETS = {"full": {}, "prumerge": {"keep": 2.5}, "rcb": {"ratio": 0.3}, "evs": {"ratio": 0.5},
           "pyramiddrop": {"ratio": 0.6}, "v2drop": {"ratio": 0.6}, "dart": {"ratio": 0.75}}  # fmt: skip
# Wide, tall and square: a base view and 2, 2 or 4 tiles.
WIDE, TALL, SQUARE = (112, 56), (56, 112), (112, 112)


@pytest.fixture(scope="module")
def checkpoints(checkpoint, tmp_path_factory):
    return {
        "llava": checkpoint,
        "llava_next": tiny_next.save_next(tmp_path_factory.mktemp("next")),
        "llava_onevision": tiny_onevision.save_onevision(tmp_path_factory.mktemp("onevision")),
    }


def save_video(path, seed, frames=9):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            image = tiny.random_image(100 * seed + number, 64, 48)
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return str(path)


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Ten documents: one image, several with and without placeholders, videos, a folder of frames, and none at all."""
    home = tmp_path_factory.mktemp("media")
    a, b, c = (tiny.random_image(seed, *size) for seed, size in enumerate((WIDE, TALL, SQUARE)))
    video, other = save_video(home / "a.mp4", 1), str(home / "b.webm")
    Path(save_video(home / "b.mp4", 2)).rename(other)  # lmms-eval goes by the ending, and calls this audio
    folder = home / "frames"
    folder.mkdir()
    for number in range(3):
        tiny.random_image(50 + number, 64, 48).save(folder / f"{number}.png")
    return [
        {"visuals": [a], "text": "What is it?"},
        {"visuals": [b], "text": "What is it, in a longer question?"},
        {"visuals": [c], "text": "Why"},
        {"visuals": [a, b], "text": "Is <image> like <image>?"},
        {"visuals": [a, b, c], "text": "Which is like <image>?"},
        {"visuals": [video], "text": "What happens?"},
        {"visuals": [other], "text": "What happens next?"},
        {"visuals": [str(folder)], "text": "And here?"},
        {"visuals": [a], "text": "What is it? Once more."},
        {"visuals": [], "text": "Nothing to see?"},
    ]


@pytest.fixture
def entry(checkpoints, codebook_file, tmp_path, monkeypatch):
    """Make an entry; RCB gets the tiny codebook."""
    monkeypatch.setenv("RCB_CACHE", str(tmp_path / "cache"))

    def make(family, method, **arguments):
        if method == "rcb":
            arguments = {"codebook": str(codebook_file), **arguments}
        model = getattr(entries, class_name(family, method))
        return model(pretrained=str(checkpoints[family]), **{"max_frames_num": 4, **arguments})

    return make


def ask(model, documents, share=slice(None), **generation):
    """Texts and token counts of the entry's answers to automatic chat messages, for a share of the documents."""
    from lmms_eval.api.instance import Instance
    from lmms_eval.api.task import ConfigurableMessagesTask

    model.task_dict = {"mixed": {"test": documents}}
    requests = [
        Instance(
            request_type="generate_until",
            arguments=(
                document["text"],
                lambda doc: ConfigurableMessagesTask._build_user_turn(doc["visuals"], doc["text"]),
                {"max_new_tokens": 4, **generation},
                number,
                "mixed",
                "test",
            ),
            idx=0,
            doc_id=number,
            metadata={"task": "mixed", "doc_id": number, "repeats": 1},
        )
        for number, document in list(enumerate(documents))[share]
    ]
    answers = model.generate_until(requests)
    return [answer.text for answer in answers], [answer.token_counts for answer in answers]


# Which entries there are


def test_classes_are_made_once_found_by_name_and_survive_pickle():
    names = {class_name(family, method) for family, method in ALL}
    assert len(names) == len(ALL)
    assert names <= set(dir(entries))
    made = entries.LlavaNextPrumergePlus
    assert (made.family_name, made.method, made.__module__) == ("llava_next", "prumerge_plus", entries.__name__)
    assert pickle.loads(pickle.dumps(made)) is made is entries.LlavaNextPrumergePlus
    with pytest.raises(AttributeError, match="LlavaMoondream"):
        _ = entries.LlavaMoondream


@pytest.mark.parametrize(("family", "method"), ALL)
def test_every_entry_answers_in_batches_as_one_by_one_or_is_refused(
    family, method, entry, documents, monkeypatch, clip_folder
):
    if (family, method) in REFUSED:
        monkeypatch.setattr("rcb_lmms.models.base.load_family", lambda **_: pytest.fail("loaded"))
        with pytest.raises(UserError, match="no cls_attention, keys") as refusal:
            entry(family, method)
        names = {f"{own}_{name}" for own, name in ALL if own == family and (own, name) not in REFUSED}
        assert set(refusal.value.allowed.split(", ")) == names
        return
    if (family, method) == ("llava_onevision", "visionzip"):  # which merges before the projector, not pooled tokens
        documents = [document for document in documents if not any(isinstance(own, str) for own in document["visuals"])]
    budget = BUDGETS.get(method, {"keep": 3})
    if method == "cdpruner" and family != "llava_onevision":
        budget = {**budget, "clip": str(clip_folder)}
    one = entry(family, method, batch_size=1, **budget)
    texts, counts = ask(one, documents)
    many = entry(family, method, batch_size=4, **budget)
    together, same_counts = ask(many, documents)
    assert one.run.failures == many.run.failures == []
    assert texts == together
    assert [row.to_dict() for row in counts] == [row.to_dict() for row in same_counts]
    assert len(set(texts)) > 4
    assert counts[-1].visual_native == counts[-1].visual_kept == 0
    if method in ("prumerge_plus", "fastv", "random", "stride"):
        assert all(row.visual_kept == budget["keep"] * row.visual_views for row in counts)


def test_what_was_resolved_is_in_the_record(entry):
    model = entry("llava_next", "random", keep=3, per="image", split="false", max_frames_num=5)
    resolved = model.run.resolved
    assert (resolved["per"], resolved["split"], resolved["pack"]) == ("image", "False", "auto")
    assert (resolved["video_backend"], resolved["max_frames_num"]) == ("pyav", "5")
    assert model.family.reader.max_frames == 5


# Counts, made by hand: 4 x 4 tokens per view, 2 x 2 per pooled frame

CASES = [
    # family, method, arguments, document -> native, kept, newlines, views
    ("llava_next", "random", {"keep": 4}, 0, (48, 12, 0, 3)),
    ("llava_next", "random", {"keep": 4, "pack": "flat_newline"}, 0, (48, 12, 1, 3)),
    ("llava_next", "random", {"keep": 4, "split": False}, 0, (16, 4, 1, 1)),
    ("llava_next", "random", {"keep": 4, "split": False, "pack": "flat"}, 0, (16, 4, 0, 1)),
    ("llava_next", "random", {"keep": 4}, 2, (80, 20, 0, 5)),
    ("llava_next", "random", {"keep": 4}, 4, (176, 44, 0, 11)),
    ("llava_next", "random", {"keep": 4}, 5, (64, 16, 4, 4)),
    ("llava_next", "random", {"keep": 4, "per": "image"}, 4, (176, 12, 0, 11)),
    ("llava_next", "prumerge_plus", {"keep": 7, "per": "image"}, 0, (48, 7, 0, 3)),
    # Tiles of the wide image: four rows of eight tokens, each with a newline.
    ("llava_next", "full", {}, 0, (48, 48, 4, 3)),
    ("llava_next", "full", {"pack": "flat"}, 0, (48, 48, 0, 3)),
    ("llava_next", "fastv", {"keep": 4}, 0, (48, 12, 4, 3)),
    ("llava_next", "fastv", {"keep": 4, "per": "image"}, 0, (48, 4, 4, 3)),
    ("llava_next", "fastv", {"ratio": 0.25, "per": "image"}, 0, (48, 12, 4, 3)),
    ("llava_next", "fastv", {"keep": 4, "per": "image"}, 3, (96, 8, 12, 6)),
    ("llava_onevision", "random", {"keep": 4}, 0, (48, 12, 0, 3)),
    ("llava_onevision", "random", {"keep": 4}, 3, (32, 8, 2, 2)),
    ("llava_onevision", "random", {"keep": 4, "pack": "flat"}, 3, (32, 8, 0, 2)),
    ("llava_onevision", "random", {"keep": 3}, 5, (16, 12, 1, 4)),
    ("llava_onevision", "random", {"keep": 3, "per": "image"}, 5, (16, 3, 1, 4)),
    ("llava_onevision", "rcb", {"keep": 3}, 5, (16, 12, 1, 4)),
    ("llava_onevision", "rcb", {"keep": 3, "per": "image"}, 5, (16, 3, 1, 4)),
    ("llava_onevision", "fastv", {"keep": 2}, 3, (32, 4, 2, 2)),
    ("llava_onevision", "full", {}, 0, (48, 48, 4, 3)),
    ("llava_next", "stride", {"keep": 4, "per": "image"}, 4, (176, 12, 0, 11)),
    ("llava_onevision", "stride", {"keep": 3}, 5, (16, 12, 1, 4)),
    # Two rows of three tokens; four of each view, of 14 for all three; one row of two.
    ("llava", "downsample", {"keep": 7}, 4, (48, 18, 0, 3)),
    ("llava_next", "downsample", {"keep": 7, "pack": "flat_newline"}, 0, (48, 18, 1, 3)),
    ("llava_next", "downsample", {"keep": 14, "per": "image"}, 0, (48, 12, 0, 3)),
    ("llava_onevision", "downsample", {"keep": 6, "split": False}, 0, (16, 6, 1, 1)),
    ("llava_onevision", "downsample", {"ratio": 0.25}, 4, (48, 12, 3, 3)),
    ("llava_onevision", "downsample", {"keep": 3}, 5, (16, 8, 1, 4)),
    ("llava", "random", {"keep": 4}, 4, (48, 12, 0, 3)),
    ("llava", "fastv", {"keep": 4}, 5, (64, 16, 0, 4)),
]


@pytest.mark.parametrize(("family", "method", "arguments", "document", "expected"), CASES)
def test_the_ledger_counts_what_a_hand_counts(family, method, arguments, document, expected, entry, documents):
    model = entry(family, method, **arguments)
    lengths = []
    decoder = model.family.model.model.language_model
    decoder.layers[-1].register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
        with_kwargs=True,
    )
    _, (counts,) = ask(model, [documents[document]])
    found = (counts.visual_native, counts.visual_kept, counts.visual_newlines, counts.visual_views)
    assert found == expected
    native, kept, newlines, _ = expected
    # What the last layer saw in the prefill: text, newlines, and the tokens that stayed.
    dropped = native - kept if method == "fastv" else 0
    assert lengths[0] == counts.input_tokens - dropped
    flops = (2, counts.input_tokens - dropped) if method == "fastv" else (None, None)
    assert counts.prefill_tflops == model.session.shape.prefill_flops(counts.input_tokens, *flops) / 1e12
    model.clean()
    achieved = model.run.achieved["mixed"]
    assert achieved["retained_with_newlines"] - achieved["retained_visual_tokens"] == newlines
    assert achieved["views"] == expected[3]


def test_fastv_keeps_all_of_a_prompt_whose_packing_cut_padding_off(entry, caplog):
    """80 x 60 pixels on 2 x 2 tiles: five views of 16 tokens, of which unpadding leaves 16 + 6 x 8."""
    asked = [{"visuals": [tiny.random_image(3, *size)], "text": "What is it?"} for size in ((80, 60), SQUARE)]
    for per, keep in (("view", 14), ("image", 70)):
        caplog.clear()
        model = entry("llava_next", "fastv", keep=keep, per=per, batch_size=2)
        texts, counts = ask(model, asked)
        found = [(row.visual_native, row.visual_kept, row.visual_views, row.visual_capped) for row in counts]
        assert found == [(64, 64, 5, 1), (80, 70, 5, 0)]
        assert texts[0] == ask(entry("llava_next", "full"), asked[:1])[0][0]
        model.clean()
        assert model.run.achieved["mixed"]["capped_prompts"] == 1
        assert "1 of 2 prompts had fewer visual tokens than the budget" in caplog.text
    _, (row, _) = ask(entry("llava_next", "fastv", ratio=1.0), asked)
    assert (row.visual_kept, row.visual_capped) == (64, 0)
    with pytest.raises(UserError, match="85 retained tokens"):  # no view has 17 tokens
        ask(entry("llava_next", "fastv", keep=17), asked[:1])


@pytest.mark.parametrize("family", list(ENTRIES))
def test_methods_that_keep_everything_are_the_unpruned_model(family, entry, documents):
    pack = {} if family == "llava" else {"pack": "flat"}
    unpruned, native = ask(entry(family, "full", **pack), documents)
    for method in ("rcb", "stride", "downsample"):
        texts, counts = ask(entry(family, method, ratio=1, **pack), documents)
        assert texts == unpruned
        # RCB has compared every token with its codebook all the same.
        assert [row.method_tflops > 0 for row in counts] == [method == "rcb" and row.visual_views > 0 for row in native]
        assert [{**row.to_dict(), "method_tflops": 0.0} for row in counts] == [row.to_dict() for row in native]


# Budgets per view and per image


def random_views(counts, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        VisualTokens(
            torch.randn(count, width, generator=generator),
            (1, count),
            encoder_features=torch.randn(count, width, generator=generator),
            keys=torch.randn(count, width, generator=generator),
            cls_attention=torch.rand(count, generator=generator),
            key=f"{seed}-{number}",
        )
        for number, count in enumerate(counts)
    ]


@pytest.mark.parametrize("variant", ["max_cosine", "double_softmax"])
def test_views_of_an_image_compete_for_its_budget(variant):
    from rcb_lmms import Codebook

    views = random_views([9, 4, 25])
    codebook = Codebook(torch.randn(5, 6, generator=torch.Generator().manual_seed(3)), {"id": "x", "model": "x"})
    pruner = make_pruner("rcb", codebook=codebook, variant=variant, budget=Budget.tokens(10))
    selections = select(pruner, views, "image")
    # Brute force in float64 over all tokens of the image.
    tokens = torch.cat([view.features for view in views]).double()
    cosines = torch.nn.functional.normalize(tokens) @ torch.nn.functional.normalize(codebook.prototypes.double()).T
    if variant == "double_softmax":
        cosines = cosines.softmax(0) * cosines.softmax(1)
    expected = sorted(cosines.amax(1).argsort()[:10].tolist())
    starts = [0, 9, 13]
    chosen = [start + int(k) for start, own in zip(starts, selections, strict=True) for k in own.kept]
    assert chosen == expected
    assert [len(own.scores) for own in selections] == [9, 4, 25]
    (alone,) = select(pruner, views[2:], "image")
    assert torch.equal(alone.kept, pruner.choose(views[2]).kept)


def test_random_draws_over_all_views_and_prumerge_shares_evenly():
    views = random_views([9, 4, 25])
    draws = [select(make_pruner("random", budget=Budget.tokens(12), seed=seed), views, "image") for seed in (1, 2)]
    assert [sum(map(len, kept)) for kept in draws] == [12, 12]
    assert [own.kept.tolist() for own in draws[0]] != [own.kept.tolist() for own in draws[1]]
    for method in ("prumerge", "prumerge_plus"):
        pruner = make_pruner(method, budget=Budget.tokens(8), neighbours=2)
        assert list(map(len, select(pruner, views, "image"))) == [3, 3, 2]
        with pytest.raises(UserError, match="3 views of it"):
            select(make_pruner(method, budget=Budget.tokens(2)), views, "image")


def evidence_of(model, documents, read):
    """Per document, an array of what `read` says of every view of every image, encoded once more by itself."""
    from lmms_eval.api.task import ConfigurableMessagesTask

    rows = []
    for document in documents:
        turns = ConfigurableMessagesTask._build_user_turn(document["visuals"], document["text"])
        media = [item["url"] for item in turns[0]["content"] if item["type"] != "text"]
        images = [image for image in media if not isinstance(image, str)]
        role = model.family.several if len(images) > 1 else "image"
        visuals = [Visual((image,), role) for image in images]
        visuals += [visual for path in media if isinstance(path, str) for visual in model.family.open_video(path)]
        rows.append([[read(view) for view in model.family.encode([visual], model._needs())[0]] for visual in visuals])
    return rows


@pytest.mark.parametrize("per", ["view", "image"])
@pytest.mark.parametrize("family", list(ENTRIES))
def test_a_mean_budget_is_the_best_that_any_threshold_reaches(family, per, entry, documents):
    target = 5.5 if per == "view" else 9.25
    model = entry(family, "rcb", keep=target, preset="paper", per=per)
    scores = evidence_of(model, documents, lambda view: model.settings.pruner.redundancy(view).numpy())
    images = [image for document in scores for image in document]
    shares = sum(len(image) for image in images) if per == "view" else len(images)
    pooled = np.sort(np.concatenate([view for image in images for view in image]))
    best = min(abs(count / shares - target) for count in range(1, len(pooled) + 1))
    _, counts = ask(model, documents)
    record = model.run.calibrations["mixed"]
    assert record["per"] == per
    assert record["questions"] == len(images)
    assert record["native"] == pytest.approx(len(pooled) / shares)
    threshold = record["fitted"]["threshold"]
    assert record["achieved"] == pytest.approx(sum(row.visual_kept for row in counts) / shares)
    for document, row in zip(scores, counts, strict=True):
        parts = parts_of(document, per)
        low = sum(max(1, (part < threshold).sum()) for part in parts)
        high = sum(max(1, (part <= threshold).sum()) for part in parts)
        assert low <= row.visual_kept <= high
    # A picture that stands in several questions moves the mean by several tokens at once.
    assert abs(record["achieved"] - target) <= best + 3 / shares


def parts_of(document, per):
    return (
        [np.concatenate(image) for image in document] if per == "image" else [view for own in document for view in own]
    )


def best_prumerge_mean(images, target, per):
    """By trying every scale up to one that keeps everything: the mean of retained tokens nearest to the target."""
    shares = len(images) if per == "image" else sum(map(len, images))
    means = []
    for scale in np.linspace(0, 40, 8001):
        kept = [
            max(1, min(native - 1, round(float(scale) * outliers))) + 1 for own in images for outliers, native in own
        ]
        means.append(sum(kept) / shares)
    return min(means, key=lambda mean: abs(mean - target))


@pytest.mark.parametrize(("per", "target"), [("view", 3.2), ("image", 7.0)])
def test_prumerge_meets_a_mean_over_views_or_images(per, target, entry, documents):
    model = entry("llava_next", "prumerge", keep=target, per=per)
    pairs = evidence_of(model, documents, lambda view: model.settings.pruner.evidence(view).int().tolist())
    images = [image for document in pairs for image in document]
    assert any(outliers for image in images for outliers, _ in image)
    _, counts = ask(model, documents)
    record = model.run.calibrations["mixed"]
    shares = len(images) if per == "image" else sum(map(len, images))
    assert record["achieved"] == pytest.approx(sum(row.visual_kept for row in counts) / shares)
    assert abs(record["achieved"] - target) == pytest.approx(abs(best_prumerge_mean(images, target, per) - target))


def test_matched_methods_retain_what_the_baseline_chooses(entry, documents):
    baseline = make_pruner("prumerge", budget=Budget.adaptive())
    three_views = documents[:2] + documents[3:4]  # an exact count for every image must leave each view of it a share
    for method, per, asked in [
        ("rcb", "view", documents),
        ("rcb", "image", documents),
        ("prumerge_plus", "view", documents),
        ("prumerge_plus", "image", three_views),
    ]:
        model = entry("llava_next", method, match="prumerge", per=per)
        kept = evidence_of(model, asked, lambda view: len(baseline.choose(view)))
        images = [image for document in kept for image in document]
        mean = sum(map(sum, images)) / (len(images) if per == "image" else sum(map(len, images)))
        _, counts = ask(model, asked)
        record = model.run.calibrations["mixed"]
        assert record["target"] == pytest.approx(mean)
        if method == "prumerge_plus":
            assert record["fitted"] == {"tokens": round(mean)}
            spent = [row.visual_views if per == "view" else row.visual_views // 3 for row in counts]
            assert [row.visual_kept for row in counts] == [round(mean) * times for times in spent]


def test_a_matched_count_that_some_image_cannot_have_is_refused_before_any_answer(entry, documents, monkeypatch):
    monkeypatch.setattr("rcb_lmms.engine.session.generate", lambda *_: pytest.fail("asked"))
    mixed = [*documents[:2], *[documents[5]] * 3, documents[2]]  # three views, one (four frames), and five
    with pytest.raises(UserError, match="1 to 5 views, each of which keeps 2 tokens at least") as refusal:
        ask(entry("llava_next", "prumerge_plus", match="prumerge", per="image"), mixed)
    assert refusal.value.allowed == "counts from 10 to 16"
    assert refusal.value.next_step == "keep=10, or per=view"
    monkeypatch.undo()
    _, counts = ask(entry("llava_next", "prumerge_plus", keep=10, per="image"), mixed)
    assert [row.visual_kept for row in counts] == [10, 10, 40, 40, 40, 10]


def test_a_calibration_is_not_taken_over_by_another_setting(entry, documents, monkeypatch):
    def cached(**arguments):
        model = entry("llava_next", "rcb", keep=4, **arguments)
        ask(model, documents[:3])
        return model.run.calibrations["mixed"]["cached"]

    assert [cached(), cached()] == [False, True]
    assert not any(cached(**other) for other in ({"per": "image"}, {"split": False}, {"max_frames_num": 3}))
    monkeypatch.setattr(passes, "sources_hash", lambda: "changed")
    assert not cached()


# Media


def test_media_that_cannot_be_read_are_failed_samples(entry, documents, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    tiny.random_image(0).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200])
    (tmp_path / "sound.wav").write_bytes(b"RIFF")
    paths = [str(tmp_path / name) for name in ("broken.mp4", "absent.mp4", "cut.png", "sound.wav", "whole.png")]
    asked = [*({"visuals": [path], "text": "What?"} for path in paths), documents[5]]
    for family in ENTRIES:
        model = entry(family, "full")
        _, counts = ask(model, asked)
        errors = {failure["doc_id"]: failure["error"] for failure in model.run.failures}
        assert sorted(errors) == [0, 1, 2, 3]
        for number, name in enumerate(("broken.mp4", "absent.mp4", "cut.png", "a document with audio")):
            assert name in errors[number]
        assert counts[4].visual_native > 0
        assert counts[5].visual_views == 4


def test_a_video_question_reads_the_seconds_it_names(entry, tmp_path):
    """lmms-eval's chat protocol gives them as `start_time` and `end_time`."""
    from types import SimpleNamespace

    from datasets import Dataset

    from rcb_lmms.models.requests import questions_of

    rows = Dataset.from_list([{"question": "What?"}])
    path = save_video(tmp_path / "a.mp4", 3, frames=20)  # four seconds
    family = entry("llava", "full", max_frames_num=2).family

    def load(**times):
        content = [{"type": "video", "url": path, **times}, {"type": "text", "text": "What?"}]
        arguments = ("", lambda doc: [{"role": "user", "content": content}], {}, 0, "t", "s")
        (question,) = questions_of([SimpleNamespace(args=arguments, metadata=None)], {"t": {"s": rows}}, 0)
        return question.load(family)

    messages, whole = load()
    assert [item["type"] for item in messages[0]["content"]] == ["image", "image", "text"]
    assert [visual.role for visual in whole] == ["base", "base"]
    _, part = load(start_time=2.0, end_time=3.0)
    frames = family.reader.read(path, 2.0, 3.0)
    assert [visual.key for visual in part] == [Visual((frame,), "base").key for frame in frames]
    assert {visual.key for visual in part}.isdisjoint({visual.key for visual in whole})


# Engine


def test_the_tower_is_given_frames_in_bounded_batches_and_less_of_them_when_memory_runs_out(checkpoints, monkeypatch):
    from rcb_lmms.families import load_family

    family = load_family(str(checkpoints["llava_onevision"]))
    images = [tiny.random_image(seed, *SQUARE) for seed in range(6)]
    video = Visual(tuple(images[:4]), "video")
    visuals = [Visual((images[0],)), Visual((images[1],)), video, Visual((images[2],), "base"), Visual((images[3],))]
    encoder = ImageEncoder(family, frozenset(), batch_size=4)
    assert [len(batch) for batch in encoder.batches(visuals)] == [2, 1, 2]
    calm = encoder.views(visuals)
    assert [len(views) for views in calm] == [5, 5, 4, 1, 5]
    sizes = []

    def tight(module, arguments):
        sizes.append(len(arguments[0]))
        if len(arguments[0]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    family.model.model.vision_tower.register_forward_pre_hook(tight)
    encoder = ImageEncoder(family, frozenset(), batch_size=4)
    under_pressure = encoder.views(visuals)
    assert max(sizes[-3:]) <= 2
    assert family.tower_batch == 2
    assert type(family).tower_batch == 16
    for a, b in zip(calm, under_pressure, strict=True):
        for view, again in zip(a, b, strict=True):
            assert view.key == again.key
            torch.testing.assert_close(view.features, again.features, rtol=0, atol=1e-5)
    family.tower_batch = 1
    family.model.model.vision_tower.register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
    )
    with pytest.raises(torch.OutOfMemoryError):
        ImageEncoder(family, frozenset()).views([video])


def work(arguments, documents_file, out):
    """What one process of two does with its share of the documents, which lmms-eval deals out in turn."""
    import torch.distributed as dist

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    model = entries.LlavaNextRcb(**json.loads(arguments))
    model._rank, model._world_size = rank, size
    texts, counts = ask(model, pickle.loads(Path(documents_file).read_bytes()), slice(rank, None, size))
    model.clean()
    answers = [(text, row.to_dict()) for text, row in zip(texts, counts, strict=True)]
    record = {"answers": answers, "achieved": model.run.achieved, "calibrations": model.run.calibrations}
    Path(f"{out}-{rank}.json").write_text(json.dumps(record))
    dist.destroy_process_group()


def test_two_processes_give_the_results_of_one(entry, checkpoints, documents, codebook_file, tmp_path):
    """Tiles, several images and videos, and a mean budget over all of them; `accelerate launch` starts the two."""
    texts, counts = ask(one := entry("llava_next", "rcb", keep=5), documents)
    one.clean()
    arguments = {"pretrained": str(checkpoints["llava_next"]), "codebook": str(codebook_file), "keep": 5}
    (tmp_path / "documents").write_bytes(pickle.dumps(documents))
    given = [json.dumps({**arguments, "max_frames_num": 4}), str(tmp_path / "documents"), str(tmp_path / "two")]
    code = "import sys, test_entries; test_entries.work(*sys.argv[1:])"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", tiny.free_port(), "--no_python", sys.executable, "-c", code]
    shared = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "RCB_CACHE": str(tmp_path / "other-cache")}
    shared["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run([*launch, *given], env={**os.environ, **shared}, check=True, timeout=300)
    two = [json.loads((tmp_path / f"two-{rank}.json").read_text()) for rank in (0, 1)]
    for rank in (0, 1):
        assert two[rank]["achieved"] == one.run.achieved
        assert two[rank]["calibrations"]["mixed"]["fitted"] == one.run.calibrations["mixed"]["fitted"]
        mine = [[text, row.to_dict()] for text, row in zip(texts, counts, strict=True)][rank::2]
        assert two[rank]["answers"] == mine


# What is kept and shown


def test_the_documentation_shows_the_table_of_entries():
    text = Path(__file__).parents[1].joinpath("docs", "entries.md").read_text()
    _, _, rest = text.partition(table.BEGIN + "\n")
    shown, _, _ = rest.partition("\n" + table.END)
    assert shown == table.entries_table(), "python -m rcb_lmms.models.table"
    for family, method in ALL:
        (row,) = [
            line for line in shown.splitlines() if line.startswith(f"| `{family}_{method}` | `{METHODS[method]}` |")
        ]
        assert ("refused" in row) == ((family, method) in REFUSED)
