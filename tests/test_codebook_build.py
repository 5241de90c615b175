"""Making a codebook: against a slow, literal version of the experiments, through a kill, and without the model."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from slow import slow_dpc, softmax

from rcb_lmms.codebook import Codebook
from rcb_lmms.codebook.build import build, threshold
from rcb_lmms.codebook.dpc import tie_noise
from rcb_lmms.codebook.listing import images_of
from rcb_lmms.codebook.probe import ImageStatistics, measure
from rcb_lmms.codebook.select import patch_scores
from rcb_lmms.codebook.settings import BuildSettings
from rcb_lmms.errors import UserError
from rcb_lmms.families.base import Family
from rcb_lmms.families.llava import Llava
from rcb_lmms.families.packed import Rows
from rcb_lmms.pruners.base import VisualTokens

PROMPT = "w4 w5 w6 w7"
PATCHES = 16


def tiny_tokenizer(article: int):
    """96 words, of which `article` is the word "A" and 95 the image placeholder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{n}": n for n in range(3, 95) if n != article} | {"\u2581A": article, "<image>": 95}
    words |= {"<pad>": 0, "<s>": 1, "</s>": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Replace("\u2581", " ")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def tiny_family(model, article: int = 94) -> Llava:
    from transformers import CLIPImageProcessorPil

    processor = SimpleNamespace(
        tokenizer=tiny_tokenizer(article),
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        apply_chat_template=lambda messages, **_: f"<s> w3 <image> {messages[0]['content'][-1]['text']} w8",
    )
    return Llava(model, processor, pretrained="tiny")


def write_images(folder: Path, count: int) -> list[Path]:
    rng = np.random.default_rng(5)
    paths = [folder / f"{number:03d}.png" for number in range(count)]
    for path in paths:
        # Flat quarters with a little noise: some patches of different images resemble each other.
        quarters = rng.integers(0, 2, (2, 2, 3)) * 200 + rng.integers(0, 20, (2, 2, 3))
        pixels = np.kron(quarters, np.ones((14, 14, 1))) + rng.integers(0, 30, (28, 28, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return paths


# The literal version: one prompt at a time through `generate`, Python loops for everything behind it


def literal_tokens(model, family, path):
    """Projector outputs `(16, d)` and the patches in the order of their similarity to CLS."""
    pixels = family.processor.image_processor(Image.open(path), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][0]
        tokens = model.model.multi_modal_projector(hidden[1:])
    cosine = [torch.dot(h, hidden[0]) / h.norm() / hidden[0].norm() for h in hidden[1:]]
    return tokens, sorted(range(PATCHES), key=lambda patch: -cosine[patch])


def literal_answer(model, family, visual):
    """Greedy first token, and the logits of the first two steps, with `visual (k, d)` in the image's place."""
    table = model.get_input_embeddings().weight
    rows = []
    for word in f"<s> w3 <image> {PROMPT} w8".split():
        rows.append(visual if word == "<image>" else table[[family.tokenizer.vocab[word]]])
    output = model.generate(
        inputs_embeds=torch.cat(rows)[None],
        max_new_tokens=2,
        min_new_tokens=2,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    return int(output.logits[0][0].argmax()), [step[0].double() for step in output.logits]


def literal_experiments(model, family, paths):
    """Answers of every experiment on every image: `{"whole": a, patch: {"single": a, ...}}` per image."""
    found = []
    pad = model.get_input_embeddings().weight[0]
    with torch.no_grad():
        for path in paths:
            tokens, order = literal_tokens(model, family, path)
            answers = {"tokens": tokens, "order": order, "whole": literal_answer(model, family, tokens)}
            for patch in order:
                row, column = divmod(patch, 4)
                rows = {0: (0, 1, 2), 3: (1, 2, 3)}.get(row, (row - 1, row, row + 1))
                columns = {0: (0, 1, 2), 3: (1, 2, 3)}.get(column, (column - 1, column, column + 1))
                around = [4 * r + c for r in rows for c in columns]
                inputs = {
                    "single": tokens[[patch]],
                    "region": tokens[around],
                    "region_ablated": torch.stack([pad if slot == patch else tokens[slot] for slot in around]),
                    "whole_ablated": torch.stack([pad if n in around else tokens[n] for n in range(PATCHES)]),
                }
                answers[patch] = {name: literal_answer(model, family, visual) for name, visual in inputs.items()}
            found.append(answers)
    return found


def literal_divergence(full, ablated, top_k, paper):
    ids = sorted(range(len(full)), key=lambda i: -full[i])[:top_k]
    m, n = softmax([float(full[i]) for i in ids]), softmax([float(ablated[i]) for i in ids])
    total = 0.0
    for a, b in zip(m, n, strict=True):
        q = (a + b) / 2
        total += (a * math.log(a / q) + b * math.log(b / q)) if paper else (q * math.log(q / a) + q * math.log(q / b))
    return total / 2 if paper else total / 2 / top_k


def literal_scores(answers, article, top_k, paper):
    def content(answer):
        first, steps = answer
        return steps[1] if first == article else steps[0]

    scores = {}
    for patch in answers["order"]:
        run = {name: content(answer) for name, answer in answers[patch].items()}
        p1 = max(softmax(sorted(run["single"].tolist(), reverse=True)[:50]))
        region = literal_divergence(run["region"], run["region_ablated"], top_k, paper)
        whole = literal_divergence(content(answers["whole"]), run["whole_ablated"], top_k, paper)
        scores[patch] = (p1, region + 16 * whole)
    return scores


def labels_of(tokens, clusters, k, include_self):
    noise = tie_noise(len(tokens)).tolist()
    return slow_dpc(tokens.double().tolist(), clusters, k, noise, include_self)[-1]


def literal_prototypes(experiments, settings, article):
    """Rows as (image number, patch), in the codebook's order; also the number of candidates."""
    paper, chosen = settings.by_paper, []
    for number, answers in enumerate(experiments):
        scores = literal_scores(answers, article, settings.top_k, paper)
        clustered = list(range(PATCHES)) if paper else answers["order"]
        labels = labels_of(answers["tokens"][clustered], settings.clusters_per_image, settings.k_image, not paper)
        sizes = Counter(labels)
        for patch in answers["order"]:
            p1, jsd = scores[patch]
            size = sizes[labels[clustered.index(patch)]]
            outlier = size < settings.tau_out if paper else size <= settings.tau_out
            if p1 < settings.tau_prob and jsd < settings.tau_jsd and outlier:
                chosen.append((number, patch))
    tokens = torch.stack([experiments[number]["tokens"][patch] for number, patch in chosen])
    labels = labels_of(tokens, settings.clusters_across, settings.k_across, not paper)
    rows = []
    for label in dict.fromkeys(labels):
        members = [row for row, own in zip(chosen, labels, strict=True) if own == label]
        if (len(members) if paper else len({number for number, _ in members})) > settings.tau_in:
            rows += members
    return rows, len(chosen)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    return write_images(tmp_path_factory.mktemp("images"), 4)


@pytest.fixture(scope="module")
def experiments(tiny_llava, images):
    return literal_experiments(tiny_llava, tiny_family(tiny_llava), images)


@pytest.fixture(scope="module")
def article(experiments) -> int:
    """The most frequent first token of single-token runs, which the tests declare to be "A"."""
    firsts = Counter(answers[patch]["single"][0] for answers in experiments for patch in answers["order"])
    return firsts.most_common(1)[0][0]


def settings_that_bite(preset: str, experiments, article) -> BuildSettings:
    """Thresholds at quantiles of the literal scores, so that each of them lets some through and not others."""
    top_k = 20 if preset == "paper" else 10
    scores = [s for a in experiments for s in literal_scores(a, article, top_k, preset == "paper").values()]
    return BuildSettings(
        preset,
        tau_prob=float(np.quantile([p for p, _ in scores], 0.8)),
        tau_jsd=float(np.quantile([j for _, j in scores], 0.75)),
        tau_out=4,
        tau_in=2,
        top_k=top_k,
        clusters_per_image=5,
        clusters_across=5,
        prompt=PROMPT,
        article=preset,
        probes=PATCHES,
        cluster_input="all" if preset == "paper" else "probed",
    )


@pytest.mark.parametrize("preset", ["official", "paper"])
@pytest.mark.parametrize("batch_size", [5, 64])
def test_the_builder_equals_the_literal_version(tmp_path, tiny_llava, images, experiments, article, preset, batch_size):
    settings = settings_that_bite(preset, experiments, article)
    out = tmp_path / "made.safetensors"
    made = build(tiny_family(tiny_llava, article), images, out, settings, batch_size=batch_size, progress=False)
    skipped = 0
    for number, answers in enumerate(experiments):
        statistics = ImageStatistics.read(tmp_path / "made.safetensors.stats" / f"{number:06d}.safetensors")
        assert statistics.index.tolist() == answers["order"]
        p1, jsd = patch_scores(statistics, settings)
        expected = literal_scores(answers, article, settings.top_k, preset == "paper")
        np.testing.assert_allclose(p1, [expected[patch][0] for patch in answers["order"]], rtol=1e-4)
        np.testing.assert_allclose(jsd, [expected[patch][1] for patch in answers["order"]], rtol=2e-3, atol=1e-8)
        skipped += sum(answers[patch]["single"][0] == article for patch in answers["order"])
    assert skipped > PATCHES

    rows, candidates = literal_prototypes(experiments, settings, article)
    assert 0 < len(rows) < candidates < 4 * PATCHES
    assert list(zip(made.meta["rows"]["image"], made.meta["rows"]["patch"], strict=True)) == [
        (images[number].stem, patch) for number, patch in rows
    ]
    tokens = torch.stack([experiments[number]["tokens"][patch] for number, patch in rows])
    torch.testing.assert_close(made.prototypes, tokens, atol=1e-5, rtol=1e-5)
    assert made.meta["counts"]["candidates"] == candidates
    assert made.meta["counts"]["prototypes"] == len(rows)
    assert made.meta["counts"]["images with prototypes"] == len({number for number, _ in rows})
    assert Codebook.load(out).sha256 == made.sha256


def test_the_article_rule_changes_what_is_read(tmp_path, tiny_llava, images, article):
    family = tiny_family(tiny_llava, article)
    view = family.encode([family.open(images[0])], {"cls_similarity"})[0][0]
    kept, skipped = (
        measure(family, view, BuildSettings(prompt=PROMPT, article=rule, probes=PATCHES), 8)
        for rule in ("keep", "official")
    )
    firsts = kept.single_ids[:, 0] == article
    assert 0 < firsts.sum() < PATCHES
    assert torch.equal(skipped.single[~firsts], kept.single[~firsts])
    assert not torch.isclose(skipped.single[firsts], kept.single[firsts]).all(-1).any()


def test_strict_compares_at_the_step_of_the_intact_run(tiny_llava, images, experiments):
    """Independently, an intact run that begins with an article is read one step later than its ablated one."""
    image, answers, article = next(
        (image, answers, answers[patch]["region"][0])
        for image, answers in zip(images, experiments, strict=True)
        for patch in answers["order"]
        if answers[patch]["region"][0] != answers[patch]["region_ablated"][0]
    )
    family = tiny_family(tiny_llava, article)
    view = family.encode([family.open(image)], {"cls_similarity"})[0][0]
    loose, strict = (
        measure(family, view, BuildSettings(prompt=PROMPT, probes=PATCHES, strict=own), 8) for own in (False, True)
    )
    differing = 0
    for row, patch in enumerate(answers["order"]):
        (full, steps), (ablated, other) = answers[patch]["region"], answers[patch]["region_ablated"]
        ids = steps[full == article].topk(50).indices
        torch.testing.assert_close(strict.region_ablated[row].double(), other[full == article][ids], rtol=0, atol=1e-3)
        torch.testing.assert_close(
            loose.region_ablated[row].double(), other[ablated == article][ids], rtol=0, atol=1e-3
        )
        differing += (full == article) != (ablated == article)
        whole = answers[patch]["whole_ablated"][1][answers["whole"][0] == article]
        torch.testing.assert_close(strict.whole_ablated[row].double(), whole[strict.whole_ids[0]], rtol=0, atol=1e-3)
    assert differing
    assert torch.equal(loose.single, strict.single)


# A family without a real model, for what is about files


class FakeFamily(Family):
    """4 x 4 patches read off the pixels; the answer depends on all embeddings. Newline after every image."""

    name, model_type, single_repeats, provides = "fake", "fake", 3, frozenset({"cls_similarity"})

    def __init__(self, calls_to_live: int = -1):
        generator = torch.Generator().manual_seed(0)
        self.model = torch.nn.Module()
        self.model.table = torch.nn.Parameter(torch.randn(60, 6, generator=generator))
        self.model.mix = torch.nn.Parameter(torch.randn(6, 60, generator=generator))
        self.model.config = SimpleNamespace(image_token_id=59)
        self.model.get_input_embeddings = lambda: torch.nn.Embedding.from_pretrained(self.model.table)
        self.model.forward, self.model.layers = self.forward, torch.nn.ModuleList()
        self.pretrained, self.revision, self.preprocess, self.template = "fake", "r1", "rcb", "checkpoint"
        self.tokenizer = SimpleNamespace(convert_ids_to_tokens="w{}".format)
        self.calls, self.calls_to_live, self.rows_seen, self.rows_computed = 0, calls_to_live, [], 0

    device, dtype, width = torch.device("cpu"), torch.float32, 6

    @property
    def pad_embedding(self):
        return self.model.table[0].detach()

    def encode(self, visuals, needs=(), size=None):
        assert size is None
        assert needs == {"cls_similarity"}
        assert {visual.role for visual in visuals} == {"base"}
        images = [visual.image.resize((4, 4)) for visual in visuals]
        pixels = [torch.from_numpy(np.array(image, dtype=np.float32)).reshape(16, 3) for image in images]
        views = [torch.cat([rows / 100, (rows / 50).sin()], dim=-1) for rows in pixels]
        return [[VisualTokens(rows, (4, 4), cls_similarity=rows[:, 3]), None] for rows in views]

    def pixels(self, visual):
        raise NotImplementedError

    def pack(self, views, visual=None, *, whole=False):
        rows = torch.cat([*views, self.model.table[58:59]])
        return Rows(rows, (len(rows) - 1,))

    def prompt(self, text, images=1):
        return [1, 59, *(2 + ord(letter) % 50 for letter in text[:4])]

    def forward(self, inputs_embeds, past_key_values, **_):
        self.calls += 1
        if self.calls == self.calls_to_live:
            os.kill(os.getpid(), signal.SIGKILL)
        seen, _ = past_key_values.update(inputs_embeds[:, None], inputs_embeds[:, None], 0)
        self.rows_seen += [seen.shape[2]] * len(seen)
        self.rows_computed += inputs_embeds.shape[0] * inputs_embeds.shape[1]
        return SimpleNamespace(logits=(seen[:, 0].mean(1).tanh() @ self.model.mix)[:, None])


SETTINGS = BuildSettings(
    tau_prob=0.1, tau_jsd=0.1, tau_out=9, tau_in=1, clusters_per_image=3, clusters_across=4, prompt="what", probes=12
)


@pytest.fixture
def finished(tmp_path, images) -> Path:
    build(FakeFamily(), images, tmp_path / "whole.safetensors", SETTINGS, batch_size=4, progress=False)
    return tmp_path / "whole.safetensors"


def test_every_experiment_has_its_length(tmp_path, images):
    """Four windows, those of patches 5, 6, 9 and 10, are all that a grid of four by four has."""
    family = FakeFamily()
    build(family, images[:2], tmp_path / "a.safetensors", replace(SETTINGS, tau_in=0), batch_size=1, progress=False)
    newline, text = 1, 5
    assert Counter(family.rows_seen) == {
        3 + newline + text: 2 * 12,
        9 + newline + text: 2 * (4 + 12),
        16 + newline + text: 2 * (4 + 1),
    }
    # The token before the image is computed once, and so is what stands before a window's first token.
    known = 2 * (12 + 4 + 12 + 4 + sum((0, 1, 4, 5)))
    assert family.rows_computed == sum(family.rows_seen) - known


def test_a_killed_build_resumes_to_the_same_bytes(tmp_path, images, finished):
    out = tmp_path / "killed" / finished.name
    # 9 calls per image: the kill falls into the third one.
    code = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent)]!r}
from test_codebook_build import FakeFamily, SETTINGS, build
build(FakeFamily(calls_to_live=23), {list(map(str, images))!r}, {str(out)!r}, SETTINGS, batch_size=4, progress=False)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    stats = Path(f"{out}.stats")
    assert sorted(path.name for path in stats.iterdir()) == [
        "000000.safetensors",
        "000001.safetensors",
        "manifest.json",
    ]
    family = FakeFamily()
    build(family, images, out, SETTINGS, batch_size=4, progress=False)
    assert family.calls == 18
    assert out.read_bytes() == finished.read_bytes()


def test_two_processes_build_the_bytes_of_one(tmp_path, images, finished):
    """As on machines that share no disk: the first one saves the codebook, both have all statistics."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": tiny.free_port(), "OMP_NUM_THREADS": "1"}
    outs = [tmp_path / str(rank) / finished.name for rank in (0, 1)]
    code = """
import sys
from test_codebook_build import FakeFamily, SETTINGS, build
made = build(family := FakeFamily(), sys.argv[2:], sys.argv[1], SETTINGS, batch_size=4, progress=False)
print(family.calls, made.sha256)
"""
    running = []
    for rank, out in enumerate(outs):
        own = {**os.environ, **shared, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
        command = [sys.executable, "-c", code, str(out), *map(str, images)]
        running.append(subprocess.Popen(command, env=own | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=300)[0].split() for process in running]
    assert said == [["18", Codebook.load(finished).sha256]] * 2  # nine calls for each of two images
    assert outs[0].read_bytes() == finished.read_bytes()
    assert not outs[1].exists()
    for out in outs:
        for number in range(4):
            name = f"{number:06d}.safetensors"
            mine, one = (Path(f"{own}.stats") / name for own in (out, finished))
            assert mine.read_bytes() == one.read_bytes()


def test_thresholds_change_without_the_model(tmp_path, finished):
    stats = Path(f"{finished}.stats")
    whole = Codebook.load(finished)
    assert threshold(stats, SETTINGS, name="whole").meta == whole.meta
    stricter = threshold(stats, replace(SETTINGS, tau_jsd=0.08))
    assert 0 < stricter.meta["counts"]["candidates"] < whole.meta["counts"]["candidates"]
    assert stricter.meta["counts"]["probed"] == whole.meta["counts"]["probed"] == 48
    assert stricter.meta["thresholds"]["tau_jsd"] == 0.08
    by_paper = threshold(stats, replace(SETTINGS, preset="paper", top_k=20, tau_jsd=1.0))
    assert by_paper.meta["preset"] == "paper"
    assert by_paper.meta["counts"]["JSD < tau_jsd"] != stricter.meta["counts"]["JSD < tau_jsd"]


def test_other_experiments_are_no_matter_of_thresholds(finished):
    for change in ({"prompt": "why"}, {"article": "keep"}, {"probes": 16}, {"cluster_input": "all"}):
        with pytest.raises(UserError, match=next(iter(change))):
            threshold(f"{finished}.stats", replace(SETTINGS, **change))
    assert len(threshold(f"{finished}.stats", replace(SETTINGS, single_repeats=3)))


def test_no_prototypes_prints_the_funnel(finished):
    with pytest.raises(UserError) as error:
        threshold(f"{finished}.stats", replace(SETTINGS, tau_prob=0.0))
    assert error.value.found.startswith("4 images, 48 probed patches: 0 with p1 < 0, ")
    assert "0 candidates from 0 images, 0 in clusters over 1" in error.value.found
    with pytest.raises(UserError, match="0 in clusters over 4"):
        threshold(f"{finished}.stats", replace(SETTINGS, tau_in=4))


def test_statistics_of_another_build_are_refused(tmp_path, images, finished):
    def again(family=None, listed=images, settings=SETTINGS):
        build(family or FakeFamily(), listed, finished, settings, progress=False)

    retrained, revised = FakeFamily(), FakeFamily()
    with torch.no_grad():
        retrained.model.mix += 1
    revised.revision = "r2"
    for arguments, named in [
        ({"family": retrained}, "weights"),
        ({"family": revised}, "revision r1"),
        ({"listed": images[::-1]}, "images"),
        ({"listed": images[:3]}, "4 images"),
        ({"settings": replace(SETTINGS, prompt="why")}, "prompt what (now why)"),
    ]:
        with pytest.raises(UserError, match="another build") as error:
            again(**arguments)
        assert named in error.value.found
    again(settings=replace(SETTINGS, tau_jsd=0.09))
    assert Codebook.load(finished).meta["thresholds"]["tau_jsd"] == 0.09


def test_a_corrupt_image_is_named_and_nothing_is_lost(tmp_path, images):
    listed = [tmp_path / path.name for path in images]
    for source, target in zip(images, listed, strict=True):
        target.write_bytes(source.read_bytes())
    listed[2].write_bytes(listed[2].read_bytes()[:200])
    out = tmp_path / "a.safetensors"
    with pytest.raises(UserError, match=listed[2].name):
        build(FakeFamily(), listed, out, SETTINGS, progress=False)
    assert len(list(Path(f"{out}.stats").glob("*.safetensors"))) == 2
    with pytest.raises(UserError, match="none yet of 2, the first of them 002"):
        threshold(f"{out}.stats", SETTINGS)
    with pytest.raises(UserError, match="nowhere"):
        build(FakeFamily(), [tmp_path / "nowhere.png"], out, SETTINGS, progress=False)
    with pytest.raises(UserError, match="empty list"):
        build(FakeFamily(), [], out, SETTINGS, progress=False)
    with pytest.raises(UserError, match="manifest"):
        threshold(tmp_path, SETTINGS)


def test_what_a_codebook_says_of_its_making(finished, images):
    meta = Codebook.load(finished).meta
    assert {key: meta[key] for key in ("id", "model", "revision", "family", "images", "preset")} == {
        "id": "whole",
        "model": "fake",
        "revision": "r1",
        "family": "fake",
        "images": 4,
        "preset": "official",
    }
    assert meta["experiment"] == {
        "prompt": "what",
        "article": "official",
        "probes": 12,
        "single_repeats": 3,
        "cluster_input": "probed",
    }
    manifest = json.loads((Path(f"{finished}.stats") / "manifest.json").read_text())
    assert [entry["name"] for entry in manifest["images"]] == [path.stem for path in images]
    rows = meta["rows"]
    assert len(rows["image"]) == len(rows["patch"]) == len(rows["cluster"]) == meta["counts"]["prototypes"]
    assert rows["cluster"] == sorted(rows["cluster"])


def test_the_order_is_that_of_the_list(tmp_path, images):
    folder = images[0].parent
    entries = [(3, "train"), (0, "restval"), (1, "train"), (2, "val"), (0, "train")]
    karpathy = [{"filename": images[n].name, "filepath": "train2014", "split": split} for n, split in entries]
    (tmp_path / "coco.json").write_text(json.dumps({"images": karpathy}))
    (tmp_path / "names.txt").write_text(f"{images[2].name}\n\n  {images[0].name}\n")
    (tmp_path / "names.json").write_text(json.dumps([images[1].name, images[0].name]))
    (folder / "names.txt").write_text(images[3].name)
    assert images_of(folder, tmp_path / "coco.json") == [images[3], images[1], images[0]]
    assert images_of(folder, tmp_path / "coco.json", 2) == [images[3], images[1]]
    assert images_of(folder, tmp_path / "names.txt") == [images[2], images[0]]
    assert images_of(folder, tmp_path / "names.json") == [images[1], images[0]]
    assert images_of(None, folder / "names.txt") == [images[3]]
    (folder / "names.txt").unlink()
    assert images_of(folder, None) == sorted(images)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("absent.png", "absent.png"),
        ("", "no names"),
        ('{"images": [{"filename": "a"}]}', "KeyError"),
        ('{"images": 3}', "TypeError"),
        ("[" * 10**5, "RecursionError"),
        ("[1, 2]", "no names"),
        ("a\0.png", "not there"),
    ],
)
def test_lists_that_name_nothing_are_refused(tmp_path, images, content, found):
    (tmp_path / "list").write_text(content)
    with pytest.raises(UserError, match=found):
        images_of(images[0].parent, tmp_path / "list")
    with pytest.raises(UserError, match="neither a folder nor a list"):
        images_of(None, None)


def test_a_build_extends_a_codebook(tmp_path, images, finished):
    base = Codebook.load(finished)
    more = build(FakeFamily(), images[:2], tmp_path / "more.safetensors", replace(SETTINGS, tau_in=0), progress=False)
    out = tmp_path / "more.safetensors"
    extended = build(FakeFamily(), images[:2], out, replace(SETTINGS, tau_in=0), progress=False, extend=base)
    assert extended.sha256 == Codebook.load(out).sha256 == base.merge([more]).sha256
    assert len(base) <= len(extended) <= len(base) + len(more)
    assert torch.equal(extended.prototypes[: len(base)], base.prototypes)


def test_the_command_builds_under_a_template_in_the_order_of_a_list(tmp_path, checkpoint, images):
    from typer.testing import CliRunner

    from rcb_lmms.cli import app

    (tmp_path / "list.txt").write_text(f"{images[1].name}\n{images[0].name}\n")
    loose = [f"--setting={change}" for change in ("tau_prob=2", "tau_jsd=99", "tau_out=99", "tau_in=0", "probes=12")]
    made = {}
    for template in ("vicuna", "checkpoint"):
        out = tmp_path / f"{template}.safetensors"
        listed = ["--images", str(images[0].parent), "--list", str(tmp_path / "list.txt"), "--template", template]
        arguments = ["codebook", "build", "--model", str(checkpoint), "--out", str(out), *listed, *loose]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        made[template] = Codebook.load(out)
        assert made[template].meta["template"] == template
        assert sorted(set(made[template].meta["rows"]["image"])) == ["000", "001"]
        manifest = json.loads((Path(f"{out}.stats") / "manifest.json").read_text())
        assert [entry["name"] for entry in manifest["images"]] == ["001", "000"]
    # Everything passes, so the rows are the same; the answers behind them are not.
    stats = [ImageStatistics.read(tmp_path / f"{name}.safetensors.stats" / "000000.safetensors") for name in made]
    assert torch.equal(stats[0].index, stats[1].index)
    assert not torch.equal(stats[0].single, stats[1].single)


def test_half_precision_tokens_stay_half_precision(tmp_path, images):
    class Half(FakeFamily):
        dtype = torch.float16

        def encode(self, visuals, needs=(), size=None):
            views = super().encode(visuals, needs, size)
            return [[replace(view, features=view.features.to(self.dtype))] for view, _ in views]

        def pack_base(self, tokens):
            return super().pack_base(tokens.float())

    class Brain(Half):
        dtype = torch.bfloat16

    for family, expected in ((Half(), torch.float16), (Brain(), torch.float32)):
        settings = replace(SETTINGS, tau_in=0)
        out = tmp_path / f"{expected}.safetensors"
        assert build(family, images, out, settings, progress=False).prototypes.dtype == expected
