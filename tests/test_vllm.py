"""An engine beside the model: what is handed to it and refused; and vLLM itself, where it is installed (.ci/vllm)."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter

import pytest
import tiny
import torch

from rcb_lmms import Question, Session
from rcb_lmms.budget import Budget
from rcb_lmms.engine import engines
from rcb_lmms.engine.generation import generate
from rcb_lmms.engine.options import Generation
from rcb_lmms.errors import UserError
from rcb_lmms.families import load_family
from rcb_lmms.families.packed import Prompt
from rcb_lmms.lab.data import write_data
from rcb_lmms.lab.scene_questions import absent_phrases, pope_question, present_phrases
from rcb_lmms.lab.scenes import make_scene
from rcb_lmms.models.arguments import resolve
from rcb_lmms.pruners import make_pruner
from training.wide import save_wide

FAST = {"max_new_tokens": 4}
KEEP = {"budget": Budget.tokens(5)}


class Handed:
    """Answers with the model itself, and notes what it was handed."""

    window = 5

    def __init__(self, family, fails=lambda prompts: False):
        self.facts = {}
        self.family, self.fails, self.sizes, self.seeds, self.counts = family, fails, [], [], Counter()

    def check(self, generation):
        if generation.beams:
            raise UserError(wanted="beams", found="none", allowed="no beams", next_step="leave them out")

    def generate(self, prompts, generation, seeds):
        self.sizes.append(len(prompts))
        self.seeds += seeds
        if self.fails(prompts):
            raise RuntimeError("no")
        return generate(self.family, prompts, dict(generation.options))

    def close(self):
        pass


def questions(count):
    return [Question(f"{n}?", [tiny.random_image(n % 3)], name=str(n)) for n in range(count)]


@pytest.mark.parametrize("method", ["none", "random"])
def test_an_engine_is_handed_whole_windows_and_its_answers_are_the_questions(family, method):
    pruner = make_pruner(method, **KEEP if method == "random" else {})
    engine = Handed(family)
    session = Session(family, make_pruner("none"), engine=engine, batch_size=2)
    found = session.with_pruner(pruner).answer(questions(12), **FAST)
    assert engine.sizes == [5, 5, 2]
    assert engine.seeds == [question.draw_seed for question in questions(12)]
    assert found == Session(family, pruner).answer(questions(12), **FAST)


def test_what_an_engine_cannot_answer_costs_the_others_nothing(family):
    calm = Session(family, make_pruner("none")).answer(questions(5), **FAST)
    poison = len(family.prompt("3?"))
    engine = Handed(family, fails=lambda prompts: any(len(own) > 60 for own in prompts))
    asked = questions(5)
    asked[3] = Question("3?" * 40, [tiny.random_image(0)])
    found = Session(family, make_pruner("none"), engine=engine).answer(asked, **FAST)
    assert poison < 60
    assert found[3].error == "RuntimeError: no"
    assert found[:3] + found[4:] == calm[:3] + calm[4:]
    with pytest.raises(UserError, match="no beams"):
        Session(family, make_pruner("none"), engine=engine).answer(asked, num_beams=2)


def test_a_model_without_its_decoder_makes_the_same_prompts_and_answers_nothing(checkpoint, family):
    bare = load_family(str(checkpoint), decoder=False)
    assert bare.layers == family.layers
    names = {name for name, _ in bare.model.named_parameters()}
    assert not [name for name in names if ".layers." in name and "vision" not in name]
    assert not [name for name in names if "lm_head" in name]
    for one, other in zip(*(prompts(own, questions(3)) for own in (bare, family)), strict=True):
        assert torch.equal(one.embeds, other.embeds)
    with pytest.raises(UserError, match="without its decoder layers"):
        Session(bare, make_pruner("none"))
    engine = Handed(family)
    assert len(Session(bare, make_pruner("none"), engine=engine).answer(questions(3), **FAST)) == 3


def prompts(family, asked):
    session = Session(family, make_pruner("none"), engine=Handed(family))
    ready, failed = session.prompts.of(range(len(asked)), map(session.prompts.open, asked))
    assert not failed
    return [own.prompt for own in ready]


@pytest.mark.parametrize(
    ("method", "given", "told"),
    [
        ("fastv", {"engine": "vllm"}, "behind decoder layers"),
        ("random", {"engine": "vllm", "positions": "original"}, "numbers the rows of a prompt itself"),
        ("random", {"engine": "vllm", "device_map": "auto"}, "loads the language model itself"),
        ("random", {"engine": "vllm", "data_parallel_size": 2}, "1 process"),
        ("random", {"tensor_parallel_size": 2}, "engine=auto, which has no such argument"),
        ("random", {"engine": "vllm", "gpu_memory_utilization": 1.5}, "gpu_memory_utilization=1.5"),
        ("random", {"engine": "tgi"}, "engine=tgi"),
    ],
)
def test_what_vllm_cannot_do_is_refused_before_a_model_is_loaded(monkeypatch, method, given, told):
    monkeypatch.setattr(engines, "find_spec", lambda name: object())
    with pytest.raises(UserError) as refused:
        resolve("llava", method, {"pretrained": "lab", **given})
    assert told in refused.value.found


def test_vllm_that_is_not_installed_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="no Python package vllm") as refused:
        Session(None, make_pruner("none"), engine="vllm")
    assert refused.value.next_step == "pip install 'rcb_lmms[vllm]'"
    with pytest.raises(UserError, match="no Python package vllm"):
        resolve("llava", "none", {"pretrained": "lab", "engine": "vllm"})


def test_arguments_of_vllm_reach_it_and_its_model_is_loaded_without_decoder(monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda name: object())
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.5, "data_parallel_size": 2}
    settings = resolve("llava", "none", {"pretrained": "lab", "engine": "vllm", **given})
    assert settings.engine_options == {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.5}
    assert settings.loading["decoder"] is False
    assert "decoder" not in resolve("llava", "none", {"pretrained": "lab"}).loading


# vLLM itself


SUFFIX = "\nAnswer the question using a single word or phrase."


@functools.cache
def pope(images=10):
    """Laboratory POPE: questions after what is there and what is not, one image behind the other."""
    asked = []
    for number in range(images):
        scene = make_scene("test", number)
        phrases = [*present_phrases(scene)[:3], *absent_phrases(scene, "adversarial")[:3]]
        image = scene.image()
        asked += [Question(pope_question(scene, phrase).text + SUFFIX, [image], name=phrase) for phrase in phrases]
    return asked


def captions():
    """A sentence about each of three images."""
    caption = "Provide a one-sentence caption for the provided image."
    return [Question(caption, pope()[first].images) for first in (0, 6, 12)]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return save_wide(tmp_path_factory.mktemp("wide") / "llava")


@pytest.fixture(scope="module")
def whole(wide):
    """The same checkpoint with its decoder, for transformers."""
    return load_family(str(wide))


@pytest.fixture(scope="module")
def served(wide):
    """A session on vLLM, which takes half a minute to start."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SERVER.items():
            patch.setenv(name, value)
        session = Session(load_family(str(wide), decoder=False), make_pruner("none"), engine="vllm")
        yield session
        session.engine.close()


