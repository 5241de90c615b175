"""What `rcb bench` reports: formulas against torch's counter, sizes, memory and the table."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace

import pandas as pd
import pytest
import tiny
import tiny_next
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from rcb_lmms.analysis.bench import QUESTION, bench, matmul_flops, tokens_by_layer
from rcb_lmms.analysis.memory import LiveBytes
from rcb_lmms.budget import Budget
from rcb_lmms.cli import app
from rcb_lmms.cost import DecoderShape, projector_flops, tower_flops
from rcb_lmms.engine.generation import layer_steps, left_pad, prune_prompts
from rcb_lmms.engine.questions import Question
from rcb_lmms.engine.session import Session
from rcb_lmms.errors import UserError
from rcb_lmms.families import load_family, shapes
from rcb_lmms.families.towers import states_of
from rcb_lmms.lab.scenes import make_scene
from rcb_lmms.pruners import PRUNERS, make_pruner
from rcb_lmms.pruners.tokens import PromptSizes

LAYER_METHODS = [name for name, cls in PRUNERS.items() if cls.stage == "layers"]
VICUNA = DecoderShape(layers=32, d=4096, m=11008, heads=32, kv_heads=32, head_width=128, vocabulary=32064)


def counted(run) -> tuple[int, object]:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        made = run()
    return counter.get_total_flops(), made


# Shapes and formulas


@pytest.mark.parametrize(
    ("name", "parameters", "gflops"),
    [
        ("llava-1.5-7b", 7_063_427_072, (366.0, 24.2, 8504.0)),
        ("llava-1.5-13b", 13_351_494_656, (366.0, 36.2, 16575.9)),
        ("llama3-llava-next-8b", 8_355_276_800, (366.0, 24.2, 9148.3)),
        ("llava-onevision-qwen2-7b", 8_030_348_832, (641.8, 24.7, 8516.8)),
    ],
)
def test_formulas_at_full_size_are_what_torch_counts(name, parameters, gflops):
    """Two decoder layers are counted on the meta device; the others are like them. Parameters are the checkpoints'."""
    shape, n = shapes.SHAPES[name], 640
    model = shapes._empty(shape, 2, "sdpa").to("meta").eval()
    config, layers = model.config, shape.text["num_hidden_layers"]
    decoder = model.get_decoder()
    one = sum(own.numel() for own in decoder.layers[0].parameters())
    assert sum(own.numel() for own in model.parameters()) + (layers - 2) * one == parameters
    vision, cls, own = config.vision_config, config.vision_feature_select_strategy == "default", DecoderShape.of(config)
    side, patches = vision.image_size, (vision.image_size // vision.patch_size) ** 2
    tower, seen = counted(lambda: model.model.vision_tower(torch.zeros(1, 3, side, side, device="meta")))
    assert tower == tower_flops(vision, patches, cls)
    pixels, layer = torch.zeros(1, 3, side, side, device="meta"), config.vision_feature_layer
    tower, _ = counted(lambda: states_of(model.model.vision_tower, pixels, layer))
    assert tower == tower_flops(vision, patches, cls, vision.num_hidden_layers + 1 + layer)
    projector, _ = counted(lambda: model.model.multi_modal_projector(seen.last_hidden_state[:, int(cls) :]))
    assert projector == projector_flops(patches, vision.hidden_size, own.d)
    prompt = torch.zeros(1, n, own.d, device="meta")
    prefill, output = counted(lambda: model(inputs_embeds=prompt, use_cache=True, logits_to_keep=1))
    assert prefill == own.prefill_flops(n) + own.head_flops()
    cache = output.past_key_values
    decoded = sum(
        counted(lambda: model(inputs_embeds=prompt[:, :1], past_key_values=cache, use_cache=True))[0] for _ in range(3)
    )
    assert decoded == own.decode_flops(n, 4)
    whole = replace(own, layers=layers)
    found = (tower, projector, whole.prefill_flops(n))
    assert tuple(round(flops / 1e9, 1) for flops in found) == gflops


def test_named_formulas_differ_as_they_are_said_to():
    """At 640 tokens: FastV's lacks one of three matrices of the MLP; SparseVLM's is ours in multiply-adds."""
    formulas = (VICUNA.layer_flops, VICUNA.fastv_paper_macs, VICUNA.sparsevlm_macs)
    assert [round(32 * formula(640) / 1e12, 3) for formula in formulas] == [8.504, 3.329, 4.252]
    llama3 = replace(VICUNA, m=14336, kv_heads=8)
    assert 2 * VICUNA.sparsevlm_macs(640) == VICUNA.layer_flops(640)
    assert 2 * llama3.sparsevlm_macs(640) / llama3.layer_flops(640) == pytest.approx(1.113, abs=1e-3)


@pytest.fixture
def small_shape(monkeypatch):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision, text = shapes.CLIP | sizes | {"image_size": 56}, shapes._text("llama", 48, 96, 4, 4, 2, 1000, 1024)
    small = shapes.Shape("llava", text, vision, 12)
    tiled = shapes.Shape("llava_next", text, vision, 12, shapes.NEXT_GRIDS)
    monkeypatch.setattr(shapes, "SHAPES", {"small": small, "tiled": tiled})


def test_random_weights_are_drawn_in_their_type_and_answer(small_shape):
    family = shapes.random_family("small", layers=3, dtype="bfloat16")
    assert {own.dtype for own in family.model.parameters()} == {torch.bfloat16}
    assert (family.layers, family.grid) == (3, (4, 4))
    assert "random weights in the shape of small, 3 decoder layers" in family.pretrained
    weight = family.model.get_decoder().layers[0].mlp.up_proj.weight.float()
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert family.model.get_decoder().norm.weight.unique().tolist() == [1]
    answer = Session(family, make_pruner("none")).answer([said()], max_new_tokens=3)[0]
    assert (answer.error, answer.row.visual_native) == (None, 16)
    tiled = shapes.random_family("tiled")
    assert len(tiled.encode([tiny.random_image(0, 100, 100)])[0]) == 5
    with pytest.raises(UserError, match="an architecture of 4"):
        shapes.random_family("small", layers=5)
    with pytest.raises(UserError, match="shape=huge"):
        shapes.random_family("huge")


def said(number: int = 0):
    return Question(QUESTION, [tiny.random_image(number)])


# Methods inside the decoder


@pytest.fixture(scope="module")
def lab():
    return load_family("lab")


@pytest.fixture
def prompt(lab):
    ((view,),) = lab.encode([make_scene("test", 0).image()])
    return lab.embed(lab.prompt(QUESTION), [lab.pack_base(view.features)])


def prefill(lab, pruner, prompt):
    """The schedule, and the length of every layer's cache."""
    embeds, mask, _ = left_pad([prompt])
    steps = layer_steps(pruner, prompt, lab.layers, "view")
    with torch.inference_mode(), prune_prompts(lab.model, pruner, [steps], [list(prompt.spans)]):
        made = lab.model(inputs_embeds=embeds, attention_mask=mask, use_cache=True, logits_to_keep=1)
    return steps, [layer.keys.shape[2] for layer in made.past_key_values.layers]


@pytest.mark.parametrize("name", LAYER_METHODS)
def test_layers_behind_a_step_do_the_work_of_what_is_left(lab, prompt, name):
    """FLOPs of the whole prefill are the schedule's and the method's own; caches are as long as each layer's input.

    Of choosing, torch's counter sees products alone: what stands beside them is held in `test_layer_methods`.
    """
    pruner, shape = make_pruner(name, budget=Budget.tokens(58)), DecoderShape.of(lab.model.config)
    lab.model.set_attn_implementation("eager")  # torch's counter is blind to sdpa on a CPU
    try:
        flops, (steps, lengths) = counted(lambda: prefill(lab, pruner, prompt))
    finally:
        lab.model.set_attn_implementation("sdpa")
    text, seen = len(prompt) - prompt.retained, [prompt.retained] * lab.layers
    for step in steps:
        seen[step.layer :] = [step.keep] * (lab.layers - step.layer)
    assert lengths == [text + count for count in seen]
    assert min(seen) < max(seen) == 144
    sizes = PromptSizes(len(prompt), prompt.retained, len(prompt) - prompt.prefix, shape)
    left = [prompt.retained, *(step.keep for step in steps)]
    own = sum(pruner.step_flops(step, before, sizes) for step, before in zip(steps, left, strict=False))
    choosing = flops - sum(map(shape.layer_flops, lengths)) - shape.head_flops()
    assert 0 <= choosing <= own < 0.05 * shape.prefill_flops(len(prompt))
    if name in ("fastv", "pyramiddrop"):  # a row of attention, which is products
        assert choosing == own
    assert flops < shape.prefill_flops(len(prompt))


@pytest.mark.parametrize("name", LAYER_METHODS)
def test_methods_in_layers_hold_no_attention_of_all_pairs_and_no_more_memory(lab, prompt, name):
    heads = lab.model.config.get_text_config().num_attention_heads
    embeds, mask, _ = left_pad([prompt])
    with LiveBytes() as whole, torch.inference_mode():
        lab.model(inputs_embeds=embeds, attention_mask=mask, use_cache=True, logits_to_keep=1)
    with LiveBytes() as pruned:
        prefill(lab, make_pruner(name, budget=Budget.tokens(58)), prompt)
    assert pruned.largest == whole.largest < heads * len(prompt) ** 2
    assert pruned.peak <= 1.01 * whole.peak


def test_live_bytes_are_those_of_tensors_that_are_alive():
    with LiveBytes() as live:
        first = torch.zeros(1000)  # 4 kB
        second = first + 1
        del first
        view = second.view(10, 100)[2:]
        del second  # alive through its view
        third = torch.cat([view, view])  # 6.4 kB
        del view, third
        torch.zeros(500)
    assert (live.peak, live.largest) == (4000 + 6400, 1600)


# The table


def test_a_table_has_medians_formulas_and_bytes_of_one_question(family):
    images = [tiny.random_image(number) for number in range(4)]
    fastv = {"budget": Budget.tokens(5), "preset": "paper"}
    chosen = [("none", make_pruner("none")), ("random", make_pruner("random", budget=Budget.tokens(5))),
              ("downsample", make_pruner("downsample", budget=Budget.tokens(4))),
              ("fastv", make_pruner("fastv", budget=Budget.tokens(5))),
              ("fastv:paper", make_pruner("fastv", **fastv))]  # fmt: skip
    before = family.model.generation_config.eos_token_id
    table, facts = bench(family, chosen, images, new_tokens=3, batch_size=2, repeats=2)
    assert family.model.generation_config.eos_token_id == before
    assert (facts["attention"]["language model"], facts["dtype"], facts["new_tokens"]) == ("sdpa", "float32", 3)
    assert facts["matmul_tflops_per_second"] > 0
    assert table["batch"].tolist() == [1, 2] * 5
    rows = table[table["batch"] == 2].set_index("method")
    shape = DecoderShape.of(family.model.config)
    text = rows["prompt_tokens"]["none"] - 16
    lengths = {"none": [16] * 4, "random": [5] * 4, "downsample": [4] * 4, "fastv": [16, 16, 5, 5],
               "fastv:paper": [16, 16, 5, 5]}  # fmt: skip
    per_layer = shape.kv_bytes_per_token(4) / 4
    for name, own in lengths.items():
        own = [text + count for count in own]
        flops = sum(map(shape.layer_flops, own)) + shape.head_flops()
        assert rows["prefill_gflops"][name] == pytest.approx(flops / 1e9)
        assert rows["kv_mb"][name] == pytest.approx(sum(n + 2 for n in own) * per_layer / 1e6)
        assert rows["prefill_fastv_gmacs"][name] == pytest.approx(sum(map(shape.fastv_paper_macs, own)) / 1e9)
        decoded = shape.decode_flops(statistics.fmean(own), 3)
        if name == "fastv":  # as released, every token prunes the prompt anew
            decoded = sum(shape.head_flops() + sum(shape.layer_flops(n + new) for n in own) for new in (1, 2))
        assert rows["decode_gflops"][name] == pytest.approx(decoded / 1e9)
    vision = family.model.config.vision_config
    blocks = vision.num_hidden_layers - 1  # the last one's output is not read
    towers = [tower_flops(vision, n, True, blocks) + projector_flops(n, 32, family.width) for n in (16, 4)]
    assert rows["tower_gflops"][["none", "downsample"]].tolist() == pytest.approx([own / 1e9 for own in towers])
    assert rows["method_gflops"]["none"] == rows["method_gflops"]["random"] == 0
    assert rows["method_gflops"]["fastv"] == pytest.approx(shape.rows_flops(1, text + 16) / 1e9)
    stages = [f"{stage}_ms" for stage in ("open", "tower", "choose", "pack", "prefill", "decode")]
    assert (rows[stages].sum(axis=1) <= rows["total_ms"] * 1.5).all()  # medians of two
    assert (rows["first_token_ms"] > rows["prefill_ms"]).all()
    assert rows["questions_per_second"].tolist() == pytest.approx((1e3 / rows["total_ms"]).tolist())
    assert rows["peak_mb"]["fastv:paper"] <= rows["peak_mb"]["none"]
    assert [len(own["seconds"]) for own in facts["samples"]] == [2] * 10


@pytest.mark.parametrize("name", ["fastv", "sparsevlm", "dart"])
def test_layers_of_an_image_in_tiles_see_what_the_ledger_says(tmp_path, name):
    tiled = load_family(str(tiny_next.save_next(tmp_path)))
    pruner = make_pruner(name, budget=Budget.tokens(9))
    row = Session(tiled, pruner).answer([said()], max_new_tokens=1)[0].row
    assert row.visual_views == 5
    seen = tokens_by_layer(pruner, row, tiled.layers)
    text = row.input_tokens - row.visual_native
    assert statistics.fmean(seen) - text == row.visual_layer_average < row.visual_native
    assert seen[-1] - text == row.visual_kept


def test_a_budget_that_a_method_cannot_meet_costs_the_others_nothing(family):
    chosen = [(name, make_pruner(name, budget=Budget.tokens(3))) for name in ("random", "pyramiddrop")]
    table, facts = bench(family, chosen, [tiny.random_image(0)], new_tokens=1, batch_size=1, repeats=1)
    assert table["method"].tolist() == ["random"]
    (left_out,) = facts["left_out"]
    assert (left_out["method"], left_out["budget"]) == ("pyramiddrop", "tokens=3")
    assert "none of its shares" in left_out["reason"]


def test_a_batch_that_this_machine_cannot_hold_is_said(family, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(family.model, "generate", full)
    with pytest.raises(UserError, match="a batch of 1"):
        bench(family, [("none", make_pruner("none"))], [tiny.random_image(0)], batch_size=1, repeats=1)
    assert matmul_flops(family, 1) > 0


def test_the_command_writes_a_table_with_controls_and_says_what_it_measured(small_shape, tmp_path):
    options = ["--shape", "small", "--methods", "rcb,fastv:paper", "--keep", 5, "--new-tokens", 2, "--repeats", 1,
               "--batch-size", 2, "--out", tmp_path / "bench"]  # fmt: skip
    result = CliRunner().invoke(app, ["bench", *map(str, options)], catch_exceptions=False)
    assert result.exit_code == 0
    table = pd.read_csv(tmp_path / "bench.tsv", sep="\t")
    assert table["method"].unique().tolist() == ["none", "random", "stride", "downsample", "rcb", "fastv:paper"]
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["model"] == "random weights in the shape of small"
    assert written["machine"]["cores"] > 0
    assert len(written["rows"]) == len(table) == 12
    rcb = table[(table["method"] == "rcb") & (table["batch"] == 1)].iloc[0]
    assert rcb["method_gflops"] == pytest.approx(2 * 16 * 12 * 48 / 1e9, rel=1e-4)
    assert "answers of 2 tokens" in result.output
