"""`Session` on a tiny checkpoint: what it answers, what it refuses for one question alone, and what it shows."""

from __future__ import annotations

import dataclasses
import threading

import flash
import numpy as np
import pytest
import tiny
import torch

from rcb_lmms import Session
from rcb_lmms.budget import Budget
from rcb_lmms.engine import session as module
from rcb_lmms.engine.clock import STAGES
from rcb_lmms.engine.ledger import pack_kept, unpack_kept
from rcb_lmms.engine.options import Generation
from rcb_lmms.engine.questions import Question
from rcb_lmms.errors import BudgetError, UserError
from rcb_lmms.families import load_family
from rcb_lmms.pruners import PRUNERS, make_pruner
from rcb_lmms.pruners.base import LayerStep

FAST = {"max_new_tokens": 4}


@pytest.fixture(scope="module")
def family(checkpoint):
    return load_family(checkpoint)


def session(family, method="random", keep=5, **options):
    budget = Budget.tokens(keep) if PRUNERS[method].budgets else None
    return Session(family, make_pruner(method, budget=budget), **options)


def asked(count=6):
    return [Question(f"What is {n}?", [tiny.random_image(n % 3)], name=str(n)) for n in range(count)]


def test_images_of_the_next_window_are_opened_while_the_model_answers(family, monkeypatch):
    """Without that, the first answer would wait for the ninth question, which a window of eight leaves for later."""
    ninth, opened = threading.Event(), []

    class Watched(Question):
        def load(self, family):
            opened.append(self.name)
            if self.name == "8":
                ninth.set()
            return super().load(family)

    def generate(*given):
        assert ninth.wait(60)
        return module_generate(*given)

    module_generate = module.generate
    monkeypatch.setattr(module, "generate", generate)
    questions = [Watched(own.text, own.images, name=own.name) for own in asked(12)]
    answers = session(family, batch_size=1).answer(questions, **FAST)
    assert sorted(opened, key=int) == [own.name for own in questions]
    expected = session(family).answer(asked(12), **FAST)
    assert [own.text for own in answers] == [own.text for own in expected]


def test_a_session_answers_files_and_images_and_says_what_it_cost(family, tmp_path):
    tiny.random_image(0).save(tmp_path / "a.png")
    answer, twin = session(family).answer(
        [Question("Why?", [tmp_path / "a.png"]), Question("Why?", [tiny.random_image(0)])], **FAST
    )
    assert (answer.text, answer.error) == (twin.text, None)
    assert (answer.row.visual_native, answer.row.visual_kept, answer.row.visual_views) == (16, 5, 1)
    (kept,) = answer.row.kept
    indices, native = unpack_kept(kept)
    assert (len(indices), native) == (5, 16)


def test_batches_windows_and_company_change_no_answer(family):
    questions = asked(11)
    one, many = (session(family, batch_size=size).answer(questions, **FAST) for size in (1, 4))
    assert one == many
    assert session(family, batch_size=4).answer(questions[5:], **FAST) == many[5:]
    assert len({answer.text for answer in many}) > 2
    drawn = {"do_sample": True, "temperature": 2.0, **FAST}
    some = session(family).answer(questions[3:], **drawn)
    assert session(family, batch_size=4).answer(questions, **drawn)[3:] == some


@pytest.mark.parametrize(("method", "options"), [("random", {}), ("random", {"prefix_cache": "on"}), ("fastv", {})])
def test_stages_are_told_apart_and_first_tokens_wait_for_their_batch(family, method, options):
    own = session(family, method, **options)
    own.answer(asked(3), **FAST)
    spent = dict(own.seconds)
    assert min(spent[stage] for stage in STAGES) > 0
    before = sum(spent[stage] for stage in STAGES[:4])
    assert spent["first_token"] == pytest.approx(before + 3 * spent["prefill"])


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_original_positions_are_those_of_an_unpruned_prompt_with_holes(family, name, tmp_path):
    if name == "llava_next":
        import tiny_next

        family = load_family(tiny_next.save_next(tmp_path / "next"), pack="flat")
    questions = [Question(f"What is {n}?", [tiny.random_image(n, 56 + 20 * n, 56)], name=str(n)) for n in range(3)]
    asked_twice = session(family, positions="original", batch_size=3)
    answers = asked_twice.answer(questions, **FAST)
    holes = []
    for question in questions:
        messages, visuals = question.load(family)
        packed = asked_twice.encoder.packed(visuals, make_pruner("none"))
        prompt = family.embed(family.chat(messages), packed)
        mask = torch.ones(1, len(prompt), dtype=torch.long)
        mask[0, prompt.spans[0][0] : prompt.spans[-1][1]] = 0
        trace, begin = asked_twice.trace(question), prompt.spans[0][0]
        for view, own in zip(trace.views[0], trace.selections[0], strict=True):
            mask[0, begin + own.kept] = 1
            begin += len(view)
        ids = family.model.generate(
            inputs_embeds=prompt.embeds[None], attention_mask=mask, position_ids=torch.arange(len(prompt))[None],
            do_sample=False, pad_token_id=family.tokenizer.pad_token_id, **FAST,
        )  # fmt: skip
        holes.append(family.tokenizer.decode(ids[0], skip_special_tokens=True))
    assert [answer.text for answer in answers] == holes
    assert holes != [answer.text for answer in session(family).answer(questions, **FAST)]
    one = session(family, positions="original", batch_size=1).answer(questions, **FAST)
    assert one == answers


