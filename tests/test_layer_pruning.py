"""Pruning between layers, against eager attention, a loop over the layers, and the unpruned model."""

from __future__ import annotations

import flash
import pytest
import torch

from rcb_lmms.engine.layer_pruning import prune_at_layer, prune_in_layers
from rcb_lmms.errors import UserError

pytestmark = pytest.mark.usefixtures("flash_on_cpu")
LENGTH, NEW = 14, 6
SPANS = [(2, 9), (5, 12)]  # in the batch, whose second row has three positions of padding
KEEP = 3


@pytest.fixture(params=["llama", "qwen2"])
def model(request):
    return request.getfixturevalue(f"tiny_{request.param}")


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 95, (2, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, **inputs):
    return model.generate(**inputs, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW)


def row(batch, index, start=0):
    return {name: value[index : index + 1, start:] for name, value in batch.items()}


def count_hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def reference(model, ids, steps, span, contiguous=False, prompt=None):
    """One prompt through the layers by hand: eager rows, sort, gather, rotary positions, causal mask.

    Returns logits, and what every step keeps by the attention of position `prompt - 1`; what follows it was decoded.
    """
    decoder, steps, kept = model.get_decoder(), dict(steps), []
    hidden, where, left = decoder.embed_tokens(ids), list(range(ids.shape[1])), list(range(*span))
    numbers, last = where, (prompt or ids.shape[1]) - 1
    model.set_attn_implementation("eager")
    for index, block in enumerate(decoder.layers):
        if index in steps:
            left = sorted(sorted(left, key=lambda i: (-row[where.index(i)], i))[: steps[index]])
            kept.append(left)
            stays = [p for p, i in enumerate(where) if i not in range(*span) or i in left]
            hidden, where, numbers = hidden[:, stays], [where[p] for p in stays], [numbers[p] for p in stays]
            numbers = list(range(len(where))) if contiguous else numbers
        causal = torch.full((len(where), len(where)), torch.finfo(hidden.dtype).min).triu(1)[None, None]
        positions = torch.tensor([numbers])
        own = {"attention_mask": causal, "position_embeddings": decoder.rotary_emb(hidden, positions)}
        row = block.self_attn(block.input_layernorm(hidden), **own)[1][0, :, where.index(last)].mean(0).tolist()
        hidden = block(hidden, position_ids=positions, **own)
    return model.lm_head(decoder.norm(hidden)), kept


def test_scores_are_the_last_row_of_eager_attention(model, batch):
    for implementation in ("eager", "sdpa"):
        for layer in (1, 2, 3):
            model.set_attn_implementation("eager")
            rows = model(**batch, output_attentions=True).attentions[layer - 1][:, :, -1].mean(1)
            model.set_attn_implementation(implementation)
            with prune_at_layer(model, layer=layer, keep=KEEP, spans=SPANS) as pruning:
                model(**batch)
            for index, (start, stop) in enumerate(SPANS):
                torch.testing.assert_close(pruning.scores[index], rows[index, start:stop], atol=1e-6, rtol=1e-5)
                best = rows[index, start:stop].topk(KEEP).indices.sort().values + start
                assert pruning.kept[index].tolist() == best.tolist()
                assert pruning.kept[index].dtype == torch.int64
                assert pruning.scores[index].dtype == torch.float32


@pytest.mark.parametrize("implementation", ["sdpa", "eager", flash.NAME])
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_drop_equals_a_loop_over_the_layers(model, batch, layer, implementation):
    ids = batch["input_ids"][:1]
    expected, (kept,) = reference(model, ids, [(layer, KEEP)], SPANS[0])
    model.set_attn_implementation(implementation)
    with prune_at_layer(model, layer=layer, keep=KEEP, spans=SPANS[0]) as pruning:
        logits = model(ids, use_cache=False).logits
    assert pruning.kept[0].tolist() == kept
    assert logits.shape == (1, LENGTH - 7 + KEEP, 96)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    assert (logits[0, -1] - model(ids).logits[0, -1]).abs().max() > 0.1  # pruning does change this model's answer


