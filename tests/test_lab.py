"""The laboratory: scenes, questions, packed sequences, training that resumes, and benchmark files."""

from __future__ import annotations

import dataclasses
import hashlib
import re

import numpy as np
import pytest
import torch

from rcb_lmms.errors import UserError
from rcb_lmms.files import read_jsonl
from rcb_lmms.lab import data, scene_questions
from rcb_lmms.lab.checkpoint import lab_checkpoint
from rcb_lmms.lab.image_data import MME_SUBTASKS, POPE_CATEGORIES
from rcb_lmms.lab.scenes import COLOURS, GRID, IMAGE_SIZE_PX, KINDS, PATCH_PX, make_scene
from training.examples import plain
from training.language import Wording
from training.model import make_model, make_processor
from training.packing import pack, run_packed
from training.tower import patch_labels
from training.train import BENCHMARKS, LANGUAGE, LOG_NAME, TOWER, train
from training.views import choose_tokens, make_view
from training.vision import make_tower, preprocess

SCENES = [make_scene("test", index) for index in range(60)]


@pytest.fixture(scope="module")
def model_and_wording():
    torch.manual_seed(0)
    processor = make_processor()
    return make_model(processor.tokenizer).eval(), Wording(processor.tokenizer), processor


# Scenes


def test_scene_is_a_pure_function_of_split_and_index():
    digest = hashlib.sha256(make_scene("codebook", 5).pixels().tobytes()).hexdigest()
    for other in range(3):
        make_scene("codebook", other).pixels()
    assert hashlib.sha256(make_scene("codebook", 5).pixels().tobytes()).hexdigest() == digest
    assert make_scene("codebook", 5) == make_scene("codebook", 5)


def test_splits_share_no_scene_and_no_handwriting():
    splits = {name: [make_scene(name, index) for index in range(80)] for name in ("train", "codebook", "test")}
    layouts = {name: {scene.objects for scene in scenes} for name, scenes in splits.items()}
    samples = {
        name: {o.sample for s in scenes for o in s.objects if o.sample is not None} for name, scenes in splits.items()
    }
    for one, two in (("train", "codebook"), ("train", "test"), ("codebook", "test")):
        assert not layouts[one] & layouts[two]
        assert samples[one]
        assert not samples[one] & samples[two]


def test_scenes_vary_as_the_benchmarks_need():
    counts = {len(scene.objects) for scene in SCENES}
    assert counts == {1, 2, 3, 4}
    assert {o.colour for s in SCENES for o in s.objects} == set(COLOURS)
    assert all(28 <= o.box[2] - o.box[0] <= 42 for s in SCENES for o in s.objects)


def test_patch_owner_and_coverage_equal_brute_force():
    for scene in SCENES[:20]:
        owner, coverage = scene.patch_owner(), scene.patch_coverage()
        for row in range(GRID):
            for column in range(GRID):
                touching, pixels = set(), 0
                for y in range(row * PATCH_PX, (row + 1) * PATCH_PX):
                    for x in range(column * PATCH_PX, (column + 1) * PATCH_PX):
                        for number, item in enumerate(scene.objects):
                            left, top, right, bottom = item.box
                            if left <= x < right and top <= y < bottom:
                                touching.add(number)
                                pixels += 1
                assert len(touching) <= 1
                assert owner[row, column] == (touching.pop() if touching else -1)
                assert coverage[row, column] == pytest.approx(pixels / PATCH_PX**2)


def test_only_owned_patches_show_an_object():
    scene = make_scene("test", 3)
    empty = dataclasses.replace(scene, objects=())
    changed = np.abs(scene.pixels().astype(int) - empty.pixels().astype(int)).sum(-1)
    changed = changed.reshape(GRID, PATCH_PX, GRID, PATCH_PX).max((1, 3))
    assert (changed[scene.patch_owner() < 0] == 0).all()
    for number in range(len(scene.objects)):
        assert changed[scene.patch_owner() == number].max() > 60