def test_positions_of_an_unpruned_prompt_count_against_the_context(family):
    own = session(family, positions="original")
    whole = family.embed(family.prompt("What is 0?"), [family.pack_base(torch.zeros(16, tiny.WIDTH))])
    own.prompts.context = len(whole) + 3
    (answer,) = own.answer(asked(1), **FAST)
    assert "the model's context" in answer.error
    short = session(family)
    short.prompts.context = own.prompts.context
    assert short.answer(asked(1), **FAST)[0].error is None


@pytest.mark.parametrize("token", ["<image>", "<video>", "<s>", "</s>", "<pad>"])
def test_special_tokens_that_somebody_typed_are_words(family, token):
    ids = family.prompt(f"Is there a {token} here?")
    marks = {getattr(family.model.config, f"{medium}_token_id", None) for medium in ("image", "video")}
    plain = family.prompt("Is there a x here?")
    assert [i for i in ids if i in marks] == [i for i in plain if i in marks]
    special = set(family.tokenizer.all_special_ids)
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    assert token in family.tokenizer.decode(ids)
    answer, other = session(family).answer([Question(f"Is a {token} here?", [tiny.random_image(0)]), *asked(1)], **FAST)
    assert (answer.error, answer.row.visual_kept) == (None, 5)
    assert other.error is None


def test_an_image_or_a_prompt_that_fails_fails_alone(family, monkeypatch, tmp_path):
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    questions = asked(6)
    calm = session(family).answer(questions, **FAST)
    encode, embed = family.encode, family.embed
    poisoned = questions[1].load(family)[1][0].key

    def failing(visuals, needs=(), size=None):
        if any(visual.key == poisoned for visual in visuals):
            raise ValueError("this image breaks the tower")
        return encode(visuals, needs, size)

    monkeypatch.setattr(family, "encode", failing)
    short = lambda ids: ids[:-1] if len(ids) > 60 else ids  # noqa: E731
    monkeypatch.setattr(family, "embed", lambda ids, *own, **how: embed(short(ids), *own, **how))
    answers = session(family).answer([*questions, Question("Why?", [tmp_path / "cut.png"])], **FAST)
    assert [answer.error for answer in answers[:6]] == [None, "ValueError: this image breaks the tower", None] * 2
    assert "cut.png" in answers[6].error
    assert [answers[number] for number in (0, 2, 3, 5)] == [calm[number] for number in (0, 2, 3, 5)]


def test_numbers_that_are_not_finite_are_no_answer(family, monkeypatch):
    encode, questions = family.encode, asked(3)
    poisoned = questions[2].load(family)[1][0].key

    def spoilt(visuals, needs=(), size=None):
        return [
            [dataclasses.replace(view, features=view.features * torch.nan) for view in views]
            if visual.key == poisoned
            else views
            for visual, views in zip(visuals, encode(visuals, needs, size), strict=True)
        ]

    calm = session(family).answer(questions, **FAST)
    with monkeypatch.context() as patch:
        patch.setattr(family, "encode", spoilt)
        answers = session(family).answer(questions, **FAST)
    assert answers[:2] == calm[:2]
    assert "not finite" in answers[2].error
    weight = family.model.get_output_embeddings().weight
    row = weight[7].detach().clone()
    try:
        weight.data[7] = torch.nan
        answers = session(family).answer(questions, **FAST)
    finally:
        weight.data[7] = row
    assert {answer.error for answer in answers} == {"the language model's logits are not finite numbers"}
    assert session(family).answer(questions, **FAST) == calm


