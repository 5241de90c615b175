"""What only a GPU can show: half precision, shared batches and prefixes, kernels and memory.

Bodies that mean something on a CPU run there too; those marked `gpu` are deselected where there is none.
"""

from __future__ import annotations

import functools

import pytest
import torch

from rcb_lmms import Budget, Question, Session
from rcb_lmms.analysis.memory import peak_bytes
from rcb_lmms.engine.engines import start_engine
from rcb_lmms.engine.generation import layer_steps, left_pad, positions_of, prune_prompts
from rcb_lmms.engine.prefix import PrefixCache
from rcb_lmms.families import load_family
from rcb_lmms.families.shapes import random_family
from rcb_lmms.lab.scene_questions import absent_phrases, pope_question, present_phrases
from rcb_lmms.lab.scenes import make_scene
from rcb_lmms.pruners import PRUNERS, make_pruner

SUFFIX = "\nAnswer the question using a single word or phrase."
HALF = ["bfloat16", "float16"]
KEEP = 36
# Methods without a model of their own beside ours, before and inside the decoder.
METHODS = ["none", "rcb", "random", "visionzip", "fastv", "sparsevlm"]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@functools.cache
def lab(device: str, dtype: str = "float32", attention: str = "sdpa"):
    return load_family("lab", device=device, dtype=dtype, attn_implementation=attention)


def method(name: str, keep: int = KEEP):
    own = {"codebook": "lab-llava"} if name == "rcb" else {}
    return make_pruner(name, budget=Budget.tokens(keep) if PRUNERS[name].budgets else None, **own)


@functools.cache
def asked(images: int = 2) -> list[Question]:
    """Six questions about each of some scenes, with names that say nothing about their answers."""
    questions = []
    for number in range(images):
        scene = make_scene("test", number)
        phrases = [*present_phrases(scene)[:3], *absent_phrases(scene, "random")[:3]]
        questions += [Question(pope_question(scene, own).text + SUFFIX, [scene.image()]) for own in phrases]
    return questions


def answers(family, name: str, questions=None, **options) -> list[str]:
    found = Session(family, method(name), **options).answer(questions or asked(), max_new_tokens=4)
    assert [own.error for own in found] == [None] * len(found)
    return [own.text for own in found]