def test_patch_labels_leave_grazed_patches_untaught():
    for scene in SCENES[:10]:
        labels, owner = patch_labels(scene), scene.patch_owner().ravel()
        assert (labels["kind"][owner < 0] == labels["kind"].max()).all()
        grazed = (owner >= 0) & (scene.patch_coverage().ravel() < 0.25)
        assert (labels["kind"][grazed] == -100).all()
        assert (labels["centre"] == 1).sum() == len(scene.objects)
        assert ((labels["centre"] == -1) == (owner < 0)).all()


# Questions


def holds(scene, text: str) -> bool:
    """Answer a yes/no question from its words alone."""

    def named(name):
        return [o for o in scene.objects if name in (o.kind, f"{o.colour} {o.kind}", f"{o.colour} object", "object")]

    if m := re.fullmatch(r"Is there a ([\w ]+?) in th(?:e|is) image\?", text):
        return bool(named(m[1]))
    if m := re.fullmatch(r"(?:Is|Are) there exactly (\w+) (\w+) in the image\?", text):
        noun = m[2] if m[1] == "one" else re.sub(r"(?<=ss)es$|s$", "", m[2])
        return len(named(noun)) == ["zero", "one", "two", "three", "four", "five"].index(m[1])
    if m := re.fullmatch(r"Is the number in the image (\d)\?", text):
        return any(o.digit == int(m[1]) for o in scene.objects)
    if m := re.fullmatch(
        r"Is the ([\w ]+?) (to the left of|to the right of|above|below) the ([\w ]+) in the image\?", text
    ):
        (one,), (two,) = named(m[1]), named(m[3])
        dx, dy = one.centre[0] - two.centre[0], one.centre[1] - two.centre[1]
        return {"to the left of": dx < 0, "to the right of": dx > 0, "above": dy < 0, "below": dy > 0}[m[2]]
    if m := re.fullmatch(r"Is the ([\w ]+?) (?:on|at) the (\w+)(?: side)? of the image\?", text):
        (x, y), middle = named(m[1])[0].centre, IMAGE_SIZE_PX / 2
        return {"left": x < middle, "right": x > middle, "top": y < middle, "bottom": y > middle}[m[2]]
    m = re.fullmatch(r"Is the (\w+) (\w+)\?", text)
    (item,) = named(m[1])
    return item.colour == m[2]


@pytest.mark.parametrize("kind", ["pope", "existence", "color", "count", "position", "side", "OCR"])
def test_answers_agree_with_a_reader_of_the_words(kind):
    asked = 0
    for scene in SCENES:
        pair = scene_questions.KINDS_OF_QUESTION[kind](scene, np.random.default_rng(scene.index))
        assert [q.answer for q in pair] in ([], ["Yes", "No"])
        assert all(q.kind == kind and holds(scene, q.text) == (q.answer == "Yes") for q in pair)
        asked += len(pair)
    assert asked >= 40


def test_a_choice_of_places_is_answered_by_the_true_one():
    asked = 0
    for scene in SCENES:
        for question in scene_questions.where(scene, np.random.default_rng(scene.index)):
            name, rest = re.fullmatch(r"Is the ((?:\w+ )?\w+?) ((?:to|on|at|above|below).*)", question.text).groups()
            second = r"(.*? or (?:to the \w+ of|above|below|on the \w+ side|at the \w+))( .*)"
            choice, end = re.fullmatch(second, rest).groups()
            true = [place for place in choice.split(" or ") if holds(scene, f"Is the {name} {place}{end}")]
            assert len(true) == 1
            assert question.answer in true[0]
            asked += 1
    assert asked > 60


def test_pope_negatives_belong_to_their_category():
    for scene in SCENES:
        kinds, colours = {o.kind for o in scene.objects}, {o.colour for o in scene.objects}
        for category in POPE_CATEGORIES:
            phrases = scene_questions.absent_phrases(scene, category)
            assert len(phrases) >= 3
            assert not any(holds(scene, f"Is there a {phrase} in the image?") for phrase in phrases)
        assert all(p.split()[0] in colours or p.split()[1] in kinds for p in phrases)