@pytest.mark.parametrize("implementation", ["sdpa", "eager", flash.NAME])
def test_mask_gives_the_logits_of_drop(model, batch, implementation):
    model.set_attn_implementation(implementation)
    outputs, tokens = {}, {}
    for mode in ("drop", "mask"):
        with prune_at_layer(model, layer=2, keep=KEEP, spans=SPANS, mode=mode) as pruning:
            outputs[mode] = model(**batch).logits
            tokens[mode] = generate(model, **batch)
    assert outputs["mask"].shape[1] == LENGTH
    stays = torch.ones(LENGTH, dtype=torch.bool)
    stays[slice(*SPANS[0])] = False
    stays[pruning.kept[0]] = True
    torch.testing.assert_close(outputs["drop"][0], outputs["mask"][0, stays], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(outputs["drop"][:, -1], outputs["mask"][:, -1], atol=2e-5, rtol=1e-4)
    assert torch.equal(tokens["drop"], tokens["mask"])


@pytest.mark.parametrize("implementation", ["sdpa", "eager", flash.NAME])
@pytest.mark.parametrize("mode", ["drop", "mask"])
def test_keeping_all_equals_the_unpruned_model(model, batch, implementation, mode):
    model.set_attn_implementation(implementation)
    expected, tokens = model(**batch).logits[:, -1], generate(model, **batch)
    with prune_at_layer(model, layer=2, keep=7, spans=SPANS, mode=mode) as pruning:
        torch.testing.assert_close(model(**batch).logits[:, -1], expected, atol=1e-6, rtol=1e-6)
        assert torch.equal(generate(model, **batch), tokens)
    assert [kept.tolist() for kept in pruning.kept] == [list(range(*span)) for span in SPANS]


@pytest.mark.parametrize("mode", ["drop", "mask"])
@pytest.mark.parametrize("by", ["input_ids", "inputs_embeds"])
def test_a_padded_batch_equals_its_rows_one_by_one(model, batch, by, mode):
    if by == "inputs_embeds":
        batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
    keep = [2, 4]
    with prune_at_layer(model, layer=2, keep=keep, spans=SPANS, mode=mode) as together:
        tokens = generate(model, **batch)[:, -NEW:]
    for index, (start, padding) in enumerate([(2, 0), (5, 3)]):
        span = (start - padding, start - padding + 7)
        with prune_at_layer(model, layer=2, keep=keep[index], spans=span, mode=mode) as alone:
            assert torch.equal(generate(model, **row(batch, index, padding))[0, -NEW:], tokens[index])
        assert together.kept[index].tolist() == (alone.kept[0] + padding).tolist()
        torch.testing.assert_close(together.scores[index], alone.scores[0], atol=1e-6, rtol=1e-4)


SCHEDULES = [[(1, 5), (3, 2)], [(1, 6), (2, 4), (3, 1)], [(2, 5), (3, 0)]]


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("steps", SCHEDULES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager", flash.NAME])
def test_a_schedule_equals_a_loop_over_the_layers_and_decodes_with_its_cache(
    model, batch, steps, positions, implementation
):
    ids, more = batch["input_ids"][:1], torch.tensor([[7, 8, 9]])
    contiguous = positions == "contiguous"
    expected, kept = reference(model, torch.cat([ids, more], 1), steps, SPANS[0], contiguous, prompt=LENGTH)
    model.set_attn_implementation(implementation)
    with prune_in_layers(model, steps=steps, spans=SPANS[0], positions=positions) as pruning:
        first = model(ids, use_cache=True)
        one = model(more[:, :1], past_key_values=first.past_key_values).logits
        rest = model(more[:, 1:], past_key_values=first.past_key_values).logits
    assert [step.kept[0].tolist() for step in pruning.steps] == kept
    assert first.logits.shape[1] == LENGTH - 7 + steps[-1][1]
    torch.testing.assert_close(torch.cat([first.logits, one, rest], 1), expected, atol=3e-5, rtol=1e-4)
    other = reference(model, torch.cat([ids, more], 1), steps, SPANS[0], not contiguous, prompt=LENGTH)[0]
    assert (other[0, -1] - expected[0, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_a_schedule_for_a_padded_batch_equals_its_rows_one_by_one(model, batch, positions):
    steps = [(1, [6, 3]), (2, [2, 3]), (3, [0, 1])]
    with prune_in_layers(model, steps=steps, spans=SPANS, positions=positions) as together:
        tokens = generate(model, **batch)[:, -NEW:]
    for index, padding in enumerate([0, 3]):
        span = tuple(end - padding for end in SPANS[index])
        own = [(layer, keep[index]) for layer, keep in steps]
        with prune_in_layers(model, steps=own, spans=span, positions=positions) as alone:
            assert torch.equal(generate(model, **row(batch, index, padding))[0, -NEW:], tokens[index])
        for both, single in zip(together.steps, alone.steps, strict=True):
            assert both.kept[index].tolist() == (single.kept[0] + padding).tolist()
            torch.testing.assert_close(both.scores[index], single.scores[0], atol=1e-6, rtol=1e-4)


def test_a_schedule_by_masks_gives_the_logits_of_drop(model, batch):
    outputs = {}
    for mode in ("drop", "mask"):
        with prune_in_layers(model, steps=[(1, 5), (3, 2)], spans=SPANS, mode=mode):
            outputs[mode] = model(**batch).logits[:, -1], generate(model, **batch)
    torch.testing.assert_close(outputs["drop"][0], outputs["mask"][0], atol=2e-5, rtol=1e-4)
    assert torch.equal(outputs["drop"][1], outputs["mask"][1])


def test_caches_hold_what_each_layer_sees(model, batch):
    with prune_at_layer(model, layer=2, keep=KEEP, spans=SPANS):
        cache = model(**batch, use_cache=True).past_key_values
        assert [layer.keys.shape[2] for layer in cache.layers] == [14, 14, 10, 10]
        step = {"input_ids": torch.tensor([[7], [8]]), "past_key_values": cache}
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        model(**step, attention_mask=mask)
    assert [layer.keys.shape[2] for layer in cache.layers] == [15, 15, 11, 11]


def test_cached_decoding_equals_one_pass_over_the_longer_prompt(model, batch):
    """With the same tokens pruned by masks: positions continue past the pruned ones."""
    ids, more = batch["input_ids"][:1], torch.tensor([[7, 8, 9]])
    with prune_at_layer(model, layer=2, keep=KEEP, spans=SPANS[0]) as pruning:
        cache = model(ids, use_cache=True).past_key_values
        one = model(more[:, :1], past_key_values=cache).logits
        rest = model(more[:, 1:], past_key_values=cache).logits  # two at once: causal among themselves
    kept = pruning.kept[0].tolist()
    dropped = [p for p in range(*SPANS[0]) if p not in kept]
    decoder, full = model.get_decoder(), torch.cat([ids, more], 1)
    hidden, positions = decoder.embed_tokens(full), torch.arange(full.shape[1])[None]
    for index, block in enumerate(decoder.layers):
        allowed = torch.ones(full.shape[1], full.shape[1]).tril().bool()
        if index >= 2:
            allowed[:, dropped] = False
        hidden = block(
            hidden,
            attention_mask=allowed[None, None] | torch.eye(full.shape[1]).bool(),
            position_embeddings=decoder.rotary_emb(hidden, positions),
            position_ids=positions,
        )
    expected = model.lm_head(decoder.norm(hidden))[:, -3:]
    torch.testing.assert_close(torch.cat([one, rest], 1), expected, atol=2e-5, rtol=1e-4)


def test_without_a_cache_every_step_prunes_anew(tiny_llama, batch):
    ids = batch["input_ids"][:1]
    with prune_at_layer(tiny_llama, layer=2, keep=KEEP, spans=SPANS[0]) as pruning:
        tokens = generate(tiny_llama, input_ids=ids, use_cache=False)
        latest = pruning.kept[0]
    expected = ids
    for _ in range(NEW):
        logits, (kept,) = reference(tiny_llama, expected, [(2, KEEP)], SPANS[0])
        logits[:, -1, 2] = -torch.inf  # min_new_tokens forbids the end
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(tokens, expected)
    assert latest.tolist() == kept


def test_a_second_prefill_starts_anew(model, batch):
    lone = row(batch, 0)
    with prune_at_layer(model, layer=2, keep=KEEP, spans=SPANS[0]) as pruning:
        expected = generate(model, **lone)
        kept = pruning.kept
    with prune_at_layer(model, layer=2, keep=KEEP, spans=SPANS[0]) as pruning:
        generate(model, input_ids=lone["input_ids"].flip(1))
        assert torch.equal(generate(model, **lone), expected)
    assert torch.equal(pruning.kept[0], kept[0])


def test_an_inner_block_suspends_the_outer_one(model, batch):
    lone = row(batch, 0)
    with prune_at_layer(model, layer=2, keep=KEEP, spans=SPANS[0]) as outer:
        expected = generate(model, **lone)
        seen = outer.kept
        with prune_at_layer(model, layer=1, keep=7, spans=SPANS[0]) as inner:
            unpruned = generate(model, **lone)
        assert outer.kept is seen
        assert torch.equal(generate(model, **lone), expected)
    assert len(inner.kept[0]) == 7
    assert torch.equal(unpruned, generate(model, **lone))


def test_hooks_leave_with_the_block(tiny_llama, batch):
    before = count_hooks(tiny_llama)
    with prune_at_layer(tiny_llama, layer=2, keep=KEEP, spans=SPANS):
        assert count_hooks(tiny_llama) == before + 4
        with prune_at_layer(tiny_llama, layer=1, keep=KEEP, spans=SPANS):
            assert count_hooks(tiny_llama) == before + 5
        assert count_hooks(tiny_llama) == before + 4
    assert count_hooks(tiny_llama) == before
    with pytest.raises(UserError), prune_at_layer(tiny_llama, layer=2, keep=8, spans=SPANS):
        tiny_llama(**batch)
    assert count_hooks(tiny_llama) == before


def test_several_spans_and_rows_without_any(model, batch):
    batch["attention_mask"][1, :3] = 1
    spans, keep = [[(1, 4), (7, 10)], []], [2, 0]
    with prune_at_layer(model, layer=2, keep=keep, spans=spans) as pruning:
        tokens = generate(model, **batch)
    assert [len(scores) for scores in pruning.scores] == [6, 0]
    assert set(pruning.kept[0].tolist()) < {1, 2, 3, 7, 8, 9}
    assert pruning.kept[1].tolist() == []
    assert torch.equal(tokens[1:], generate(model, **row(batch, 1)))


def test_ties_go_to_the_earlier_position(tiny_llama):
    with torch.no_grad():
        tiny_llama.model.layers[1].self_attn.q_proj.weight.zero_()  # every position gets the same attention
    with prune_at_layer(tiny_llama, layer=2, keep=2, spans=(3, 8)) as pruning:
        tiny_llama(torch.arange(3, 13)[None])
    assert pruning.kept[0].tolist() == [3, 4]
    torch.testing.assert_close(pruning.scores[0], torch.full((5,), 0.1))


def test_query_and_key_norms_are_applied(batch):
    from conftest import TEXT_SIZES
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(Qwen3Config(**TEXT_SIZES, head_dim=8)).eval()
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.q_norm.weight.uniform_(0.5, 3)
            block.self_attn.k_norm.weight.uniform_(0.5, 3)
    model.set_attn_implementation("eager")
    rows = model(**batch, output_attentions=True).attentions[1][:, :, -1].mean(1)
    with prune_at_layer(model, layer=2, keep=KEEP, spans=SPANS) as pruning:
        model(**batch)
    torch.testing.assert_close(pruning.scores[0], rows[0, 2:9], atol=1e-6, rtol=1e-5)


def test_a_nested_decoder_is_found_and_the_image_pruned(tiny_llava):
    ids = torch.cat([torch.tensor([[1, 9]]), torch.full((1, 16), 95), torch.tensor([[11, 12, 13]])], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 28, 28)}
    unpruned = generate(tiny_llava, **inputs)
    with prune_at_layer(tiny_llava, layer=2, keep=16, spans=(2, 18)):
        assert torch.equal(generate(tiny_llava, **inputs), unpruned)
    with prune_at_layer(tiny_llava, layer=2, keep=4, spans=(2, 18)) as pruning:
        output = tiny_llava(**inputs, use_cache=True)
    assert [layer.keys.shape[2] for layer in output.past_key_values.layers] == [21, 21, 9, 9]
    assert len(pruning.kept[0]) == 4


def test_half_precision_is_finite(tiny_llama, batch):
    model = tiny_llama.to(torch.bfloat16)
    with prune_at_layer(model, layer=2, keep=KEEP, spans=SPANS) as pruning:
        logits = model(**batch).logits
    assert logits[0].isfinite().all()
    assert pruning.scores[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"layer": 0}, "decoder of 4 layers"),
        ({"layer": 4}, "1 to 3 full layers"),
        ({"keep": 8}, "rows of 7, 7 candidates"),
        ({"keep": -1}, "-1 retained tokens"),
        ({"keep": [3]}, "per row"),
        ({"mode": "zero"}, "drop, mask"),
        ({"spans": [(2, 9)]}, "spans for 1 rows, a batch of 2"),
        ({"spans": (2, 15)}, "a prompt of 14 positions"),
        ({"spans": (2, 9)}, "of which 3 are padding"),
    ],
)
def test_refusals(tiny_llama, batch, options, text):
    settings = {"layer": 2, "keep": KEEP, "spans": SPANS} | options
    with pytest.raises(UserError, match=text), prune_at_layer(tiny_llama, **settings):
        tiny_llama(**batch)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"steps": []}, "there are none"),
        ({"steps": [(2, 3), (2, 1)]}, "by rising layer"),
        ({"steps": [(3, 3), (1, 1)]}, "by rising layer"),
        ({"steps": [(1, 3), (4, 1)]}, "decoder of 4 layers"),
        ({"steps": [(1, 3), (2, 4)]}, "rows of 3, 3 candidates"),
        ({"positions": "contiguous", "mode": "mask"}, "contiguous with mode=drop"),
        ({"positions": "new"}, "original, or contiguous"),
    ],
)
def test_schedules_that_cannot_be_met_are_refused(tiny_llama, batch, options, text):
    settings = {"steps": [(2, KEEP)], "spans": SPANS} | options
    with pytest.raises(UserError, match=text), prune_in_layers(tiny_llama, **settings):
        tiny_llama(**batch)


