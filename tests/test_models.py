"""The entries as lmms-eval runs them, on a tiny random checkpoint and a POPE tree of 24 questions."""

import dataclasses
import json
import subprocess
import sys

import pytest
import tiny
import torch

from rcb_lmms.engine.options import Generation
from rcb_lmms.errors import UserError
from rcb_lmms.models import ENTRIES, class_name
from rcb_lmms.resources import cache_dir
from rcb_lmms.runs.folder import read_record, run_evaluation
from rcb_lmms.runs.tasks import make_task_manager, working_directory

FAST = {"max_new_tokens": 4}


@pytest.fixture(scope="module")
def task_manager():
    return make_task_manager()


@pytest.fixture
def evaluate(task_manager, pope_tree, checkpoint, tmp_path, monkeypatch):
    """Run an entry on the tree; returns its record and its samples by document."""
    monkeypatch.setenv("RCB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))

    def run(entry, name="run", tree=pope_tree, batch_size=8, **arguments):
        out = tmp_path / name
        with working_directory(tree):
            run_evaluation(
                entry,
                {"pretrained": checkpoint, **arguments},
                ["pope"],
                out,
                batch_size=batch_size,
                task_manager=task_manager,
            )
        rows = [json.loads(line) for line in (out / "samples_pope.jsonl").read_text().splitlines()]
        return read_record(out), {row["doc_id"]: row for row in rows}

    return run


def answers(samples):
    return {doc_id: row["filtered_resps"] for doc_id, row in samples.items()}


def test_questions_about_an_image_meet_whatever_stands_between_them(tmp_path):
    from datasets import Dataset, Features, Image, List, Value

    from rcb_lmms.models.requests import Request, grouped
    from rcb_lmms.models.rows import Rows

    for name in "ab":
        tiny.random_image(ord(name)).save(tmp_path / f"{name}.png")
    pictures = [str(tmp_path / f"{name}.png") for name in "abab"]
    one, several = Generation.parse("t", {}), Generation.parse("u", {})

    def ask(task, generation, features, column):
        rows = Rows(Dataset.from_dict({"image": column, "question": list("wxyz")}, Features(features)))
        return [Request(task=task, doc_id=n, generation=generation, stored=rows.stored_images(n)) for n in (0, 1, 2, 3)]

    texts = {"question": Value("string")}
    questions = ask("t", one, {"image": Image(), **texts}, pictures)
    questions += ask("u", several, {"image": List(Image()), **texts}, [pictures[:2], pictures[:1], pictures[:2], []])
    questions += ask("v", one, {"image": Value("string"), **texts}, pictures)
    assert grouped(questions) == [
        (("t", one), [0, 2, 1, 3]),
        (("u", several), [4, 6, 5, 7]),
        (("v", one), [8, 9, 10, 11]),
    ]


def test_all_questions_about_an_image_are_one_process_s_and_shares_are_even(monkeypatch):
    from rcb_lmms.models import requests

    processes, images = 3, 5
    documents = [
        requests.Request(text=f"{number}", task="t", split="s", doc_id=number, stored=f"{number % images}")
        for number in range(40)
    ]
    alone = [requests.Request(task="u", split="s", doc_id=number) for number in range(9)]
    single = requests.Request(task="v", split="s", doc_id=0, stored="0")
    asked = [[*documents[rank::processes], *alone[rank::processes]] for rank in range(processes)]
    asked[1].append(single)

    def told(rank):
        monkeypatch.setattr(requests, "rank_and_size", lambda: (rank, processes))
        own = [dataclasses.replace(one, rows=(rank, one.task)) for one in asked[rank]]
        known = [{(one.task, one.split) for one in theirs} for theirs in asked]
        monkeypatch.setattr(requests, "gather", lambda value: list(zip(asked, known, strict=True)))
        return requests.dealt(own)

    shares = [told(rank) for rank in range(processes)]
    found = {at: question for share in shares for at, question in share.items()}
    assert sum(map(len, shares)) == len(found) == 40 + 9 + 1
    for (process, place), question in found.items():
        assert dataclasses.replace(question, rows=None) == asked[process][place]
    for image in range(images):
        assert sum(any(one.task == "t" and one.stored == str(image) for one in own.values()) for own in shares) == 1
    assert sorted(map(len, shares)) == [16, 17, 17]
    assert [any(one.task == "v" for one in own.values()) for own in shares] == [False, True, False]
    assert all(one.rows == (rank, one.task) for rank, own in enumerate(shares) for one in own.values())

    asked = [documents[:1] * 10, documents[:1] * 2, []]
    asked[2] = [dataclasses.replace(documents[1], stored=None)]
    assert [len(told(rank)) for rank in range(processes)] == [5, 5, 3]


def shown(value):
    """A document with the pixels of its images, which PIL compares by their class too."""
    if isinstance(value, dict):
        return [(name, shown(own)) for name, own in value.items()]
    return [shown(own) for own in value] if isinstance(value, list) else getattr(value, "tobytes", lambda: value)()


def test_rows_are_the_data_sets_own_and_a_stored_image_is_decoded_once(tmp_path, monkeypatch):
    from datasets import ClassLabel, Dataset, Features, Image, List, Value

    from rcb_lmms.models.rows import Rows

    files = []
    for name in "ab":
        tiny.random_image(ord(name)).save(tmp_path / f"{name}.png")
        files.append({"bytes": (tmp_path / f"{name}.png").read_bytes(), "path": None})
    columns = {
        "question": (Value("string"), list("wxyz")),
        "image": (Image(), [*files, files[0], str(tmp_path / "b.png")]),
        "several": (List(Image()), [files, [], files[:1], files[::-1]]),
        "kind": (ClassLabel(names=["p", "q"]), [0, 1, 1, 0]),
        "none": (Image(), [None, *files, None]),
    }
    features = Features({name: feature for name, (feature, _) in columns.items()})
    data = Dataset.from_dict({name: values for name, (_, values) in columns.items()}, features)
    rows = Rows(data)
    for number in (3, 0, 1, 2):
        assert shown(rows[number]) == shown(data[number])
    rows[0]["image"].paste("white", (0, 0, 8, 8))
    assert shown(rows[2]) == shown(data[2])

    decoded = []
    decode = Image.decode_example
    monkeypatch.setattr(Image, "decode_example", lambda self, stored: decoded.append(stored) or decode(self, stored))
    fresh = Rows(data)
    assert [fresh[number]["question"] for number in (0, 1, 2, 0)] == list("wxyw")
    assert [stored["bytes"] for stored in decoded] == [file["bytes"] for file in files]
    assert Rows([{"image": 7}])[0] == {"image": 7}
    assert Rows(data.with_format("numpy")).stored_images(0) is None


def test_manifests_name_classes_that_exist_and_import_no_torch():
    code = (
        "import sys, rcb_lmms.models as m; manifests = m.manifests();"
        "print(sorted(x.model_id for x in manifests), sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    # lmms_eval itself imports torch with its model package, so the registry module is stubbed out of the question.
    stub = (
        "import sys, types; r = types.ModuleType('lmms_eval.models.registry_v2');"
        "r.ModelManifest = lambda **k: types.SimpleNamespace(**k);"
        "[sys.modules.setdefault(n, types.ModuleType(n)) for n in ('lmms_eval', 'lmms_eval.models')];"
        "sys.modules['lmms_eval.models.registry_v2'] = r;"
    )
    done = subprocess.run([sys.executable, "-c", stub + code], capture_output=True, text=True, check=True)
    ids = sorted(f"{family}_{method}" for family, methods in ENTRIES.items() for method in methods)
    assert done.stdout.strip() == f"{ids} []"


def test_every_entry_resolves_through_lmms_evals_registry():
    from lmms_eval.models import get_model

    for family, methods in ENTRIES.items():
        for method in methods:
            model = get_model(f"{family}_{method}")
            assert model.__name__ == class_name(family, method)
            assert model.is_simple is False
            assert (model.family_name, model.method) == (family, "none" if method == "full" else method)


@pytest.mark.parametrize("entry", ["llava_full", "llava_rcb", "llava_prumerge", "llava_fastv", "llava_random"])
def test_batches_of_any_size_give_the_same_answers(evaluate, entry, codebook_file):
    # Four by four patches hardly have attention outliers: PruMerge keeps one centre and the residual token.
    arguments = {"llava_full": {}, "llava_prumerge": {"keep": 2}}.get(entry, {"keep": 5})
    if entry == "llava_rcb":
        arguments["codebook"] = codebook_file
    _, one = evaluate(entry, "one", batch_size=1, **arguments)
    _, many = evaluate(entry, "many", batch_size=7, **arguments)
    assert answers(one) == answers(many)
    assert len(one) == 24
    assert len({str(answer) for answer in answers(one).values()}) > 2  # a constant answer would prove nothing


def test_the_ledger_counts_tokens_and_flops_per_sample(evaluate, codebook_file):
    record, samples = evaluate("llava_fastv", "fastv", keep=4, layer=1)
    for row in samples.values():
        (counts,) = row["token_counts"]
        assert (counts["visual_native"], counts["visual_kept"]) == (16, 4)
        assert counts["visual_layer_average"] == (1 * 16 + 3 * 4) / 4
    assert record["achieved"]["pope"]["layer_average_visual_tokens"] == 7.0
    _, full = evaluate("llava_full", "full")
    _, random = evaluate("llava_random", "random", keep=4)
    tflops = [run[0]["token_counts"][0]["prefill_tflops"] for run in (full, samples, random)]
    assert tflops[0] > tflops[1] > tflops[2] > 0
    inputs = [run[0]["token_counts"][0]["input_tokens"] for run in (full, samples, random)]
    assert (inputs[0] - inputs[2], inputs[0] - inputs[1]) == (12, 0)


def test_rcb_meets_a_mean_budget_and_says_so_in_the_results(evaluate, codebook_file, tmp_path):
    record, samples = evaluate("llava_rcb", "rcb", keep=6.5, codebook=codebook_file)
    kept = [row["token_counts"][0]["visual_kept"] for row in samples.values()]
    assert abs(sum(kept) / len(kept) - 6.5) <= 0.5
    calibration = record["calibrations"]["pope"]
    assert calibration["target"] == 6.5
    assert calibration["achieved"] == pytest.approx(sum(kept) / len(kept))
    assert (calibration["views"], calibration["questions"], calibration["cached"]) == (6, 24.0, False)
    assert record["achieved"]["pope"]["retained_visual_tokens"] == pytest.approx(calibration["achieved"])
    assert record["totals"]["images_encoded"] == 6  # the calibration pass and the answers share them
    assert record["resolved"]["codebook_sha256"]
    assert record["versions"]["lmms_eval"] == "0.7.3"


def test_a_calibration_is_found_again_and_another_data_set_is_not(evaluate, codebook_file, tmp_path):
    first, one = evaluate("llava_rcb", "one", keep=5, codebook=codebook_file)
    second, two = evaluate("llava_rcb", "two", keep=5, codebook=codebook_file, batch_size=3)
    assert (first["calibrations"]["pope"]["cached"], second["calibrations"]["pope"]["cached"]) == (False, True)
    assert first["calibrations"]["pope"]["fitted"] == second["calibrations"]["pope"]["fitted"]
    assert answers(one) == answers(two)
    other = tiny.save_pope(tmp_path / "other", images=5)
    third, _ = evaluate("llava_rcb", "three", tree=other, keep=5, codebook=codebook_file)
    assert third["calibrations"]["pope"]["cached"] is False
    for file in cache_dir().rglob("*.npz"):
        file.write_text("{")  # damaged: as good as none
    fourth, _ = evaluate("llava_rcb", "four", keep=5, codebook=codebook_file)
    assert fourth["calibrations"]["pope"]["cached"] is False


def test_match_retains_as_many_as_prumerge_does(evaluate, codebook_file):
    record, samples = evaluate("llava_rcb", "matched", match="prumerge", codebook=codebook_file)
    from rcb_lmms.budget import Budget
    from rcb_lmms.families import load_family
    from rcb_lmms.pruners import make_pruner

    family = load_family(record["resolved"]["pretrained"])
    pruner = make_pruner("prumerge", budget=Budget.adaptive())
    views = [family.encode([tiny.random_image(seed)], pruner.needs)[0][0] for seed in range(6)]
    expected = sum(len(pruner.choose(view)) for view in views) / 6
    assert record["calibrations"]["pope"]["target"] == pytest.approx(expected)
    kept = [row["token_counts"][0]["visual_kept"] for row in samples.values()]
    assert abs(sum(kept) / len(kept) - expected) <= 0.5


def test_random_depends_on_the_seed_and_not_on_the_order(evaluate):
    _, a = evaluate("llava_random", "a", keep=3, seed=1)
    _, b = evaluate("llava_random", "b", keep=3, seed=1, batch_size=5)
    _, c = evaluate("llava_random", "c", keep=3, seed=2)
    assert answers(a) == answers(b) != answers(c)


def test_a_failed_sample_is_recorded_and_never_scored(evaluate, tmp_path):
    tree = tiny.save_pope(tmp_path / "broken", change=tiny.cut_off)
    with pytest.raises(UserError, match="4 samples failed"):
        evaluate("llava_full", "broken_run", tree=tree)
    record = read_record(tmp_path / "broken_run")
    assert record["status"] == "failed"
    assert [failure["doc_id"] for failure in record["failures"]] == [8, 9, 10, 11]
    assert record["totals"]["questions"] == 20
    lines = (tmp_path / "broken_run" / "samples_pope.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["doc_id"] for line in lines) == [*range(8), *range(12, 24)]
    # The healthy samples got the answers that they get without the broken ones.
    _, whole = evaluate("llava_full", "whole")
    kept = {json.loads(line)["doc_id"]: json.loads(line)["filtered_resps"] for line in lines}
    assert kept == {doc_id: answer for doc_id, answer in answers(whole).items() if doc_id in kept}


def test_memory_that_runs_out_halves_the_batch_and_loses_nothing(evaluate, monkeypatch):
    from rcb_lmms.engine import session

    sizes, generate = [], session.generate

    def tight(family, prompts, *rest):
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(family, prompts, *rest)

    _, calm = evaluate("llava_full", "calm")
    monkeypatch.setattr(session, "generate", tight)
    record, samples = evaluate("llava_full", "tight", batch_size=8)
    assert answers(samples) == answers(calm)
    assert record["failures"] == []
    assert sizes[:3] == [8, 4, 2]


def test_one_poisoned_prompt_does_not_take_its_batch_along(evaluate, monkeypatch, tmp_path):
    from rcb_lmms.engine import session
    from rcb_lmms.families.base import Family

    generate = session.generate

    def poisoned(family, prompts, *rest):
        if any(torch.isnan(prompt.embeds).any() for prompt in prompts):
            raise ValueError("not a number")
        return generate(family, prompts, *rest)

    embed = Family.embed
    seen = []

    def embed_badly(self, ids, *own, **how):
        prompt = embed(self, ids, *own, **how)
        seen.append(prompt)
        return dataclasses.replace(prompt, embeds=prompt.embeds * float("nan")) if len(seen) == 6 else prompt

    monkeypatch.setattr(session, "generate", poisoned)
    monkeypatch.setattr("rcb_lmms.families.base.Family.embed", embed_badly)
    with pytest.raises(UserError, match="1 samples failed"):
        evaluate("llava_full", "poisoned")
    record = read_record(tmp_path / "poisoned")
    assert [failure["error"] for failure in record["failures"]] == ["ValueError: not a number"]
    assert record["totals"]["questions"] == 23


def test_a_finished_run_is_not_repeated_and_its_folder_is_its_own(evaluate, tmp_path):
    before, _ = evaluate("llava_full", "once")
    again, _ = evaluate("llava_full", "once")
    assert before["started"] == again["started"]
    with pytest.raises(UserError, match="holds another run"):
        evaluate("llava_random", "once", keep=4)
    (tmp_path / "once" / "run.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        evaluate("llava_full", "once")


def test_budgets_that_cannot_be_met_are_refused_with_the_arithmetic(evaluate, codebook_file, tmp_path):
    with pytest.raises(UserError, match="17 retained tokens"):
        evaluate("llava_random", "a", keep=17)
    with pytest.raises(UserError, match="views with 16 visual tokens on average"):
        evaluate("llava_rcb", "b", keep=17, codebook=codebook_file)
    with pytest.raises(UserError, match=r"\(2 x 16 \+ 2 x rank\) / 4 = 4"):
        evaluate("llava_fastv", "c", keep=4, convention="layer_average")
    assert read_record(tmp_path / "a")["status"] == "failed"


def test_a_codebook_of_another_width_is_refused(evaluate, tmp_path):
    wrong = tiny.save_codebook(tmp_path / "wrong.safetensors", width=32)
    with pytest.raises(UserError, match="32 wide"):
        evaluate("llava_rcb", codebook=wrong)


def test_a_checkpoint_that_the_codebook_was_not_made_with_is_warned_of(evaluate, checkpoint, codebook_file, caplog):
    """Of equal width, a fine-tune took the family's released codebook without a word."""
    record, _ = evaluate("llava_rcb", "fine-tune", threshold=0.5, codebook=codebook_file)
    made = record["resolved"]["codebook_model"]
    assert f"was made with {made}, and the checkpoint is {checkpoint}" in caplog.text


def test_generation_arguments_are_checked_and_cleaned():
    greedy = Generation.parse(
        "pope",
        {"max_new_tokens": 128, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False, "until": ["\n\n"]},
    )
    assert dict(greedy.options) == {
        "max_new_tokens": 128,
        "num_beams": 1,
        "do_sample": False,
        "repetition_penalty": 1.0,
    }
    assert greedy.cut(" a b\n\nc") == "a b"
    drawn = Generation.parse("mantis", {"temperature": 0.2, "do_sample": True})
    assert drawn.sampled
    assert dict(drawn.options)["max_new_tokens"] == 1024
    assert Generation.parse("seedbench", {"image_aspect_ratio": "original", "until": "X"}).until == ("X",)
    with pytest.raises(UserError, match="penalty_alpha"):
        Generation.parse("odd", {"penalty_alpha": 0.6})


def test_drawn_answers_depend_on_seed_and_prompt_alone(checkpoint, pope_tree, monkeypatch, tmp_path, task_manager):
    from lmms_eval.evaluator import simple_evaluate

    monkeypatch.setenv("HF_HOME", str(tmp_path))

    def draw(seed, batch_size):
        with working_directory(pope_tree):
            results = simple_evaluate(
                model="llava_full",
                model_args=f"pretrained={checkpoint},seed={seed}",
                tasks=["pope"],
                batch_size=batch_size,
                gen_kwargs="do_sample=True,temperature=1.0,max_new_tokens=4",
                bootstrap_iters=0,
                task_manager=task_manager,
                log_samples=True,
                limit=6,
            )
        return [row["filtered_resps"] for row in results["samples"]["pope"]]

    assert draw(1, 1) == draw(1, 4) != draw(2, 1)


def test_an_interrupted_run_goes_on_behind_its_last_batch(evaluate, monkeypatch, tmp_path, codebook_file):
    from rcb_lmms.engine import session

    _, whole = evaluate("llava_rcb", "whole", keep=5, codebook=codebook_file)
    generate, calls = session.generate, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*arguments)

    monkeypatch.setattr(session, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate("llava_rcb", "halves", keep=5, codebook=codebook_file)
    assert read_record(tmp_path / "halves")["status"] == "failed"
    record, samples = evaluate("llava_rcb", "halves", keep=5, codebook=codebook_file)
    assert answers(samples) == answers(whole)
    assert len(calls) == 4  # two batches of eight before, one after
    assert (record["totals"]["questions"], record["totals"]["resumed_questions"]) == (24, 16)
    assert record["achieved"] == read_record(tmp_path / "whole")["achieved"]
    assert not (tmp_path / "halves" / "answers").exists()


def test_answers_to_other_words_or_images_or_by_other_code_are_not_taken_over(tmp_path, monkeypatch, checkpoint):
    from types import SimpleNamespace

    from lmms_eval.api.instance import GenerationResult

    from rcb_lmms.engine.questions import content_of
    from rcb_lmms.families import load_family
    from rcb_lmms.models import journal
    from rcb_lmms.models.record import VisualTokenCounts
    from rcb_lmms.models.requests import Request
    from rcb_lmms.models.rows import Rows

    family = load_family(checkpoint)
    folder = tmp_path / "answers"

    def question(text, seed=0):
        content = [{"type": "image", "url": tiny.random_image(seed)}, {"type": "text", "text": text}]
        arguments = ("", lambda doc: [{"role": "user", "content": content}], {}, 1, "t", "s")
        return Request.of(SimpleNamespace(args=arguments, metadata=None), Rows([None, None]), 0)

    asked, fitted = question("What? Answer in one word."), {"threshold": 0.5}
    answer = GenerationResult("yes", VisualTokenCounts(input_tokens=9, visual_kept=4, kept=["16:8A=="]))
    journal.Journal(folder, {"model": "m"}, 0).write(asked, fitted, content_of(*asked.load(family)), answer)
    again = journal.Journal(folder, {"model": "m"}, 1)
    assert again.answer(asked, fitted, family) == answer
    assert again.answer(asked, {"threshold": 0.6}, family) is None
    assert again.answer(question("What? Answer in detail."), fitted, family) is None
    assert again.answer(question("What? Answer in one word.", seed=1), fitted, family) is None
    assert journal.Journal(folder, {"model": "n"}, 0).answer(asked, fitted, family) is None
    monkeypatch.setattr(journal, "sources_hash", lambda: "changed")
    assert journal.Journal(folder, {"model": "m"}, 0).answer(asked, fitted, family) is None


def test_a_threshold_that_keeps_nothing_says_so(evaluate, codebook_file, caplog):
    record, _ = evaluate("llava_rcb", "one", threshold=-1, codebook=codebook_file)
    assert record["achieved"]["pope"]["retained_max"] == record["achieved"]["pope"]["retained_min"] == 1
    assert caplog.text.count("min_keep adds 1 tokens") == 6
    record, samples = evaluate("llava_rcb", "none", threshold=-1, min_keep=0, codebook=codebook_file)
    assert record["achieved"]["pope"]["retained_max"] == 0
    assert len(samples) == 24