def test_probe_names_an_object_or_anything_where_there_is_none():
    scene = next(s for s in SCENES if len({o.kind for o in s.objects}) >= 3)
    random = np.random.default_rng(0)
    assert {scene_questions.probe(scene, random)[0].answer for _ in range(60)} == {o.kind for o in scene.objects}
    empty = dataclasses.replace(scene, objects=())
    assert {scene_questions.probe(empty, random)[0].answer for _ in range(200)} == set(KINDS)


def test_blind_answers_do_not_depend_on_the_truth():
    random, answers = np.random.default_rng(0), {}
    for scene in SCENES:
        for question in scene_questions.blind(scene, random, pairs=20):
            if question.kind != "probe":
                answers.setdefault((question.kind, holds(scene, question.text)), []).append(question.answer == "Yes")
    assert not any(answers["pope", True] + answers["existence", True])
    for kind in ("color", "count", "position", "side"):
        assert abs(np.mean(answers[kind, True]) - np.mean(answers[kind, False])) < 0.25
        assert 0.3 < np.mean(answers[kind, True] + answers[kind, False]) < 0.7


def test_examples_ask_only_about_what_they_show(model_and_wording):
    _, wording, processor = model_and_wording
    checked = 0
    for scene in SCENES:
        view = make_view(plain("test", scene.index), 16, wording, np.random.default_rng(scene.index), progress=0.5)
        owner, taught = scene.patch_owner().ravel(), patch_labels(scene)["kind"] >= 0
        kept = view.sources[:, 0]
        assert len(kept) == 16
        shown = set(owner[kept[~view.blanked & taught[kept]]]) - {-1}
        for prompted in view.questions:
            text = processor.decode(prompted.prompt).split(" ASSISTANT:")[0].strip()
            if m := re.match(r"Is there a ([\w ]+?) in the image\?", text):
                seen = any(scene_questions.matches(scene.objects[index], m[1]) for index in shown)
                assert processor.decode(prompted.answer, skip_special_tokens=True).strip() == ("Yes" if seen else "No")
                checked += 1
    assert checked > 60


# Model, tokenizer, packing


def test_words_are_single_tokens_and_other_text_survives(model_and_wording):
    _, wording, processor = model_and_wording
    for word in ("circle", "circles", "red", "Yes", "No", "7", "left", "above", "image"):
        assert len(wording._encode(f" {word}")) == 1
    strange = "Ünïcode 日本, zebra\tand so on"
    assert processor.decode(processor.tokenizer(strange)["input_ids"], skip_special_tokens=True) == strange
    model = model_and_wording[0]
    assert model.get_input_embeddings().weight[0].abs().sum() == 0
    assert processor.tokenizer.pad_token_id != processor.tokenizer.eos_token_id


def test_wording_equals_the_chat_template(model_and_wording):
    _, wording, processor = model_and_wording
    question = scene_questions.Question("pope", "Is there a red circle in the image?", "Yes")
    content = [{"type": "image"}, {"type": "text", "text": question.text + scene_questions.PHRASE_SUFFIX}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]}
    text = processor.apply_chat_template([{"role": "user", "content": content}, answer])
    ids = processor(images=SCENES[0].image(), text=text, return_tensors="pt")["input_ids"][0].tolist()
    prompted = wording(question, scene_questions.PHRASE_SUFFIX)
    image = [processor.tokenizer.convert_tokens_to_ids("<image>")] * GRID**2
    assert ids == wording.prefix + image + prompted.prompt + prompted.answer


