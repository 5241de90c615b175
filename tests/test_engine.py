import pytest
import tiny
import torch

from rcb_lmms.budget import Budget
from rcb_lmms.cost import DecoderShape
from rcb_lmms.engine.encoding import ImageEncoder
from rcb_lmms.engine.generation import end_tokens, generate, out_of_memory
from rcb_lmms.engine.layer_pruning import prune_at_layer
from rcb_lmms.engine.prefill import Prefill
from rcb_lmms.errors import UserError
from rcb_lmms.families.images import Visual, content_key
from rcb_lmms.pruners import PRUNERS, make_pruner

OPTIONS = {"max_new_tokens": 6, "do_sample": False}


def prompts_of(family, counts):
    """Ragged prompts: one image each, of which `counts` tokens stay."""
    prompts = []
    for seed, count in enumerate(counts):
        ((view,),) = family.encode([tiny.random_image(seed)])
        pruner = make_pruner("random", budget=Budget.tokens(count))
        packed = family.pack_selected([view], [pruner.choose(view)])
        prompts.append(family.embed(family.prompt("Why" + "?" * seed), [packed]))
    return prompts


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_prompts_behind_a_prefill_have_the_logits_of_whole_prompts_in_the_order_given(family, batch_size):
    """Rows of the first prompt, from none to all, then others; every second prompt is read one token later."""
    first, *others = [prompt.embeds for prompt in prompts_of(family, [16, 3, 9, 1, 12])]
    shared = [0, 17, 5, 17, len(first), 5, 0, 2]
    rests = [others[row % 4][: 1 + row % 3 * 2] for row in range(8)]
    prefill = Prefill(family, first)
    told = {}

    def more(rows, tokens):
        told.update(zip(rows, tokens, strict=True))
        return [row % 2 == 1 for row in rows]

    found = prefill.continued(shared, rests, batch_size, more)

    def alone(embeds):
        with torch.inference_mode():
            return family.model(inputs_embeds=embeds[None]).logits[0, -1]

    torch.testing.assert_close(prefill.logits, alone(first), rtol=0, atol=2e-5)
    for row, (count, rest) in enumerate(zip(shared, rests, strict=True)):
        whole = torch.cat([first[:count], rest])
        assert told[row] == int(alone(whole).argmax())
        if row % 2:
            table = family.model.get_input_embeddings().weight.detach()
            whole = torch.cat([whole, table[told[row]][None]])
        torch.testing.assert_close(found[row], alone(whole), rtol=0, atol=2e-5)
    assert not any(module._forward_pre_hooks for module in family.model.modules())


@pytest.mark.parametrize("method", ["none", "fastv"])
def test_batches_generate_what_single_prompts_do(family, method):
    prompts = prompts_of(family, [16, 8, 12, 5])
    layer_pruner = make_pruner("fastv", budget=Budget.ratio(0.5)) if method == "fastv" else None
    together = generate(family, prompts, OPTIONS, layer_pruner)
    for index, prompt in enumerate(prompts):
        alone = generate(family, [prompt], OPTIONS, layer_pruner)
        assert alone.texts == [together.texts[index]]
        assert alone.output_tokens == [together.output_tokens[index]]
    assert [[step.keep for step in own] for own in together.steps] == (
        [[8], [4], [6], [2]] if layer_pruner else [[]] * 4
    )
    assert len(set(together.texts)) > 1


def test_all_tokens_generate_what_the_unpruned_model_does(family):
    for seed in range(3):
        image, text = tiny.random_image(seed), "Why" + "?" * seed
        content = [{"type": "image"}, {"type": "text", "text": text}]
        prompt = family.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = family.processor(images=image, text=prompt, return_tensors="pt")
        ids = family.model.generate(**inputs, **OPTIONS)[:, inputs["input_ids"].shape[1] :]
        ours = generate(
            family,
            [family.embed(family.prompt(text), [family.pack_base(family.encode([image])[0][0].features)])],
            OPTIONS,
        )
        assert ours.texts == family.tokenizer.batch_decode(ids, skip_special_tokens=True)


def test_an_image_is_encoded_once_and_chosen_from_once(family):
    encoder = ImageEncoder(family, frozenset(), batch_size=2)
    images = [tiny.random_image(seed) for seed in (0, 1, 0, 2, 1)]
    visuals = [Visual((image,)) for image in images]
    keys = [content_key(image) for image in images]
    calls = []

    class Counting(PRUNERS["random"]):
        def select(self, view, question=None):
            calls.append(view.key)
            return super().select(view)

    pruner = Counting(budget=Budget.tokens(4))
    first = encoder.packed(visuals, pruner)
    second = encoder.packed(visuals[:2], pruner)
    assert encoder.encoded_images == 3
    assert sorted(calls) == sorted(set(keys))
    assert torch.equal(first[0].embeds, first[2].embeds)
    assert torch.equal(first[1].embeds, second[1].embeds)
    assert [(packed.native, packed.retained) for packed in first] == [(16, 4)] * 5