SERVER = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
METHODS = {
    "none": {},
    "rcb": {"budget": Budget.tokens(36), "codebook": "lab-llava"},
    "random": {"budget": Budget.tokens(36)},
    "prumerge": {},
}


@pytest.mark.vllm
@pytest.mark.parametrize("method", METHODS)
def test_vllm_answers_as_transformers_and_shares_what_questions_have_in_common(served, whole, method):
    pruner = make_pruner(method, **METHODS[method])
    before = served.engine.counts.copy()
    found = served.with_pruner(pruner).answer(pope(), max_new_tokens=16)
    assert found == Session(whole, pruner, batch_size=16).answer(pope(), max_new_tokens=16)
    new = served.engine.counts - before
    assert new["prompt_tokens"] == sum(answer.row.input_tokens for answer in found)
    # Blocks of 32: five of six questions find what stands before theirs.
    assert new["prompt_tokens_shared"] / new["prompt_tokens"] > (0.6 if method == "none" else 0.25)


@pytest.mark.vllm
def test_answers_that_are_drawn_depend_on_their_question_alone(served):
    asked = [dataclasses.replace(question, name=str(number)) for number, question in enumerate(captions() * 4)]
    drawn = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 16}
    one = served.answer(asked, **drawn)
    assert served.answer(asked[::-1], **drawn)[::-1] == one
    assert len({answer.text for answer in one}) > 4
    assert served.answer(asked, **drawn, top_k=1) == served.answer(asked, max_new_tokens=16)