def test_the_same_words_about_the_same_image_are_answered_once_unless_drawn_or_each_by_itself(family, monkeypatch):
    twice = [Question(text, [tiny.random_image(n)], name=str(n)) for text in "ab" for n in (0, 1, 0, 1)]
    expected = [session(family).answer([question], **FAST)[0] for question in twice]
    asked_for, generate = [], module.generate

    def counted(family, prompts, *arguments):
        asked_for.extend(prompts)
        return generate(family, prompts, *arguments)

    monkeypatch.setattr(module, "generate", counted)
    assert session(family).answer(twice, **FAST) == expected
    assert len(asked_for) == 4
    session(family).answer(twice, do_sample=True, temperature=1.0, **FAST)
    assert len(asked_for) == 4 + 8
    assert session(family, prefix_cache="off").answer(twice, **FAST) == expected
    assert len(asked_for) == 4 + 8 + 8


def test_what_fails_once_fails_all_who_ask_the_same(family):
    own = session(family)
    own.prompts.context = 5
    answers = own.answer([Question("a", [tiny.random_image(0)]) for _ in range(3)], **FAST)
    assert ["the model's context" in answer.error for answer in answers] == [True] * 3


def test_what_exceeds_the_context_is_refused_for_that_question_alone(family, monkeypatch):
    own = session(family)
    fits, grows, long, endless = (Question("?" * size, [tiny.random_image(0)]) for size in (3, 20, 60, 200_000))
    length = len(family.prompt(grows.text)) - 1 + 5
    monkeypatch.setattr(own.prompts, "context", length + 1)
    answers = own.answer([fits, grows, long, endless], max_new_tokens=2)
    assert answers[0].error is None
    assert f"a prompt of {length} tokens and an answer of 2" in answers[1].error
    assert "a prompt of" in answers[2].error
    assert "a text of 200000 characters" in answers[3].error


def test_a_budget_that_cannot_be_met_stops_the_session(family):
    with pytest.raises(BudgetError, match="17 retained tokens"):
        session(family, keep=17).answer(asked(1), **FAST)

    class Generous(PRUNERS["random"]):
        def select(self, view, question=None):
            return PRUNERS["random"](Budget.tokens(9)).select(view)

    with pytest.raises(BudgetError, match="9 of 16 tokens, where the budget asks for 5"):
        Session(family, Generous(Budget.tokens(5))).answer(asked(1), **FAST)


def test_what_depends_on_the_question_is_not_cached_for_another(family):
    class ByQuestion(PRUNERS["random"]):
        sees_question = True

        def score(self, view, question=None):
            return torch.arange(len(view)).float() * (-1) ** len(question)

    own = Session(family, ByQuestion(Budget.tokens(2)))
    image = tiny.random_image(0)
    answers = own.answer([Question("even", [image]), Question("odd", [image]), Question("even", [image])], **FAST)
    kept = [unpack_kept(answer.row.kept[0])[0].tolist() for answer in answers]
    assert kept == [[14, 15], [0, 1], [14, 15]]
    assert own.encoder.encoded_images == 1


def test_a_trace_shows_what_the_answers_were_made_from(family):
    (question,) = asked(1)
    for method in ("random", "fastv"):
        own = session(family, method)
        (answer,) = own.answer([question], **FAST)
        trace = own.trace(question)
        kept = trace.layer_kept[2] if method == "fastv" else trace.selections[0][0].kept
        assert unpack_kept(answer.row.kept[0])[0].tolist() == kept.tolist()
    assert trace.layer_scores[2].shape == (16,)
    assert trace.layer_scores[2].argsort(descending=True)[:5].sort().values.tolist() == kept.tolist()


def test_what_a_method_costs_is_that_of_choosing_and_of_what_it_reads_of_the_tower(family):
    pruners = {name: make_pruner(name, budget=Budget.tokens(4)) for name in ("random", "divprune", "fastervlm")}
    rows = {name: Session(family, own).answer(asked(1), **FAST)[0].row for name, own in pruners.items()}
    queries_and_keys, products = 2 * 2 * 17 * 32 * 32, 2 * 17 * 32
    assert rows["random"].method_tflops == 0
    assert rows["divprune"].method_tflops == 2 * 16 * 16 * family.width / 1e12
    assert rows["fastervlm"].method_tflops == (queries_and_keys + products) / 1e12