def test_results_do_not_depend_on_what_the_store_forgot(family):
    visuals = [Visual((tiny.random_image(seed),)) for seed in (0, 1, 2, 0, 1)]
    pruner = make_pruner("random", budget=Budget.tokens(4))
    large, none = ImageEncoder(family, frozenset()), ImageEncoder(family, frozenset(), store_bytes=0)
    for a, b in zip(large.packed(visuals, pruner), none.packed(visuals, pruner), strict=True):
        torch.testing.assert_close(a.embeds, b.embeds, rtol=0, atol=1e-5)


def test_the_vision_batch_is_halved_when_memory_runs_out(family, monkeypatch):
    sizes, encode = [], family.encode

    def tight(images, needs=(), size=None):
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(images, needs, size)

    monkeypatch.setattr(family, "encode", tight)
    encoder = ImageEncoder(family, frozenset(), batch_size=8)
    visuals = [Visual((tiny.random_image(seed),)) for seed in range(5)]
    views = encoder.views(visuals)
    assert [own[0].key for own in views] == [visual.key for visual in visuals]
    assert sizes == [5, 2, 3, 1, 2]
    assert encoder.batch_size <= 2


def test_what_counts_as_out_of_memory():
    assert out_of_memory(torch.OutOfMemoryError("x"))
    assert out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"))
    assert not out_of_memory(RuntimeError("shapes differ"))


def test_prefill_flops_are_what_torch_counts(tiny_llama):
    from torch.utils.flop_counter import FlopCounterMode

    n, config = 37, tiny_llama.config
    model = tiny_llama.to("meta")
    counter = FlopCounterMode(display=False)
    with counter:
        model.model(inputs_embeds=torch.zeros(1, n, config.hidden_size, device="meta"))
    assert DecoderShape.of(config).prefill_flops(n) == counter.get_total_flops()


def test_costs_of_the_full_size_models():
    vicuna = DecoderShape(layers=32, d=4096, m=11008, heads=32, kv_heads=32, head_width=128)
    llama3 = DecoderShape(layers=32, d=4096, m=14336, heads=32, kv_heads=8, head_width=128)
    qwen2 = DecoderShape(layers=28, d=3584, m=18944, heads=28, kv_heads=4, head_width=128)
    tera = [
        shape.prefill_flops(visual + 60) / 1e12
        for shape, visual in ((vicuna, 576), (vicuna, 144), (vicuna, 64), (llama3, 2880), (qwen2, 576))
    ]
    assert [round(value, 2) for value in tera] == [8.45, 2.66, 1.61, 45.57, 8.46]
    assert [shape.kv_bytes_per_token() for shape in (vicuna, llama3, qwen2)] == [524288, 131072, 57344]
    # FastV's printed table: the average of one layer, 36 + 576 tokens, all of them in the first two of 32 layers.
    full, half = vicuna.fastv_paper_macs(612), vicuna.fastv_paper_macs(36 + 288)
    assert round(full / 1e9, 1) == 99.3
    assert round((2 * full + 30 * half) / 32 / 1e9, 1) == 54.8
    assert vicuna.prefill_flops(612, 2, 324) == 2 * vicuna.layer_flops(612) + 30 * vicuna.layer_flops(324)


@torch.inference_mode()
def test_fastv_prunes_anew_at_every_token_as_released_or_once(family):
    """Against a loop that runs the whole sequence for each token, with the eager row of attention and a mask."""
    model, layer, keep = family.model, 2, 3
    prompts = prompts_of(family, [16, 12])
    options = OPTIONS

    def literal(prompt):
        embeds, found = prompt.embeds[None], []
        ((start, stop),) = prompt.spans
        for _ in range(6):
            model.set_attn_implementation("eager")
            rows = model(inputs_embeds=embeds, output_attentions=True, use_cache=False).attentions[layer - 1]
            model.set_attn_implementation("sdpa")
            row = rows[0, :, -1, start:stop].mean(0)
            stays = {start + index for index in row.topk(keep).indices.tolist()}
            found.append(stays)
            spans = [[(place, place + 1) for place in range(start, stop) if place not in stays]]
            with prune_at_layer(model, layer=layer, keep=0, spans=spans, mode="mask"):
                token = model(inputs_embeds=embeds, use_cache=False).logits[0, -1].argmax()
            yield int(token), found
            if int(token) in end_tokens(family):
                return
            embeds = torch.cat([embeds, model.get_input_embeddings()(token)[None, None]], 1)

    official = make_pruner("fastv", budget=Budget.tokens(keep))
    together = generate(family, prompts, options, official)
    changed = set()
    for index, prompt in enumerate(prompts):
        tokens, kept = zip(*literal(prompt), strict=True)
        assert together.texts[index] == family.tokenizer.decode(tokens, skip_special_tokens=True)
        start = prompt.spans[0][0]
        assert [start + place for place in together.layer_kept[index].tolist()] == sorted(kept[0][0])
        changed.update(map(frozenset, kept[-1]))
    assert len(changed) > len(prompts)  # some token did prune anew
    once = generate(family, prompts, options, make_pruner("fastv", budget=Budget.tokens(keep), preset="paper"))
    assert [texts[:1] for texts in once.texts] == [texts[:1] for texts in together.texts]
    assert all(map(torch.equal, once.layer_kept, together.layer_kept))
    with pytest.raises(UserError, match="preset=paper"):
        generate(family, prompts, {**options, "num_beams": 2}, official)