@pytest.mark.vllm
def test_an_answer_ends_at_a_stop_and_fails_beyond_the_context(served, monkeypatch):
    question = captions()[1:2]
    (full,) = served.answer(question, max_new_tokens=16)
    word = full.text.split()[2]
    (cut,) = served.answer(question, max_new_tokens=16, until=[word])
    assert cut.text == full.text.split(word)[0].strip()
    assert cut.row.output_tokens < full.row.output_tokens
    monkeypatch.setattr(served.prompts, "context", full.row.input_tokens + full.row.output_tokens - 1)
    (long,) = served.answer(question, max_new_tokens=16)
    assert "the model's context" in long.error
    for refused in ({"num_beams": 2}, {"repetition_penalty": 1.2}, {"do_sample": True, "temperature": 2.5}):
        with pytest.raises(UserError, match="with engine=vllm"):
            served.answer(question, **refused)


@pytest.mark.vllm
def test_the_context_ends_an_answer_in_vllm_too_and_makes_it_fail(served):
    """Of two tokens that fit, neither of which ends the answer, a third is said to be wanted."""
    generation, context = Generation.parse("answer", {"max_new_tokens": 8}), served.prompts.context
    noise = torch.randn(context - 2, served.family.width, generator=torch.Generator().manual_seed(0))
    assert served.engine.generate([Prompt(noise)], generation, [0]).output_tokens == [3]


@pytest.mark.vllm
def test_a_prompt_that_vllm_would_not_survive_is_refused(served):
    generation, width = Generation.parse("answer", FAST), served.family.width
    wrong = [torch.zeros(9, width - 1), torch.zeros(0, width), torch.zeros(9, width, dtype=torch.float16)]
    for embeds in (*wrong, torch.full((9, width), math.nan)):
        with pytest.raises(UserError, match="a prompt in embedding space"):
            served.engine.generate([Prompt(embeds)], generation, [0])


@pytest.mark.vllm
def test_logits_that_are_no_numbers_fail_and_vllm_that_dies_is_started_again(served, monkeypatch):
    generation, width = Generation.parse("answer", FAST), served.family.width
    calm = served.answer(pope()[:6], **FAST)
    with monkeypatch.context() as patch:
        patch.setattr(served.engine, "_check", lambda prompt: None)
        bad = torch.full((9, width), math.nan)
        assert served.engine.generate([Prompt(bad)], generation, [0]).finite == [False]
    (process,) = served.engine._llm.llm_engine.engine_core.resources.engine_manager.processes
    os.kill(process.pid, signal.SIGKILL)
    assert served.answer(pope()[:6], **FAST) == calm


@pytest.mark.vllm
def test_the_command_gives_the_same_results_with_either_engine(tmp_path):
    checkpoint = save_wide(tmp_path / "next", "llava_next")
    write_data(tmp_path, family="llava_next", benchmarks=["pope"], sizes={"pope": 4})
    outcomes = []
    for engine in ("transformers", "vllm"):
        arguments = ["--model", "llava_next_random", "--model_args", f"pretrained={checkpoint},engine={engine},keep=36"]
        arguments += ["--tasks", "pope", "--limit", "24", "--output_path", str(tmp_path / engine), "--log_samples"]
        subprocess.run(
            [sys.executable, "-c", "from rcb_lmms.runs.host import main; main()", *arguments],
            cwd=tmp_path,
            env={**os.environ, **SERVER},
            check=True,
        )
        (results,) = (tmp_path / engine).rglob("*_results.json")
        (samples,) = (tmp_path / engine).rglob("*_samples_pope.jsonl")
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        outcomes.append((json.loads(results.read_text()), {row["doc_id"]: row["filtered_resps"] for row in rows}))
    (one, texts), (other, same) = outcomes
    assert texts == same
    assert len(texts) == 24
    assert one["results"]["pope"] == other["results"]["pope"]
    record = other["rcb"]
    assert record["resolved"]["engine"]["version"].startswith("0.32")
    assert record["resolved"]["engine"]["language_model_only"] is True
    assert record["totals"]["prompt_tokens_shared"] > 0
    assert one["rcb"]["resolved"]["engine"] == "transformers"
