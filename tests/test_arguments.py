"""model_args: which there are, what is refused before anything is loaded, and what they resolve to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from lmms_eval.utils import simple_parse_args_string

from rcb_lmms.budget import Budget
from rcb_lmms.errors import UserError
from rcb_lmms.models import PARTS, entries
from rcb_lmms.models.argument_types import argument_types, parse_arguments
from rcb_lmms.models.arguments import resolve
from rcb_lmms.models.command import check_command, task_words
from rcb_lmms.runs.tasks import make_task_manager

EVALUATE = Path(__file__).parents[1] / "docs" / "evaluate.md"

BAD = [
    # entry, model_args, what is found, what is allowed
    ("llava_rcb", "keep=nan", "keep=nan", "a finite number"),
    ("llava_random", "keep=inf", "keep=inf", "a finite number"),
    ("llava_random", "keep=1e400", "keep=inf", "a finite number"),
    ("llava_rcb", "keep=True", "keep=True", "a number"),
    ("llava_rcb", "keep=", "keep=", "a number"),
    ("llava_rcb", "keep=many", "keep=many", "a number"),
    ("llava_random", "keep=0", "keep=0", "greater than 0"),
    ("llava_random", "keep=3.5", "3.5", "whole numbers from 1"),
    ("llava_random", "ratio=1e-9", "ratio=1e-09", "greater than or equal to 0.001"),
    ("llava_rcb", "ratio=1.5", "ratio=1.5", "less than or equal to 1"),
    ("llava_rcb", "threshold=45", "threshold=45", "less than or equal to 1"),
    ("llava_rcb", "threshold=nan", "threshold=nan", "a finite number"),
    ("llava_rcb", "threshold=0.4,ties=-1", "ties=-1.0", "greater than or equal to 0"),
    ("llava_rcb", "ties=2", "no threshold", "threshold=...,ties=..."),
    ("llava_rcb", "keep=64,ratio=0.5", "keep=64, ratio=0.5", "one of: keep, ratio, threshold, match"),
    ("llava_rcb", "match=sparsevlm", "no such target", "METHOD:TOKENS"),
    ("llava_rcb", "match=random", "without its number", "METHOD:TOKENS"),
    ("llava_rcb", "min_keep=1000", "min_keep=1000, which stay of every view", "means from 1000"),
    ("llava_rcb", "min_keep=abc", "min_keep=abc", "a whole number"),
    ("llava_rcb", "min_keep=2.5", "min_keep=2.5", "a whole number"),
    ("llava_fastv", "layer=abc", "layer=abc", "a whole number"),
    ("llava_fastv", "layer=0", "0", "1 or more"),
    ("llava_fastv", "mode=hide", "hide", "drop, mask"),
    ("llava_prumerge", "neighbours=nan", "neighbours=nan", "a finite number"),
    ("llava_random", "seed=abc", "seed=abc", "a whole number"),
    ("llava_full", "seed=nan", "seed=nan", "a finite number"),
    ("llava_full", "seed=-1", "seed=-1.0", "greater than or equal to 0"),
    ("llava_full", "batch_size=auto", "batch_size=auto", "a whole number"),
    ("llava_full", "batch_size=0", "batch_size=0", "greater than or equal to 1"),
    ("llava_full", "max_frames_num=-1", "max_frames_num=-1.0", "greater than or equal to 1"),
    ("llava_full", "dtype=float8", "dtype=float8", "auto, float32, float16, bfloat16"),
    ("llava_full", "device=foo", "no such device", "cpu"),
    ("llava_full", "device=cuda:77", "no such device", "cpu"),
    ("llava_full", "attn_implementation=flsh", "attn_implementation=flsh", "sdpa, eager"),
    ("llava_full", "attn_implementation=flash_attention_3", "flash-attn-3 is not installed", "sdpa and eager"),
    ("llava_full", "device_map=auto,device=cpu", "two places for one model", "one device for each process"),
    ("llava_full", "device_map=everywhere", "device_map=everywhere", "auto, balanced, balanced_low_0, sequential"),
    ("llava_full", "quantization=3bit", "quantization=3bit", "4bit, 8bit"),
    ("llava_full", "preprocess=crop", "preprocess=crop", "rcb, pad"),
    ("llava_full", "template=qwen", "template=qwen", "checkpoint, vicuna"),
    ("llava_full", "video_backend=opencv", "video_backend=opencv", "pyav, decord, torchcodec"),
    ("llava_rcb", "preset=offical", "preset=offical", "official, paper, paper_literal"),
    ("llava_random", "per=tile", "per=tile", "view, image"),
    ("llava_next_random", "split=maybe", "split=maybe", "true or false"),
    ("llava_next_random", "pack=loose", "pack=loose", "auto, flat, flat_newline, spatial_unpad"),
    ("llava_next_random", "pack=spatial_unpad", "need the whole grid", "flat"),
    ("llava_onevision_rcb", "match=prumerge", "without CLS token", "llava_onevision_rcb"),
    # Arguments that another entry has
    ("llava_rcb", "kep=64", "model_args this entry does not have", "pretrained, dtype, device"),
    ("llava_full", "keep=64", "model_args this entry does not have", "pretrained, dtype, device"),
    ("llava_full", "per=image", "model_args this entry does not have", "pretrained, dtype, device"),
    ("llava_random", "threshold=0.5", "model_args this entry does not have", "keep, ratio"),
    ("llava_random", "match=prumerge", "model_args this entry does not have", "keep, ratio"),
    ("llava_random", "split=true", "model_args this entry does not have", "keep, ratio"),
    ("llava_random", "pack=flat", "model_args this entry does not have", "keep, ratio"),
]


@pytest.mark.parametrize(("entry", "text", "found", "allowed"), BAD, ids=lambda value: str(value)[:30])
def test_what_is_wrong_is_refused_with_what_is_allowed(entry, text, found, allowed, codebook_file, monkeypatch):
    """As lmms-eval types it, and as the text that a person typed: both are checked."""
    monkeypatch.setattr("transformers.utils.is_flash_attn_3_available", lambda: False, raising=False)
    own = {"codebook": str(codebook_file)} if entry.endswith("rcb") else {}
    with pytest.raises(UserError) as refusal:
        resolve(*PARTS[entry], {**own, **simple_parse_args_string(text)})
    assert found in refusal.value.found
    assert allowed in refusal.value.allowed
    with pytest.raises(UserError):
        resolve(*PARTS[entry], {**own, **parse_arguments(text)})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("keep", "keep without a value"),
        ("keep=3,", "an empty argument without a value"),
        ("keep=36,keep=16", "keep with more than one value"),
        ("keep=36, keep=16,seed=1", "keep with more than one value"),
    ],
)
def test_each_argument_has_one_value(text, found):
    """lmms-eval's parser took the last of two without a word, and ended in a traceback without one."""
    with pytest.raises(UserError) as refusal:
        parse_arguments(text)
    assert refusal.value.found == found
    with pytest.raises(UserError):
        entries.LlavaRandom.create_from_arg_string(text)