def prompts(family, questions, keep: int = KEEP):
    """Prompts of questions about single images, of which the same tokens stay in every type and on every device."""
    made = []
    for question in questions:
        ((view,),) = family.encode([family.open(question.images[0])])
        packed = family.pack_base(view.features[:: len(view) // keep][:keep])
        made.append(family.embed(family.prompt(question.text), [packed]))
    return made


def logits(family, chosen) -> torch.Tensor:
    """`(b, vocabulary)` logits of first tokens, float32 on the CPU."""
    embeds, mask, starts = left_pad(chosen)
    with torch.inference_mode():
        made = family.model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions_of(chosen, starts, mask),
                            logits_to_keep=1)  # fmt: skip
    return made.logits[:, -1].float().cpu()


def drift(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference of two models' logits, in standard deviations of a prompt's logits."""
    return float(((one - other).abs() / other.std(-1, keepdim=True)).max())


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_finite_and_near_float32(device, dtype, record_property):
    half, whole = lab(device, dtype), lab("cpu")
    found, expected = (logits(family, prompts(family, asked(1))) for family in (half, whole))
    assert found.isfinite().all()
    record_property("drift", off := drift(found, expected))
    assert off < {"bfloat16": 0.2, "float16": 0.02}[dtype]
    for name in METHODS if device == "cuda" else ("rcb", "fastv"):
        equal = [a == b for a, b in zip(answers(half, name), answers(whole, name), strict=True)]
        assert sum(equal) >= len(equal) - 1, name


@pytest.mark.gpu
def test_float32_on_the_gpu_gives_the_answers_of_the_cpu():
    for name in METHODS:
        assert answers(lab("cuda"), name) == answers(lab("cpu"), name), name


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_equals_a_loop(device, name):
    family = lab(device)
    assert answers(family, name, batch_size=8) == answers(family, name, batch_size=1)


@pytest.mark.parametrize("dtype", ["float32", *HALF])
def test_prefixes_shared_or_not_give_the_same_answers_and_almost_the_same_logits(device, dtype, record_property):
    family = lab(device, dtype)
    equal = [a == b for a, b in zip(*(answers(family, "rcb", prefix_cache=own) for own in ("on", "off")), strict=True)]
    assert sum(equal) >= len(equal) - (dtype != "float32")
    chosen = [replaced(own, number) for number, own in enumerate(prompts(family, asked(1)))]
    with torch.inference_mode():
        batch = PrefixCache(family, always=True).continued(chosen)
        rest = batch.mask.shape[1] - batch.cache.get_seq_length()
        made = family.model(inputs_embeds=batch.embeds[:, -rest:], attention_mask=batch.mask, logits_to_keep=1,
                            position_ids=batch.positions[:, -rest:], past_key_values=batch.cache)  # fmt: skip
    shared = made.logits[:, -1].float().cpu()
    record_property("drift", off := drift(shared, logits(family, chosen)))
    assert off < {"float32": 1e-4, "bfloat16": 0.2, "float16": 0.02}[dtype]


def replaced(prompt, number: int):
    from dataclasses import replace

    return replace(prompt, prefix_name=number)


@pytest.mark.gpu
@pytest.mark.flash_attn
@pytest.mark.parametrize("name", METHODS)
def test_flash_attention_equals_sdpa(name):
    flash, sdpa = (lab("cuda", "float16", own) for own in ("flash_attention_2", "sdpa"))
    equal = [a == b for a, b in zip(answers(flash, name), answers(sdpa, name), strict=True)]
    assert sum(equal) >= len(equal) - 1
    assert drift(*(logits(own, prompts(own, asked(1))) for own in (flash, sdpa))) < 0.05


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.parametrize("name", ["none", "rcb"])
def test_two_engines_agree(name):
    family = lab("cuda", "float16")
    engine = start_engine("vllm", family, "auto", {"gpu_memory_utilization": 0.2})
    try:
        found = answers(family, name, engine=engine)
    finally:
        engine.close()
    equal = [a == b for a, b in zip(found, answers(family, name), strict=True)]
    assert sum(equal) >= len(equal) - 1


@functools.cache
def wide(device: str):
    """On a GPU a prompt and layers of full size, whose activations tower above an allocator's blocks."""
    return lab("cpu") if device == "cpu" else random_family("llava-1.5-7b", layers=8, device=device)


@pytest.mark.parametrize("name", [name for name, cls in PRUNERS.items() if cls.stage == "layers"])
def test_methods_in_layers_take_no_more_memory_than_the_unpruned_model(device, name):
    family = wide(device)
    native = family.grid[0] * family.grid[1]
    chosen = prompts(family, asked(2)[::2], keep=native)
    embeds, mask, starts = left_pad(chosen)
    spans = [own.spans_from(start) for own, start in zip(chosen, starts, strict=True)]
    pruner = method(name, keep=round(0.4 * native))
    steps = [layer_steps(pruner, own, family.layers, "view") for own in chosen]

    def prefill() -> int:
        with torch.inference_mode():
            made = family.model(inputs_embeds=embeds, attention_mask=mask, use_cache=True, logits_to_keep=1)
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in made.past_key_values.layers)

    prefill()  # a GPU's libraries take their workspaces once
    with peak_bytes(torch.device(device)) as whole:
        cache = prefill()
    with peak_bytes(torch.device(device)) as pruned, prune_prompts(family.model, pruner, steps, spans):
        smaller = prefill()
    assert pruned[0] <= 1.01 * whole[0]
    assert smaller < 0.8 * cache


def test_out_of_memory_halves_the_batch_and_goes_on(device, monkeypatch):
    family, expected = lab(device), answers(lab("cpu"), "random")
    generate = type(family.model).generate

    def scarce(model, *args, **options):
        """On a CPU a limit of our own; on a GPU memory that really runs out."""
        rows = len(options["inputs_embeds"])
        if device == "cpu" and rows > 3:
            raise torch.OutOfMemoryError("no room for more than three")
        if rows > 3:
            torch.empty(2 * torch.cuda.get_device_properties(0).total_memory, dtype=torch.uint8, device=device)
        return generate(model, *args, **options)

    monkeypatch.setattr(type(family.model), "generate", scarce)
    session = Session(family, method("random"), batch_size=16)
    found = session.answer(asked(), max_new_tokens=4)
    assert [own.text for own in found] == expected
    assert 1 <= session.batch_size <= 3