def test_inputs_that_cannot_be_pruned_are_refused(tiny_llama, batch):
    from transformers import DynamicCache, StaticCache

    ids = batch["input_ids"]
    settings = {"layer": 2, "keep": KEEP, "spans": (3, 10)}
    filled = tiny_llama(ids, use_cache=True).past_key_values
    cases = [
        ({"attention_mask": torch.ones(2, 1, 14, 14, dtype=torch.bool)}, "4 dimensions"),
        ({"attention_mask": batch["attention_mask"].flip(1)}, "left padding"),
        ({"past_key_values": StaticCache(config=tiny_llama.config, max_cache_len=32)}, "StaticCache"),
        ({"past_key_values": filled}, "14 positions that was filled elsewhere"),
    ]
    for inputs, text in cases:
        with pytest.raises(UserError, match=text), prune_at_layer(tiny_llama, **settings):
            tiny_llama(ids, **inputs)
    with prune_at_layer(tiny_llama, **settings) as pruning:
        tiny_llama(ids, past_key_values=DynamicCache(config=tiny_llama.config))  # an empty one is a prefill
    assert len(pruning.kept) == 2


def test_models_without_a_known_decoder_are_refused(tiny_llama):
    from conftest import TEXT_SIZES
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sliding = Qwen2Config(**TEXT_SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=2)
    cases = [
        (torch.nn.Linear(2, 2), "Linear"),
        (Qwen2ForCausalLM(sliding), "sliding_attention"),
    ]
    for model, text in cases:
        with pytest.raises(UserError, match=text), prune_at_layer(model, layer=2, keep=1, spans=(0, 2)):
            pass
    tiny_llama.set_attn_implementation("flex_attention")
    with pytest.raises(UserError, match="flex_attention"), prune_at_layer(tiny_llama, layer=2, keep=1, spans=(0, 2)):
        pass