@pytest.mark.parametrize("numbering", ["original", "contiguous"])
def test_a_schedule_of_several_steps_is_run_counted_and_traced(family, numbering):
    class Pyramid(PRUNERS["fastv"]):
        reprunes = False
        positions = numbering

        def schedule(self, native, layers, shares=1, encoded=0):
            return [LayerStep(1, native // 2), LayerStep(3, native // 4)]

    own = Session(family, Pyramid(Budget.tokens(5)), batch_size=3)
    questions = [*asked(2), Question("Nothing to see?")]
    answers = own.answer(questions, **FAST)
    alone = [Session(family, own.pruner).answer([question], **FAST)[0] for question in questions]
    assert [answer.text for answer in answers] == [answer.text for answer in alone]
    row, text = answers[0].row, answers[2].row
    assert own.shape.layers == 4
    assert (row.visual_kept, row.visual_layer_average) == (4, (16 + 8 + 8 + 4) / 4)
    flops = [own.shape.layer_flops(row.input_tokens - 16 + count) for count in (16, 8, 8, 4)]
    assert row.prefill_tflops == sum(flops) / 1e12
    assert (text.visual_kept, text.visual_layer_average, text.prefill_tflops > 0) == (0, 0, True)
    # The attention of the last token in two layers, the second of which sees eight tokens less.
    method = sum(own.shape.rows_flops(1, row.input_tokens - gone) for gone in (0, 8))
    assert (row.method_tflops, text.method_tflops) == (method / 1e12, 0)
    trace = own.trace(questions[0])
    assert {layer: len(kept) for layer, kept in trace.layer_kept.items()} == {1: 8, 3: 4}
    assert set(trace.layer_kept[3].tolist()) < set(trace.layer_kept[1].tolist())
    assert unpack_kept(row.kept[0])[0].tolist() == trace.layer_kept[3].tolist()


def test_sessions_share_what_was_encoded(family):
    first = session(family)
    first.answer(asked(3), **FAST)
    second = first.with_pruner(make_pruner("prumerge", budget=Budget.tokens(4)))
    assert all(answer.error is None for answer in second.answer(asked(3), **FAST))
    assert first.encoder.encoded_images == 6  # again, since PruMerge reads more of the tower
    third = second.with_pruner(make_pruner("none"))
    assert [answer.row.visual_kept for answer in third.answer(asked(3), **FAST)] == [16, 16, 16]
    assert first.encoder.encoded_images == 6


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan"), "do_sample": True}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": "many"}, "max_new_tokens"),
        ({"top_p": 2}, "top_p"),
        ({"num_beams": -3}, "num_beams"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_new_token": 5}, "max_new_token"),
    ],
)
def test_generation_arguments_out_of_range_are_refused(arguments, found):
    with pytest.raises(UserError, match=found):
        Generation.parse("t", arguments)


@pytest.mark.parametrize(
    ("text", "until", "answer"),
    [
        ("\n\nB. a cat\n\nmore", "\n\n", "B. a cat"),
        (" \n yes", ["\n\n"], "yes"),
        ("no ASSISTANT: yes", ("ASSISTANT:",), "no"),
        ("no", ("", "x"), "no"),
        ("\n\n", "\n\n", ""),
    ],
)
def test_an_answer_that_begins_with_blank_lines_is_not_cut_to_nothing(text, until, answer):
    assert Generation.parse("t", {"until": until}).cut(text) == answer


def test_kept_indices_survive_being_written_down():
    generator = np.random.default_rng(0)
    for native in (1, 7, 8, 9, 576, 729):
        for share in (0, 0.3, 1):
            kept = np.flatnonzero(generator.random(native) < share)
            indices, count = unpack_kept(pack_kept(kept.tolist(), native))
            assert (indices.tolist(), count) == (kept.tolist(), native)


@pytest.mark.parametrize("method", ["divprune", "pyramiddrop", "dart"])
def test_flash_attention_answers_as_sdpa_in_batches_and_behind_prefixes(method, checkpoint, flash_on_cpu):
    own = load_family(str(checkpoint))
    positions = "original" if method == "divprune" else "contiguous"
    pictures = [tiny.random_image(number) for number in range(3)]
    questions = [Question(f"What {'is ' * number}this?", pictures[:1]) for number in (1, 4, 2)]
    questions.append(Question("What are <image> and <image>?", pictures[1:]))
    found = set()
    for implementation in ("sdpa", flash.NAME):
        own.model.set_attn_implementation(implementation)
        for prefix_cache, batch_size in (("off", 1), ("auto", 4)):
            options = {"positions": positions, "prefix_cache": prefix_cache, "batch_size": batch_size}
            answers = Session(own, make_pruner(method, budget=Budget.tokens(12)), **options).answer(questions, **FAST)
            assert not any(answer.error for answer in answers)
            found.add(tuple(answer.text for answer in answers))
    assert len(found) == 1