def test_an_argument_is_named_that_may_be_meant(codebook_file):
    with pytest.raises(UserError) as refusal:
        resolve("llava", "rcb", {"codebook": str(codebook_file), "treshold": 0.4})
    assert "treshold: threshold" in refusal.value.next_step


def test_model_args_and_lmms_evals_own_argument_may_both_give_a_batch_size(monkeypatch, caplog):
    made = []
    monkeypatch.setattr(entries.LlavaFull, "__init__", lambda self, **given: made.append(given))
    monkeypatch.setattr(sys, "argv", ["lmms_eval", "--batch_size", "2"])
    entries.LlavaFull.create_from_arg_string("batch_size=4,device=cpu", {"batch_size": 2, "device": None})
    assert made == [{"batch_size": 4, "device": "cpu"}]
    assert "batch_size=4 in model_args counts, not --batch_size 2" in caplog.text


@pytest.mark.parametrize(
    ("words", "found", "next_step"),
    [
        (["--model_args", "keep=nan", "--tasks", "pope"], "keep=nan", "correct keep"),
        (["--tasks", "pope", "--gen_kwargs", "temperature=-1"], "temperature=-1", "--gen_kwargs"),
        (["--tasks", "pope", "--gen_kwargs", "top_p=nan"], "top_p=nan", "--gen_kwargs"),
        (["--tasks", "pope", "--gen_kwargs", "tempreature=1"], "tempreature, which is unknown", "--gen_kwargs"),
        (["--tasks", "poppe"], "no such task", "correct the names: pope"),
        (["--tasks", ""], "--tasks ''", "--tasks pope"),
        ([], "no --tasks", "--tasks pope"),
        (["--tasks", "pope", "--limit", "0"], "no number", "--limit 8"),
        (["--tasks", "pope", "--limit=nan"], "no number", "--limit 8"),
        (["--tasks", "pope", "--limit", "-2"], "no number", "--limit 8"),
    ],
)
def test_the_command_refuses_within_seconds(words, found, next_step):
    """Before tasks are read, and before lmms-eval, torch or transformers are loaded."""
    code = (
        "import sys\nfrom rcb_lmms.runs import host\nsys.argv[:1] = ['lmms_eval', '--model', 'llava_random']\n"
        "try: host.main()\n"
        "finally: print({'torch', 'transformers', 'lmms_eval', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "set()\n")
    told = dict(line.split(":", 1) for line in done.stderr.splitlines()[1:5])
    assert found in told["found"]
    assert next_step in told["next"]


def test_a_misspelt_entry_is_answered_with_the_nearest(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lmms_eval", "--model", "llava_rbc", "--tasks", "pope"])
    with pytest.raises(UserError) as refusal:
        check_command()
    assert "llava_rcb" in refusal.value.next_step
    monkeypatch.setattr(sys, "argv", ["lmms_eval", "--model", "llava_onevision", "--tasks", "pope"])
    check_command()  # lmms-eval's own


def test_no_task_of_lmms_eval_or_ours_is_called_misspelt():
    assert set(make_task_manager().all_tasks) <= task_words()


def test_the_documentation_names_every_argument():
    text = EVALUATE.read_text()
    every = {name for family, method in PARTS.values() for name in argument_types(family, method)}
    assert {name for name in every if f"`{name}`" not in text and f"`{name}=" not in text} == set()


def test_arguments_come_as_lmms_eval_types_them():
    def loading(text):
        return resolve("llava_next", "random", simple_parse_args_string(text)).loading

    assert loading("split=False")["split"] is loading("split=false")["split"] is False
    assert resolve("llava_next", "random", {"split": "True"}).loading["split"] is True
    assert loading("max_frames_num=8,video_backend=pyav")["max_frames_num"] == 8
    assert loading("max_frames_num=8.0")["max_frames_num"] == 8
    assert loading("")["max_frames_num"] == 16
    assert resolve("llava", "random", {"batch_size": "4", "device": None}).batch_size == 4


def test_packing_follows_the_method():
    def packing(method, **arguments):
        return resolve("llava_next", method, arguments).loading["pack"]

    assert packing("none") == packing("fastv", keep=4) == "spatial_unpad"
    assert packing("none", split=False) == packing("random") == packing("prumerge") == "auto"
    assert packing("fastv", pack="flat") == "flat"
    with pytest.raises(UserError, match="need the whole grid"):
        packing("random", pack="spatial_unpad")


def test_rcb_on_onevision_follows_its_presets(codebook_file):
    def settings(**arguments):
        return resolve("llava_onevision", "rcb", {"codebook": str(codebook_file), **arguments})

    official = settings(keep=5)
    assert (official.pruner.variant, official.pruner.budget, official.target) == (
        "double_softmax",
        Budget.tokens(5),
        None,
    )
    assert settings(match="fastv:9").pruner.budget == Budget.tokens(9)
    paper = settings(keep=5, preset="paper")
    assert (paper.pruner.variant, paper.target.tokens) == ("max_cosine", 5)
    assert settings(keep=5, variant="max_cosine").target.tokens == 5
    assert settings(keep=5, preset="paper", variant="double_softmax").pruner.budget == Budget.tokens(5)
    assert settings(threshold=0.4).pruner.variant == "max_cosine"
    with pytest.raises(UserError, match="without CLS token"):
        settings(match="prumerge")
    for family in ("llava", "llava_next"):
        assert resolve(family, "rcb", {"codebook": str(codebook_file)}).pruner.variant == "max_cosine"


def test_an_entry_without_arguments_means_the_papers_setting(codebook_file):
    settings = resolve("llava", "rcb", {"codebook": codebook_file})
    assert settings.loading["pretrained"] == "llava-hf/llava-1.5-7b-hf"
    assert settings.target.tokens == 64
    assert resolve("llava", "rcb", {"codebook": codebook_file, "preset": "paper"}).pruner.preset == "paper"
    assert resolve("llava", "random", {"preset": "paper", "seed": 7}).pruner.seed == 7
    assert resolve("llava", "random", {}).pruner.budget.count(576) == 64
    assert resolve("llava", "fastv", {}).pruner.rank(576, 32) == 64
    assert resolve("llava", "prumerge", {}).target.tokens == 64


def test_match_takes_counts_as_they_are_and_measures_only_what_a_baseline_decides(codebook_file):
    # FastV leaves every view whole and prunes in the decoder: measuring its views gave the native count.
    targets = {
        name: resolve("llava", "rcb", {"codebook": codebook_file, "match": name}).target
        for name in ("fastv:144", "random:64", "prumerge:72", "prumerge")
    }
    assert [targets[name].tokens for name in targets] == [144, 64, 72, None]
    assert targets["prumerge"].measured.budget.kind == "adaptive"
    with pytest.raises(UserError, match="without its number"):
        resolve("llava", "rcb", {"codebook": codebook_file, "match": "random"})
    for method in ("fastv", "random"):
        with pytest.raises(UserError, match="model_args this entry does not have"):
            resolve("llava", method, {"match": "prumerge"})
