"""Methods inside the decoder against a literal decoder of one prompt: scores, what stays, logits, decoding."""

from __future__ import annotations

import math

import flash
import pytest
import torch
from test_methods import counted

from rcb_lmms.budget import Budget
from rcb_lmms.cost import DecoderShape
from rcb_lmms.engine.generation import prune_prompts
from rcb_lmms.errors import BudgetError, UserError
from rcb_lmms.pruners import make_pruner
from rcb_lmms.pruners.schedules import layers_of, mean_tokens
from rcb_lmms.pruners.sparsevlm import merge
from rcb_lmms.pruners.tokens import PromptSizes

LAYERS, WIDTH, SPAN = 4, 32, (3, 27)
LENGTHS = (36, 33)


class Literal:
    """A Llama- or Qwen2-like decoder, token lists in place of tensors' tricks; `prune` is called before every layer."""

    def __init__(self, model):
        self.model, self.decoder = model, model.model
        self.blocks = list(self.decoder.layers)

    def probabilities(self, block, hidden, positions, normed=None):
        """`(heads, m, m)` causal attention of a block for its input, and its rotated keys `(heads, m, e)`."""
        own = block.self_attn
        normed = block.input_layernorm(hidden) if normed is None else normed
        query, key, _ = self.projected(own, normed, positions)
        logits = (query @ key.mT * own.scaling).masked_fill(
            torch.ones(len(hidden), len(hidden)).triu(1).bool(), -torch.inf
        )
        return logits.softmax(-1), key

    def rope(self, hidden, positions):
        cosine, sine = self.decoder.rotary_emb(hidden[None], torch.tensor([positions]))
        return cosine[0], sine[0]

    def projected(self, own, normed, positions):
        cosine, sine = self.rope(normed, positions)
        parts = []
        for project in (own.q_proj, own.k_proj, own.v_proj):
            states = project(normed).unflatten(-1, (-1, own.head_dim)).transpose(0, 1)
            parts.append(states.repeat_interleave(4 // len(states), 0))
        half = own.head_dim // 2
        query, key = (x * cosine + torch.cat([-x[..., half:], x[..., :half]], -1) * sine for x in parts[:2])
        return query, key, parts[2]

    def layer(self, index, hidden, positions, caches):
        block = self.blocks[index]
        query, key, value = self.projected(block.self_attn, block.input_layernorm(hidden), positions)
        if index in caches:
            key, value = torch.cat([caches[index][0], key], 1), torch.cat([caches[index][1], value], 1)
        caches[index] = key, value
        old = key.shape[1] - len(hidden)
        later = torch.ones(len(hidden), key.shape[1]).triu(1 + old).bool()
        weights = (query @ key.mT * block.self_attn.scaling).masked_fill(later, -torch.inf).softmax(-1)
        hidden = hidden + block.self_attn.o_proj((weights @ value).transpose(0, 1).flatten(1))
        return hidden + block.mlp(block.post_attention_layernorm(hidden))

    @torch.inference_mode()
    def run(self, embeds, prune, contiguous, tokens=4):
        """Logits of the last prompt token and of each decoded one, and the ids."""
        hidden, positions, caches = embeds, list(range(len(embeds))), {}
        visual = list(range(*SPAN))
        history = []
        for index in range(LAYERS):
            if (pruned := prune(self, index, hidden, positions, visual, history)) is not None:
                hidden, keep, visual = pruned
                positions = list(range(len(hidden))) if contiguous else [positions[i] for i in keep]
            history.append(hidden)
            hidden = self.layer(index, hidden, positions, caches)
        logits = [self.model.lm_head(self.decoder.norm(hidden))[-1]]
        ids = [self.next(logits[0])]
        for step in range(tokens - 1):
            hidden = self.model.get_input_embeddings()(torch.tensor(ids[-1:]))
            for index in range(LAYERS):
                place = caches[index][0].shape[1] if contiguous else len(embeds) + step
                hidden = self.layer(index, hidden, [place], caches)
            logits.append(self.model.lm_head(self.decoder.norm(hidden))[-1])
            ids.append(self.next(logits[-1]))
        return torch.stack(logits), ids

    def next(self, logits):
        """The likeliest token that does not end the answer."""
        return int(logits.index_fill(0, torch.tensor([self.model.config.eos_token_id]), -torch.inf).argmax())


def best(scores, count):
    return sorted(sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[:count])


def without(hidden, visual, kept):
    """Hidden states, kept columns and new visual columns when `kept` of `visual` (indices into it) stay."""
    stay = {visual[i] for i in kept}
    keep = [i for i in range(len(hidden)) if i not in visual or i in stay]
    return hidden[keep], keep, [keep.index(i) for i in sorted(stay)]


def pyramiddrop(steps):
    counts = {step.layer: step.keep for step in steps}

    def prune(model, index, hidden, positions, visual, history):
        if index not in counts:
            return None
        rows, _ = model.probabilities(model.blocks[index], hidden, positions)
        return without(hidden, visual, best(rows[:, -1, visual].mean(0), counts[index]))

    return prune


def v2drop(steps):
    counts = {step.layer: step.keep for step in steps}

    def prune(model, index, hidden, positions, visual, history):
        if index not in counts:
            return None
        return without(hidden, visual, best((hidden - history[-1])[visual].norm(dim=1), counts[index]))

    return prune


def dart(steps, official):
    ((layer, keep),) = ((step.layer, step.keep) for step in steps)

    def prune(model, index, hidden, positions, visual, history):
        if index != layer:
            return None
        _, keys = model.probabilities(model.blocks[index - 1], history[-1], positions)
        lengths = keys.transpose(0, 1).flatten(1).abs().sum(1)
        text = list(range(visual[-1] + 1, len(hidden)))
        own = [visual[i] for i in sorted(range(len(visual)), key=lambda i: -float(lengths[visual[i]]))[:4]]
        words = sorted(text, key=lambda i: -float(lengths[i]))[:4]
        pivots = list(set(own + words)) if official else own + words
        rows = torch.nn.functional.normalize(model.decoder.norm(hidden), dim=1)
        left, kept = [i for i in visual if i not in own], list(own)
        for number, pivot in enumerate(pivots):
            take = (keep - 4) // 8 + ((keep - 4) % 8 if number == 7 else 0)
            taken = sorted(left, key=lambda i: float(rows[i] @ rows[pivot]))[:take]
            kept += taken
            left = [i for i in left if i not in taken]
        return without(hidden, visual, sorted(visual.index(i) for i in kept))

    return prune


def sparsevlm(steps, version, embeds):
    counts = {step.layer: step for step in steps}
    start, stop = SPAN
    likeness = (embeds[start:stop] @ embeds[stop:].T).softmax(1).mean(0)
    raters = len(embeds) - stop - (likeness > likeness.mean()).nonzero().flatten()  # from the end

    def prune(model, index, hidden, positions, visual, history):
        if index not in counts:
            return None
        attention, _ = model.probabilities(model.blocks[index - 1], history[-1], positions)
        rows = attention[:, [len(hidden) - int(back) for back in raters]]
        if version == "2.0":
            cosine, sine = model.rope(hidden, positions)
            half = cosine.shape[1] // 2
            ones = torch.ones_like(cosine)
            turned = ones * cosine + torch.cat([-ones[:, half:], ones[:, :half]], 1) * sine
            alone = (turned @ turned.T / math.sqrt(cosine.shape[1]))[[len(hidden) - int(back) for back in raters]]
            rows = rows / alone
            heads = sorted(range(4), key=lambda h: -float(rows[h][:, visual].sum()))[: round(4 * 14 / 32)]
            rows = rows[heads]
        scores = rows[:, :, visual].mean((0, 1))
        step = counts[index]
        kept = best(scores, step.ranked)
        if version == "2.0":
            return without(hidden, visual, kept)
        gone = [i for i in sorted(range(len(visual)), key=lambda i: (-float(scores[i]), i)) if i not in kept]
        recycled = hidden[[visual[i] for i in gone[: int(0.3 * len(gone)) + 1]]]
        count = int((int(0.3 * len(gone)) + 1) / 10) + 1
        merged = clustered(recycled, count)
        hidden = torch.cat([hidden[: visual[0]], hidden[[visual[i] for i in kept]], merged, hidden[visual[-1] + 1 :]])
        visual = list(range(visual[0], visual[0] + len(kept) + count))
        return hidden, None, visual

    return prune


def clustered(states, count, noise=None):
    """Means of clusters, as released; `noise` is drawn there, and here by default the order of the tokens."""
    distances = [[float((a - b).norm()) / math.sqrt(states.shape[1]) for b in states] for a in states]
    n = len(states)
    noise = noise or [1 - i / max(1, n - 1) for i in range(n)]
    density = [
        math.exp(-sum(d * d for d in sorted(row)[:count]) / count) + 1e-6 * noise[i] for i, row in enumerate(distances)
    ]
    most = max(map(max, distances))
    gap = [
        min([d for j, d in enumerate(row) if density[j] > density[i]], default=most) for i, row in enumerate(distances)
    ]
    centres = sorted(range(n), key=lambda i: -density[i] * gap[i])[:count]
    groups = [[] for _ in centres]
    for i in range(n):
        groups[min(range(count), key=lambda c: -1 if centres[c] == i else distances[i][centres[c]])].append(states[i])
    return torch.stack([torch.stack(group).sum(0) / (len(group) + 1e-6) for group in groups])


def test_the_order_of_tokens_stands_for_one_of_the_draws_of_the_released_noise():
    generator = torch.Generator().manual_seed(3)
    draws = [torch.rand(16, generator=generator).tolist() for _ in range(12)]
    same = {2: [], 3: [], 5: []}
    for count, found in same.items():
        for noise in draws:
            states = torch.randn(16, 8, generator=generator)
            made = merge(states, count)
            torch.testing.assert_close(made, clustered(states, count), atol=1e-5, rtol=1e-4)
            found.append(torch.allclose(made, clustered(states, count, noise), atol=1e-5, rtol=1e-4))
    # With two clusters the densest tokens are each other's neighbours, and the noise decides which one leads.
    assert 2 <= sum(same[2]) < len(draws)
    assert all(same[3] + same[5])


CASES = {
    "pyramiddrop": ({}, 10, lambda steps, embeds: pyramiddrop(steps)),
    "pyramiddrop-own-layers": ({"layers": "1-3"}, 14, lambda steps, embeds: pyramiddrop(steps)),
    "v2drop": ({}, 12, lambda steps, embeds: v2drop(steps)),
    "dart": ({}, 12, lambda steps, embeds: dart(steps, True)),
    "dart-exact": ({"preset": "paper", "layer": 1}, 15, lambda steps, embeds: dart(steps, False)),
    "sparsevlm": ({}, 12, lambda steps, embeds: sparsevlm(steps, "1.5", embeds)),
    "sparsevlm-2": ({"version": "2.0"}, 12, lambda steps, embeds: sparsevlm(steps, "2.0", embeds)),
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager", flash.NAME])
@pytest.mark.usefixtures("flash_on_cpu")
@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_qwen2"])
@pytest.mark.parametrize("case", CASES)
def test_a_padded_batch_equals_the_literal_decoder_of_each_prompt(case, fixture, implementation, request):
    model = request.getfixturevalue(fixture)
    model.set_attn_implementation(implementation)
    options, keep, reference = CASES[case]
    pruner = make_pruner(case.partition("-")[0], budget=Budget.tokens(keep), **options)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randn(length, WIDTH, generator=generator) for length in LENGTHS]
    longest = max(LENGTHS)
    embeds = torch.stack([torch.cat([torch.zeros(longest - len(own), WIDTH), own]) for own in prompts])
    mask = torch.tensor([[int(place >= longest - length) for place in range(longest)] for length in LENGTHS])
    spans = [[(longest - length + SPAN[0], longest - length + SPAN[1])] for length in LENGTHS]
    native = SPAN[1] - SPAN[0]
    steps = [pruner.schedule(native, LAYERS)] * len(prompts)
    with torch.inference_mode(), prune_prompts(model, pruner, steps, spans):
        made = model.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False,
            pad_token_id=0, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    for row, own in enumerate(prompts):
        logits, ids = Literal(model).run(own, reference(steps[row], own), pruner.positions == "contiguous")
        torch.testing.assert_close(torch.stack([step[row] for step in made.logits]), logits, atol=2e-4, rtol=1e-3)
        assert made.sequences[row].tolist() == ids


COSTS = ["fastv", "pyramiddrop", "v2drop", "dart", "sparsevlm", "sparsevlm-2"]


@pytest.mark.parametrize("case", COSTS)
def test_a_step_says_what_choosing_costs(case, tiny_qwen2, monkeypatch):
    from rcb_lmms.engine import layer_pruning

    name, _, version = case.partition("-")
    pruner = make_pruner(name, budget=Budget.tokens(14), **({"version": "2.0"} if version else {}))
    steps, length = pruner.schedule(SPAN[1] - SPAN[0], LAYERS), LENGTHS[0]
    own, found = type(pruner).select_in_layer, []
    row = layer_pruning.last_row_attention

    def counting(run):
        def under(*args):
            made = []
            lengths = {"large": WIDTH, "norms": 2} if name == "v2drop" else {}
            found.append(counted(lambda: made.append(run(*args)), **lengths))
            return made[0]

        return under

    if pruner.selects_in_layer:
        monkeypatch.setattr(type(pruner), "select_in_layer", counting(own))
    monkeypatch.setattr(layer_pruning, "last_row_attention", counting(row))
    embeds = torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(5))
    embeds[:, SPAN[1] :] = embeds[:, SPAN[1] : SPAN[1] + 1]  # text tokens that are all alike all rate
    with torch.inference_mode(), prune_prompts(tiny_qwen2, pruner, [steps], [[SPAN]]):
        tiny_qwen2(inputs_embeds=embeds, attention_mask=torch.ones(1, length, dtype=torch.long))
    sizes = PromptSizes(length, SPAN[1] - SPAN[0], length - SPAN[1], DecoderShape.of(tiny_qwen2.config))
    left = [sizes.visual, *(step.keep for step in steps)]
    assert found == [pruner.step_flops(step, before, sizes) for step, before in zip(steps, left, strict=False)]


# Schedules


@pytest.mark.parametrize(
    ("method", "options", "keep", "expected"),
    [
        # Counts behind each layer of 32 for 576 tokens, from the papers' own tables and the authors' advice.
        ("pyramiddrop", {}, 270, [(8, 288), (16, 144), (24, 72)]),
        ("pyramiddrop", {"layers": "2-8-16"}, 192, [(2, 322), (8, 180), (16, 101)]),
        ("pyramiddrop", {"layers": "2-8-16"}, 128, [(2, 242), (8, 102), (16, 42)]),
        ("pyramiddrop", {"layers": "2-8-16"}, 64, [(2, 111), (8, 21), (16, 4)]),
        ("pyramiddrop", {}, 192, [(8, 146), (16, 37), (24, 9)]),
        ("sparsevlm", {}, 192, [(3, 309), (7, 204), (16, 113)]),
        ("sparsevlm", {}, 128, [(3, 312), (7, 117), (16, 39)]),
        ("sparsevlm", {}, 96, [(3, 249), (7, 55), (16, 27)]),
        ("sparsevlm", {}, 64, [(3, 82), (7, 32), (16, 18)]),
        ("sparsevlm", {"version": "2.0"}, 64, [(3, 66), (7, 34), (16, 20)]),
        ("dart", {}, 192, [(2, 196)]),
        ("dart", {}, 64, [(2, 68)]),
        ("dart", {"preset": "paper"}, 64, [(2, 64)]),
    ],
)
def test_schedules_are_those_of_the_released_codes(method, options, keep, expected):
    steps = make_pruner(method, budget=Budget.tokens(keep), **options).schedule(576, 32)
    assert [(step.layer, step.keep) for step in steps] == expected


def processed(method, keep, native=576, depth=32, **options):
    steps = make_pruner(method, budget=Budget.tokens(keep), **options).schedule(native, depth)
    return mean_tokens([step.keep for step in steps], [step.layer for step in steps], native, depth)


def test_what_the_layers_process_is_not_what_the_budget_is_called():
    first = [processed("sparsevlm", keep) for keep in (192, 128, 96, 64)]
    assert first == pytest.approx([206.5, 145.4, 114.1, 82.3], abs=0.051)
    second = [processed("sparsevlm", keep, version="2.0") for keep in (192, 128, 96, 64)]
    assert second == pytest.approx([206.8, 144.1, 113.9, 81.8], abs=0.051)
    assert [round(processed("dart", keep), 2) for keep in (192, 128, 64)] == [219.75, 159.75, 99.75]


@pytest.mark.parametrize("method", ["pyramiddrop", "v2drop"])
def test_a_budget_is_the_mean_over_the_layers(method):
    for keep in (160, 200, 250):
        assert processed(method, keep) == pytest.approx(keep, abs=0.5)
    assert processed("v2drop", 203) == pytest.approx(202.8, abs=0.5)


def test_sparsevlms_lists_are_scaled_to_other_budgets():
    for native, keep in ((576, 100), (144, 36), (2880, 640)):
        steps = make_pruner("sparsevlm", budget=Budget.tokens(keep)).schedule(native, 32)
        counted = mean_tokens([step.keep for step in steps], [step.layer - 1 for step in steps], native, 32)
        assert counted == pytest.approx(keep, abs=1.5)


def test_schedules_that_cannot_be_met_are_refused():
    with pytest.raises(BudgetError, match="layers=2-8-16"):
        processed("pyramiddrop", 128)
    for layers in ("8-8-24", "16-8-24", "8-16-32", "0-8-16", "a-b-c"):
        with pytest.raises(UserError, match="rising numbers from 1 to 31"):
            processed("pyramiddrop", 200, layers=layers)
    with pytest.raises(UserError, match="4 pivots"):
        processed("dart", 3, preset="paper")


@pytest.mark.parametrize(
    ("method", "text", "found"),
    [("sparsevlm", 0, "no text behind the image"), ("dart", 3, "3 tokens behind the image")],
)
def test_a_question_too_short_for_the_method_is_refused(method, text, found, tiny_llama):
    pruner, length = make_pruner(method, budget=Budget.tokens(12)), SPAN[1] + text
    steps = [pruner.schedule(SPAN[1] - SPAN[0], LAYERS)]
    embeds = torch.randn(1, length, WIDTH)
    with (
        pytest.raises(UserError, match=found),
        torch.inference_mode(),
        prune_prompts(tiny_llama, pruner, steps, [[SPAN]]),
    ):
        tiny_llama(inputs_embeds=embeds, attention_mask=torch.ones(1, length, dtype=torch.long))


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "v2drop", "dart", "sparsevlm"])
def test_identical_tokens_are_pruned_like_others(method, tiny_llama):
    pruner = make_pruner(method, budget=Budget.tokens(12))
    steps = pruner.schedule(SPAN[1] - SPAN[0], LAYERS)
    embeds = torch.randn(1, 1, WIDTH, generator=torch.Generator().manual_seed(2)).repeat(1, LENGTHS[0], 1)
    with torch.inference_mode(), prune_prompts(tiny_llama, pruner, [steps], [[SPAN]]) as pruning:
        logits = tiny_llama(inputs_embeds=embeds, attention_mask=torch.ones(1, LENGTHS[0], dtype=torch.long)).logits
    assert logits.isfinite().all()
    assert [len(step.slots[0]) for step in pruning.steps] == [step.keep for step in steps]


def test_layers_keep_their_share_of_another_depth():
    assert layers_of("x", "", (8, 16, 24), 32) == [8, 16, 24]
    assert layers_of("x", "", (8, 16, 24), 28) == [7, 14, 21]
    assert layers_of("x", "", (3, 7, 16), 4) == [1, 2, 3]
    with pytest.raises(UserError, match="a decoder of 3 layers"):
        layers_of("x", "", (8, 16, 24), 3)
