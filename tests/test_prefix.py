"""Prefixes that questions about an image share, against prompts that are computed whole."""

from __future__ import annotations

import pytest
import tiny
import tiny_next
import tiny_onevision
import torch

from rcb_lmms import Question, Session
from rcb_lmms.budget import Budget
from rcb_lmms.engine import session as module
from rcb_lmms.engine.prefix import PrefixCache
from rcb_lmms.errors import UserError
from rcb_lmms.families import load_family
from rcb_lmms.pruners import PRUNERS, make_pruner

FAST = {"max_new_tokens": 6}


@pytest.fixture(scope="module", params=["llava", "llava_next", "llava_onevision"])
def family(request, checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "llava":
        return load_family(checkpoint)
    save = tiny_next.save_next if request.param == "llava_next" else tiny_onevision.save_onevision
    return load_family(save(folder))


def asked(images=3, each=4):
    """Questions about images of three sizes, those of one image apart from each other; then two images, and none."""
    sizes = ((112, 56), (56, 56), (60, 90))
    pictures = [tiny.random_image(n, *sizes[n % 3]) for n in range(images)]
    questions = [
        Question(f"What {'is it' * (n + own)}?", [pictures[own]], name=f"{own}-{n}")
        for n in range(each)
        for own in range(images)
    ]
    both = [Question(f"Is {n} like <image>, or <image>?", pictures[:2], name=f"b{n}") for n in range(2)]
    return [*questions, *both]


def session(family, method="random", **options):
    budget = Budget.tokens(5) if PRUNERS[method].budgets else None
    return Session(family, make_pruner(method, budget=budget), **options)


@pytest.mark.parametrize("method", ["none", "random", "downsample"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_answers_are_those_of_whole_prompts(family, method, batch_size):
    questions = [*asked(), Question("Nothing to see?", [], name="x")]
    whole = session(family, method, prefix_cache="off", batch_size=batch_size).answer(questions, **FAST)
    shared = session(family, method, prefix_cache="on", batch_size=batch_size)
    assert shared.answer(questions, **FAST) == whole
    assert shared.prefixes.computed == 5  # three images, and two of them behind different words
    assert len({answer.text for answer in whole}) > 4


def test_a_video_before_the_question_is_shared_too(family, tmp_path):
    for number in range(3):
        tiny.random_image(50 + number, 64, 48).save(tmp_path / f"{number}.png")
    questions = [Question(f"What happens{' then' * n}?", videos=[tmp_path], name=str(n)) for n in range(5)]
    whole = session(family, "none", prefix_cache="off", batch_size=3).answer(questions, **FAST)
    shared = session(family, "none", prefix_cache="on", batch_size=3)
    assert shared.answer(questions, **FAST) == whole
    assert shared.prefixes.computed == 1


def test_original_positions_are_kept_behind_a_shared_prefix(family):
    options = {"positions": "original", "batch_size": 4}
    if family.name == "llava_next":
        options["per"] = "image"
    method = "random"
    whole = session(family, method, prefix_cache="off", **options).answer(asked(), **FAST)
    assert session(family, method, prefix_cache="on", **options).answer(asked(), **FAST) == whole


def test_drawn_answers_are_those_of_whole_prompts(family):
    drawn = {"do_sample": True, "temperature": 2.0, **FAST}
    whole = session(family, prefix_cache="off").answer(asked(), **drawn)
    assert session(family, prefix_cache="on").answer(asked(), **drawn) == whole


def test_logits_are_those_of_whole_prompts_in_float32(family):
    from rcb_lmms.engine.generation import left_pad

    own = session(family)
    ready, _ = own.prompts.of(range(4), map(own.prompts.open, asked(2, 2)))
    prompts = [one.prompt for one in ready]
    batch = own.prefixes.continued(prompts)
    with torch.inference_mode():
        rest = batch.embeds[:, batch.cache.get_seq_length() :]
        places = batch.positions[:, -rest.shape[1] :]
        found = family.model(
            inputs_embeds=rest, attention_mask=batch.mask, position_ids=places, past_key_values=batch.cache
        )
        embeds, mask, _ = left_pad(prompts)
        whole = family.model(inputs_embeds=embeds, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    torch.testing.assert_close(found.logits[:, -1], whole.logits[:, -1], atol=2e-5, rtol=1e-4)


def test_auto_shares_where_questions_do(family):
    alone = session(family)
    alone.answer([Question(f"{n}?", [tiny.random_image(n)]) for n in range(4)], **FAST)
    assert alone.prefixes.computed == 0
    alone.answer(asked(1, 3)[:3], **FAST)
    assert alone.prefixes.computed == 1
    single = session(family, batch_size=1)  # as lmms-eval's default: what the questions of a window share counts
    single.answer(asked(1, 3)[:3], **FAST)
    assert single.prefixes.computed == 1
    assert session(family, "fastv").prefixes is None
    beams = session(family, prefix_cache="on")
    beams.answer(asked(1, 2)[:2], num_beams=2, **FAST)
    assert beams.prefixes.computed == 0


def test_what_is_remembered_is_bounded(family):
    own = session(family, prefix_cache="on", batch_size=3)
    own.answer(asked()[:1], **FAST)
    one = own.prefixes._stored.currsize
    own.prefixes = PrefixCache(family, always=True, store_bytes=one - 1)
    answers = own.answer(asked(), **FAST)
    assert own.prefixes._stored.currsize <= one
    assert answers == session(family, prefix_cache="off").answer(asked(), **FAST)


def test_a_batch_that_does_not_fit_is_halved_and_answers_the_same(family, monkeypatch):
    expected = session(family, prefix_cache="off").answer(asked(), **FAST)
    generate = module.generate

    def tight(family, prompts, *arguments):
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("no room")
        return generate(family, prompts, *arguments)

    monkeypatch.setattr(module, "generate", tight)
    assert session(family, prefix_cache="on", batch_size=8).answer(asked(), **FAST) == expected


@pytest.mark.parametrize(("method", "setting"), [("fastv", "on"), ("random", "yes"), ("cdpruner", "on")])
def test_a_prefix_that_is_not_shared_is_refused(family, method, setting):
    options = {"relevance": "embedding"} if method == "cdpruner" else {}
    with pytest.raises(UserError, match="auto, off"):
        Session(family, make_pruner(method, budget=Budget.tokens(5), **options), prefix_cache=setting)