def test_preprocessing_equals_the_image_processor(model_and_wording):
    pixels = SCENES[0].pixels()
    expected = model_and_wording[2].image_processor(images=[pixels], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(preprocess(pixels[None]), expected, atol=1e-5, rtol=0)


def test_packed_questions_see_the_image_but_not_each_other(model_and_wording):
    model, wording, _ = model_and_wording
    features = torch.randn(2, 30, model.config.text_config.hidden_size)
    first, other, second = (
        wording(q)
        for q in scene_questions.pope(SCENES[0], np.random.default_rng(1))
        + scene_questions.probe(SCENES[0], np.random.default_rng(1))
    )
    kept = [30, 12]

    def hidden(asked):
        packed = pack(wording.prefix, kept, asked, wording.pad)
        with torch.no_grad():
            states = run_packed(model, packed, features)
        return [states[row][torch.from_numpy(packed.segments[row] == 2)] for row in range(2)]

    with_first = hidden([[first, second], [first, second]])
    with_other = hidden([[other, second], [other, second]])
    for row in range(2):
        torch.testing.assert_close(with_first[row], with_other[row])
        ids = torch.tensor([second.prompt + second.answer])
        embedded = model.get_input_embeddings()
        alone = torch.cat(
            [embedded(torch.tensor([wording.prefix])), features[row : row + 1, : kept[row]], embedded(ids)], 1
        )
        with torch.no_grad():
            expected = model.model.language_model(inputs_embeds=alone).last_hidden_state[0, -ids.shape[1] :]
        torch.testing.assert_close(with_first[row], expected, atol=2e-5, rtol=1e-4)


def test_tokens_are_thinned_by_taste():
    owner = make_scene("test", 3).patch_owner()
    on_object, shares = owner.ravel() >= 0, []
    for seed in range(60):
        kept = choose_tokens(owner, 12, np.random.default_rng(seed), early=False)
        assert kept.shape == (12,)
        assert (np.diff(kept) > 0).all()
        shares.append(on_object[kept].mean())
    assert (min(shares), max(shares)) == (0, 1)
    assert any(0 < share < 0.6 for share in shares)


# Training

TINY = tuple(
    dataclasses.replace(stage, steps=4, batch=2, pool=4, save_every=2, log_every=1, warmup_steps=1)
    for stage in (TOWER, LANGUAGE, BENCHMARKS)
)


@pytest.fixture
def few_evaluation_scenes(monkeypatch):
    from training import language
    from training import train as module

    monkeypatch.setattr(module, "EVALUATION_SCENES", 2)
    monkeypatch.setattr(language, "CHUNK", 4)


def test_training_resumes_to_the_same_weights(tmp_path, few_evaluation_scenes, monkeypatch):
    from safetensors.torch import load_file

    from training import language

    whole = train(tmp_path / "whole", stages=TINY)
    genuine, calls = language.make_view, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return genuine(*args)

    monkeypatch.setattr(language, "make_view", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", stages=TINY)
    assert not (tmp_path / "parts/model.safetensors").exists()
    parts = train(tmp_path / "parts", stages=TINY)
    one, two = load_file(whole / "model.safetensors"), load_file(parts / "model.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    (words,) = (value for name, value in one.items() if name.endswith("embed_tokens.weight"))
    assert words[0].abs().sum() == 0
    assert words[1:].abs().sum(-1).min() > 0


def test_training_lowers_the_loss(tmp_path, few_evaluation_scenes):
    train(tmp_path, stages=[dataclasses.replace(stage, steps=16, save_every=16) for stage in TINY])
    rows = [row for row in read_jsonl(tmp_path / LOG_NAME) if "loss" in row]
    for stage in ("tower", "language", "benchmarks"):
        losses = [row["loss"] for row in rows if row["stage"] == stage]
        assert len(losses) == 16
        assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])


def test_unknown_family_is_refused(tmp_path):
    with pytest.raises(UserError, match="llava"):
        train(tmp_path, family="gpt")
    with pytest.raises(UserError, match="family 'gpt'"):
        lab_checkpoint("gpt")


def test_tower_starts_with_a_sense_of_place():
    torch.manual_seed(0)
    tower = make_tower()
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        attention = tower(preprocess(SCENES[0].pixels()[None]), output_attentions=True).attentions[0][0]
    row, column = 6, 5
    strongest = attention[:, 1 + row * GRID + column, 1:].argmax(-1)
    steps = [(int(at) // GRID - row, int(at) % GRID - column) for at in strongest]
    assert steps == [(0, 1), (0, -1), (1, 0), (-1, 0)]


# Benchmark files


SMALL = {"benchmarks": ("pope", "mme"), "sizes": {"pope": 3, "mme": 2}}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return data.write_data(tmp_path_factory.mktemp("lab"), **SMALL)


@pytest.fixture
def offline(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(tree)
    from datasets import load_dataset

    return lambda *name: load_dataset(*name, token=True, cache_dir=str(tmp_path / "cache"))


def test_pope_tree_matches_schema_and_upstream(offline):
    from lmms_eval.tasks.pope.utils import pope_doc_to_text, pope_doc_to_visual

    rows = offline("lmms-lab-encoder/POPE")["test"]
    assert set(rows.column_names) == {"id", "question_id", "question", "answer", "image_source", "category", "image"}
    assert len(rows) == 3 * 18
    texts = rows.remove_columns("image").to_list()
    for source in {row["image_source"] for row in texts}:
        scene = make_scene("test", int(source.split("_")[1]))
        for category in POPE_CATEGORIES:
            part = [r for r in texts if r["image_source"] == source and r["category"] == category]
            assert [r["answer"] for r in part] == ["yes", "no"] * 3
            assert all(holds(scene, r["question"]) == (r["answer"] == "yes") for r in part)
            assert len({r["question"] for r in part}) == 6
    specific = {"pre_prompt": "", "post_prompt": scene_questions.PHRASE_SUFFIX}
    assert pope_doc_to_text(rows[0], specific) == rows[0]["question"] + scene_questions.PHRASE_SUFFIX
    np.testing.assert_array_equal(np.asarray(pope_doc_to_visual(rows[0])[0]), make_scene("test", 0).pixels())
    full = offline("lmms-lab/POPE", "Full")
    assert {name: len(part) for name, part in full.items()} == dict.fromkeys(POPE_CATEGORIES, 18)


def test_mme_tree_matches_schema_and_upstream(offline):
    from lmms_eval.tasks.mme.utils import mme_aggregate_results, mme_doc_to_text, mme_process_results

    rows = offline("lmms-lab-encoder/MME")["test"]
    assert set(rows.column_names) == {"question_id", "question", "answer", "category", "image"}
    assert len(rows) == 2 * 2 * len(MME_SUBTASKS)
    specific = {"pre_prompt": "", "post_prompt": scene_questions.PHRASE_SUFFIX}
    results = []
    for row in rows:
        text = mme_doc_to_text(row, specific)
        assert text.endswith("?" + scene_questions.PHRASE_SUFFIX)
        assert "yes or no" not in text
        results.append(mme_process_results(row, [row["answer"]])["mme_perception_score"])
    assert mme_aggregate_results(results) == 200 * len(MME_SUBTASKS)


def test_another_tree_is_not_served_from_the_cache(tree, tmp_path, monkeypatch):
    from datasets import load_dataset

    monkeypatch.chdir(tree)
    assert len(load_dataset("lmms-lab/MME", cache_dir=str(tmp_path / "cache"))["test"]) == 4 * len(MME_SUBTASKS)
    data.write_data(tmp_path / "other", benchmarks=("mme",), sizes={"mme": 1})
    monkeypatch.chdir(tmp_path / "other")
    assert len(load_dataset("lmms-lab/MME", cache_dir=str(tmp_path / "cache"))["test"]) == 2 * len(MME_SUBTASKS)


def test_files_are_the_same_each_time_and_bad_names_are_refused(tree, tmp_path):
    again = data.write_data(tmp_path / "again", **SMALL)
    for path in sorted(tree.rglob("*.parquet")):
        assert path.read_bytes() == (again / path.relative_to(tree)).read_bytes()
    for wrong in ({"benchmarks": ("imagenet",)}, {"sizes": {"imagenet": 1}}):
        with pytest.raises(UserError, match="found:   imagenet\nallowed: pope, mme"):
            data.write_data(tmp_path, **wrong)
    with pytest.raises(UserError, match="pope=0"):
        data.write_data(tmp_path, sizes={"pope": 0})
    with pytest.raises(UserError, match="llava_next"):
        data.write_data(tmp_path, family="gpt")


def test_codebook_images_are_scenes_of_their_split(tmp_path):
    from PIL import Image

    paths = data.codebook_images(tmp_path, 3)
    assert [path.name for path in paths] == ["scene-00000.png", "scene-00001.png", "scene-00002.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(paths[2])), make_scene("codebook", 2).pixels())
