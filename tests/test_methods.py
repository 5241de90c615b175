"""Methods before the language model against literal loops in float64, written from their specifications."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from test_pruners import METHODS, make, make_view
from torch.utils.flop_counter import FlopCounterMode

from rcb_lmms.budget import Budget
from rcb_lmms.errors import BudgetError, UserError
from rcb_lmms.pruners import PRUNERS, make_pruner
from rcb_lmms.pruners.tokens import VisualTokens
from rcb_lmms.pruners.views import choose_views

SEEDS = range(4)


def kept_by(name, view, count, **options):
    return make_pruner(name, budget=Budget.tokens(count), **options).choose(view, "What is it?")


def unit_rows(tensor):
    rows = tensor.double().numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def attention_of(view):
    return view.head_attention.double().numpy().mean(1)


def by_score(scores, count):
    """Indices of the largest, ties to the lower index."""
    return sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:count]


# Before the projector


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("n", "count", "contextual"), [(24, 12, 4), (25, 9, 3), (24, 23, 1), (24, 7, 6)])
def test_visionzip(seed, n, count, contextual):
    view = make_view(n, seed)
    selection = kept_by("visionzip", view, count, contextual=contextual)
    dominant = sorted(by_score(attention_of(view), count - 1 - contextual))
    rest = [index for index in range(n) if index not in dominant]
    step = max(1, len(rest) // contextual)
    targets = rest[::step][:contextual]
    keys, patches = unit_rows(view.mean_keys), view.encoder_features.double().numpy()
    assigned = {target: [] for target in targets}
    for other in (index for index in rest if index not in targets):
        assigned[max(targets, key=lambda target: (keys[other] @ keys[target], -target))].append(patches[other])
    contexts = [patches[own] + (np.mean(group, axis=0) if group else 0) for own, group in assigned.items()]
    expected = np.stack([view.cls_features[0].double().numpy(), *patches[dominant], *contexts])
    np.testing.assert_allclose(selection.features.double().numpy(), expected, atol=1e-5)
    assert selection.kept.tolist() == sorted(dominant + targets)
    assert selection.places.tolist() == [0, *dominant, *targets]


@pytest.mark.parametrize(("tokens", "contextual"), [(64, 10), (128, 20), (192, 30)])
def test_the_contextual_share_is_that_of_the_papers_budgets(tokens, contextual):
    selection = kept_by("visionzip", make_view(576), tokens)
    assert len(selection) == tokens
    dominant = set(by_score(attention_of(make_view(576)), tokens - 1 - contextual))
    assert len(set(selection.kept.tolist()) - dominant) == contextual


def test_visionzip_without_a_cls_token_keeps_one_patch_more():
    view = replace(make_view(), head_attention=None, cls_features=None)
    selection = kept_by("visionzip", view, 8, contextual=2, attention="received")
    assert len(selection) == len(selection.kept) == 8
    assert set(by_score(view.received_attention.tolist(), 6)) <= set(selection.kept.tolist())


def test_visionzip_refuses_a_budget_without_a_dominant_token():
    with pytest.raises(BudgetError, match="no room for a dominant token, the first of which is the CLS token"):
        kept_by("visionzip", make_view(), 4, contextual=4)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("n", "count", "share"), [(64, 24, 0.5), (64, 33, 0.25), (24, 9, 0.75), (40, 12, 0.0)])
def test_vispruner(seed, n, count, share):
    view = make_view(n, seed)
    order = by_score(attention_of(view), n)
    important, residual = order[: int(count * share)], order[int(count * share) :]
    rows, wanted = unit_rows(view.encoder_features), count - int(count * share)
    while len(residual) > wanted:
        first, second = residual[::2], residual[1::2]
        alike = {index: max(rows[index] @ rows[other] for other in second) for index in first}
        ranked = sorted(first, key=alike.get, reverse=True)
        residual = ranked[min(8, len(residual) - wanted) :] + second
    selection = kept_by("vispruner", view, count, important=share)
    assert selection.kept.tolist() == sorted(important + residual)


def test_fastervlm_is_vispruner_with_important_tokens_alone():
    view = make_view()
    expected = sorted(by_score(attention_of(view), 9))
    assert kept_by("fastervlm", view, 9).kept.tolist() == expected
    assert kept_by("vispruner", view, 9, important=1.0).kept.tolist() == expected


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_scope(seed, alpha):
    view = make_view(24, seed)
    alike, weights = unit_rows(view.encoder_features) @ unit_rows(view.encoder_features).T, attention_of(view) ** alpha
    covered, chosen = np.zeros(24), []
    for _ in range(9):
        gain = {
            j: weights[j] * sum(max(0, alike[i, j] - covered[i]) for i in range(24))
            for j in range(24)
            if j not in chosen
        }
        chosen.append(max(gain, key=gain.get))
        covered = np.maximum(covered, alike[chosen[-1]])
    assert kept_by("scope", view, 9, alpha=alpha).kept.tolist() == sorted(chosen)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("grid", "count", "alpha"), [((4, 6), 10, 0.5), ((5, 5), 20, 1.0), ((24, 24), 64, 0.1)])
def test_hiprune(seed, grid, count, alpha):
    n = math.prod(grid)
    view = make_view(n, seed, grid=grid)
    anchors = by_score(view.object_attention.tolist(), round(count * alpha / 5))
    near = {min(max(anchor + step, 0), n - 1) for anchor in anchors for step in (0, -1, 1, -grid[1], grid[1])}
    deep = view.received_attention.double().numpy().copy()
    deep[list(near)] -= 10
    expected = sorted(near | set(by_score(deep, count - len(near))))
    assert kept_by("hiprune", view, count, alpha=alpha).kept.tolist() == expected


def test_hiprune_refuses_anchors_that_do_not_fit():
    view = make_view(24, grid=(4, 6))
    with pytest.raises(BudgetError, match="anchors and neighbours"):
        kept_by("hiprune", view, 3, alpha=1.9)


def holov_runs(view, count, alpha, parts):
    """Weight of every run and its tokens."""
    attention, rows = attention_of(view), unit_rows(view.features)
    runs, begin = [], 0
    for number in range(parts):
        length = len(view) // parts + (number < len(view) % parts)
        runs.append(list(range(begin, begin + length)))
        begin += length
    weights = []
    for run in runs:
        if len(run) == 1:
            weights.append(attention[run[0]])
            continue
        alike = [[0 if i == j else rows[i] @ rows[j] for j in run] for i in run]
        mean = [sum(row) / (len(run) - 1) for row in alike]
        spread = [sum((a - m) ** 2 for a in row) / (len(run) - 1) for row, m in zip(alike, mean, strict=True)]
        raised = [1000 * attention[i] for i in run]
        factor = alpha * np.mean(np.abs(raised)) / (np.mean(np.abs(spread)) + 1e-6)
        weights.append(np.mean([a + factor * s for a, s in zip(raised, spread, strict=True)]))
    return np.array(weights) / (sum(weights) + 1e-6), runs


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("n", "count", "parts"), [(24, 8, 4), (25, 11, 4), (24, 20, 16), (64, 12, 5)])
def test_holov_as_released(seed, n, count, parts):
    view = make_view(n, seed)
    shares, runs = holov_runs(view, count, 0.09, parts)
    slots = np.floor(shares * count).astype(int)
    for run in by_score(shares, count - slots.sum()):
        slots[run] += 1
    expected = []
    for run, slot in zip(runs, slots, strict=True):
        ranked = by_score(attention_of(view)[run], slot)
        expected += run if slot >= len(run) else [run[0] + index for index in ranked]
    selection = kept_by("holov", view, count, runs=parts)
    assert selection.kept.tolist() == expected
    assert selection.blanks == count - len(expected)


def test_holov_feeds_zeros_as_released_and_none_in_its_other_presets():
    view = make_view(24, 1)
    peaked = replace(view, head_attention=view.head_attention.clone().index_fill_(0, torch.arange(6), 5.0))
    selection = kept_by("holov", peaked, 12, runs=4)
    assert (len(selection), selection.blanks > 0) == (12, True)
    assert kept_by("holov", peaked, 12, runs=4, preset="paper").blanks == 0


def test_holovs_runs_follow_the_budget():
    # 16, 8 and 5 runs at 64, 128 and 192 tokens of 576.
    for count, parts in ((64, 16), (128, 8), (192, 5)):
        view = make_view(576)
        expected = kept_by("holov", view, count, runs=parts)
        assert torch.equal(kept_by("holov", view, count).kept, expected.kept)


# Behind the projector


@pytest.mark.parametrize("seed", SEEDS)
def test_divprune(seed):
    view = make_view(24, seed)
    distances = 1 - unit_rows(view.features) @ unit_rows(view.features).T
    chosen = [int(np.argmax(np.sort(distances, axis=0)[1]))]
    while len(chosen) < 9:
        left = [j for j in range(24) if j not in chosen]
        chosen.append(max(left, key=lambda j: min(distances[j, i] for i in chosen)))
    assert kept_by("divprune", view, 9, preset="paper").kept.tolist() == chosen
    assert kept_by("divprune", view, 9).kept.tolist() == sorted(chosen)


def test_divprune_draws_no_token_twice_where_few_are_distinct():
    view = make_view(24)
    repeated = replace(view, features=view.features[:5].repeat(5, 1)[:24])
    assert len(set(kept_by("divprune", repeated, 12).kept.tolist())) == 12


def relevance_of(view):
    return -(unit_rows(view.patch_embeddings) @ unit_rows(view.text_embeddings).T).mean(1)


@pytest.mark.parametrize("seed", SEEDS)
def test_cdpruner_maximises_the_determinant_step_by_step(seed):
    view = make_view(24, seed)
    relevance = relevance_of(view)
    relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    alike = unit_rows(view.features) @ unit_rows(view.features).T
    kernel, chosen = relevance[:, None] * alike * relevance, []
    for _ in range(8):
        left = [j for j in range(24) if j not in chosen]
        chosen.append(max(left, key=lambda j: np.linalg.det(kernel[np.ix_([*chosen, j], [*chosen, j])])))
    assert kept_by("cdpruner", view, 8).kept.tolist() == sorted(chosen)


def test_cdpruner_shares_the_range_of_relevance_among_the_views_of_an_image():
    views = [make_view(24, seed, key=str(seed)) for seed in SEEDS]
    every = np.concatenate([relevance_of(view) for view in views])
    pruner = make_pruner("cdpruner", budget=Budget.tokens(6))
    told = pruner.among(views)
    for view, selection in zip(views, choose_views(pruner, views, question="What?"), strict=True):
        relevance = (relevance_of(view) - every.min() + 1e-6) / (every.max() - every.min())
        best = int(np.argmax(relevance))
        assert best in selection.kept.tolist()
        assert torch.equal(told.choose(view, "What?").kept, selection.kept)


def test_cdpruner_keeps_what_was_asked_for_where_tokens_are_alike():
    view = make_view(24)
    same = replace(
        view, features=view.features[:1].repeat(24, 1), patch_embeddings=view.patch_embeddings[:1].repeat(24, 1)
    )
    selection = kept_by("cdpruner", same, 12)
    assert len(set(selection.kept.tolist())) == 12
    assert selection.scores.isfinite().all()


def test_cdpruner_by_the_language_models_embeddings():
    view = replace(make_view(24), patch_embeddings=None, text_embeddings=None)
    relevance = (unit_rows(view.features) @ unit_rows(view.question_embeddings).T).mean(1)
    selection = kept_by("cdpruner", view, 1, relevance="embedding")
    assert selection.kept.tolist() == [int(np.argmax(relevance))]


def test_cdpruner_reads_the_question_without_its_instruction():
    pruner = make_pruner("cdpruner", budget=Budget.tokens(4))
    assert pruner.wording("Is it red?\nAnswer the question using a single word or phrase.") == "Is it red?"
    with pytest.raises(UserError, match="an image without a question"):
        pruner.choose(make_view())


# Videos


def video(frames=4, tokens=6, width=10, seed=0, moving=0.3):
    generator = torch.Generator().manual_seed(seed)
    still = torch.randn(1, tokens, width, generator=generator)
    rows = still + moving * torch.randn(frames, tokens, width, generator=generator)
    return VisualTokens(rows.flatten(0, 1), (1, frames * tokens), frames=frames)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_vidcom2(seed, ratio):
    view = video(seed=seed)
    rows = view.features.double().numpy()
    rows = rows[:, np.argsort(rows.var(0), kind="stable")[:5]]
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).reshape(4, 6, 5)

    def near(token, centre):
        return sum(math.exp(-((token - centre) ** 2).sum() / (2 * width)) for width in (1 / 8, 1 / 4, 1 / 2, 1, 2))

    whole = rows.reshape(-1, 5).mean(0)
    to_video = np.array([[near(token, whole) for token in frame] for frame in rows])
    to_frame = np.array([[near(token, frame.mean(0)) for token in frame] for frame in rows])
    unlike = -to_video.mean(1)
    exponents = np.exp((unlike - unlike.max()) / 0.01)
    shares = exponents / exponents.sum()
    expected = []
    for number, share in enumerate(shares):
        count = max(1, round(min(1, ratio * (1 + share - shares.mean())) * 6))
        ranked = by_score(-(to_video + to_frame)[number], count)
        expected += sorted(6 * number + index for index in ranked)
    selection = make_pruner("vidcom2", budget=Budget.ratio(ratio)).choose(view)
    assert selection.kept.tolist() == expected


def test_vidcom2_spends_an_exact_budget_where_it_is_asked_to():
    for count in range(4, 25):
        selection = kept_by("vidcom2", video(), count, counts="exact")
        assert len(selection) == count
        assert len({int(index) // 6 for index in selection.kept}) == 4
    with pytest.raises(BudgetError, match="4 to 24 tokens"):
        kept_by("vidcom2", video(), 3, counts="exact")


@pytest.mark.parametrize("seed", SEEDS)
def test_evs(seed):
    view = video(seed=seed)
    rows = unit_rows(view.features)
    scores = {index: 1 - rows[index] @ rows[index - 6] for index in range(6, 24)}
    expected = [*range(6), *sorted(sorted(scores, key=scores.get, reverse=True)[:7])]
    assert kept_by("evs", view, 13).kept.tolist() == expected
    assert len(make_pruner("evs", budget=Budget.ratio(0.1)).choose(view)) == 6
    with pytest.raises(BudgetError, match="a first frame of 6 tokens, which stays whole"):
        kept_by("evs", view, 5)


@pytest.mark.parametrize(
    ("name", "per", "each"), [("evs", "view", 3), ("vidcom2", "view", 3), ("vidcom2", "image", 12)]
)
def test_a_video_is_seen_as_a_whole_whatever_the_budget_is_spent_on(name, per, each):
    whole = video()
    frames = [VisualTokens(rows, (2, 3), key=str(n)) for n, rows in enumerate(whole.features.split(6))]
    parts = choose_views(make_pruner(name, budget=Budget.tokens(each)), frames, per)
    expected = kept_by(name, whole, 12)
    found = list(itertools.chain(*(6 * n + part.kept for n, part in enumerate(parts))))
    assert [int(index) for index in found] == expected.kept.tolist()


@pytest.mark.parametrize("name", [name for name in METHODS if PRUNERS[name].stage == "view" and name != "none"])
def test_identical_tokens_are_as_many_as_were_asked_for(name):
    view = make_view(24, grid=(4, 6))
    rows = {name: own for name, own in vars(view).items() if isinstance(own, torch.Tensor)}
    alike = replace(view, frames=4, **{name: own[:1].expand_as(own) for name, own in rows.items()})
    assert len(make(name, Budget.tokens(12)).choose(alike, "What is it?")) == 12


# What choosing costs


def counted(run, large=1 << 30, norms=0):
    """FLOPs of what runs by torch's counter, with element-wise work on arrays of `large` numbers and more.

    `norms` is what a number in a vector costs whose length is taken.
    """
    aten = torch.ops.aten

    def one(*shapes, out_shape, **options):
        size = max(math.prod(shapes[0]), math.prod(out_shape))
        return size if size >= large else 0

    by_hand = {operation: one for operation in (aten.sub, aten.mul, aten.pow, aten.clamp, aten.sum)}
    by_hand |= {
        aten.var: lambda shape, *rest, **options: 3 * math.prod(shape),
        aten.linalg_vector_norm: lambda shape, *rest, **options: norms * math.prod(shape),
        aten.mv: lambda matrix, vector, **options: 2 * math.prod(matrix),
        aten._cdist_forward: lambda one, other, *rest, **options: 2 * math.prod(one) * other[-2],
    }
    with FlopCounterMode(display=False, custom_mapping=by_hand) as counter:
        run()
    return counter.get_total_flops()


# Arrays worked on element by element: pairs of tokens, half of the channels, the channels behind frame one.
LARGE = {"scope": 48 * 48, "vidcom2": 48 * 6, "evs": 40 * 12}
CHOOSING = [
    *((name, {}) for name in METHODS if PRUNERS[name].stage == "view"),
    ("visionzip", {"attention": "received"}),
    ("vispruner", {"important": 0.0}),
    ("cdpruner", {"relevance": "embedding"}),
]


@pytest.mark.parametrize(("name", "options"), CHOOSING)
def test_a_method_says_what_choosing_costs(name, options):
    pruner = make(name, None if name == "none" else Budget.tokens(10), **options)
    view = replace(make_view(48, grid=(6, 8)), frames=6)
    found = counted(lambda: pruner.select(view, "What is it?"), LARGE.get(name, 1 << 30))
    assert pruner.choose(view, "What is it?").flops == found
    assert (found == 0) == (name in ("none", "random", "stride", "fastervlm", "hiprune"))


# What the tower gives


@pytest.fixture(scope="module")
def clip_tower():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(**{**tiny.VISION, "num_hidden_layers": 12}, attn_implementation="eager")
    return CLIPVisionModel(config).eval()


@pytest.mark.parametrize("layer", [-2, 5, -1])
def test_a_tower_stops_behind_the_layer_that_is_read(clip_tower, layer):
    """The states are those of a whole pass, bit by bit; of twelve blocks those behind the layer do not run."""
    from rcb_lmms.families.towers import states_of

    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    tower, ran = getattr(clip_tower, "vision_model", clip_tower), []
    with torch.inference_mode():
        whole = clip_tower(pixels, output_hidden_states=True).hidden_states
        hooks = [
            block.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
            for number, block in enumerate(tower.encoder.layers)
        ]
        found = states_of(tower, pixels, layer)
        for hook in hooks:
            hook.remove()
        again = clip_tower(pixels, output_hidden_states=True).hidden_states
    assert ran == list(range(layer % 13))
    assert len(found) == layer % 13 + 1
    assert all(torch.equal(own, other) for own, other in zip(found, whole, strict=False))
    assert torch.equal(found[-1], whole[layer])
    assert len(again) == 13


def test_attention_and_keys_of_two_blocks_are_those_of_eager_attention(clip_tower):
    from rcb_lmms.families.towers import optional_fields

    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    tower, keys = getattr(clip_tower, "vision_model", clip_tower), []
    block = tower.encoder.layers[10]
    hook = block.self_attn.k_proj.register_forward_hook(lambda *args: keys.append(args[2]))
    with torch.inference_mode():
        eager = clip_tower(pixels, output_attentions=True, output_hidden_states=True)
        hook.remove()
        needs = {"head_attention", "received_attention", "object_attention", "mean_keys", "cls_features"}
        found = optional_fields(tower, eager.hidden_states, -2, True, needs)
    read, early = eager.attentions[10], eager.attentions[8]
    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(found["head_attention"], read[:, :, 0, 1:].transpose(1, 2), **close)
    torch.testing.assert_close(found["received_attention"], read.mean((1, 2))[:, 1:], **close)
    torch.testing.assert_close(found["object_attention"], early.mean((1, 2))[:, 1:], **close)
    torch.testing.assert_close(found["mean_keys"], keys[0].unflatten(-1, (4, -1)).mean(2)[:, 1:], **close)
    torch.testing.assert_close(found["cls_features"], eager.hidden_states[-2][:, :1])


@pytest.mark.parametrize(
    "needs",
    [{"head_attention"}, {"mean_keys", "head_attention", "cls_features"}, {"received_attention", "object_attention"},
     {"keys", "cls_attention"}, {"encoder_features"}],
)  # fmt: skip
def test_what_the_fields_cost_is_what_they_compute(clip_tower, needs):
    from rcb_lmms.families.towers import fields_flops, optional_fields

    tower = getattr(clip_tower, "vision_model", clip_tower)
    with torch.inference_mode():
        states = clip_tower(torch.randn(1, 3, 56, 56), output_hidden_states=True).hidden_states
        found = counted(lambda: optional_fields(tower, states, -2, True, needs))
    assert fields_flops(32, 16, True, needs) == found


def test_attention_of_a_tower_without_cls_token_is_that_of_eager_attention():
    from transformers import SiglipVisionConfig, SiglipVisionModel

    from rcb_lmms.families.towers import optional_fields

    sizes = {name: value for name, value in tiny.VISION.items() if name not in ("projection_dim", "initializer_range")}
    torch.manual_seed(4)
    model = SiglipVisionModel(
        SiglipVisionConfig(**{**sizes, "num_hidden_layers": 6}, attn_implementation="eager")
    ).eval()
    tower = getattr(model, "vision_model", model)
    with torch.inference_mode():
        eager = model(torch.randn(2, 3, 56, 56), output_attentions=True, output_hidden_states=True)
        needs = {"received_attention", "object_attention"}
        found = optional_fields(tower, eager.hidden_states, -1, False, needs)
    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(found["received_attention"], eager.attentions[5].mean((1, 2)), **close)
    # A third of the depth: block 2 of 6.
    torch.testing.assert_close(found["object_attention"], eager.attentions[2].mean((1, 2)), **close)


@pytest.fixture(scope="module")
def clip_model(clip_folder):
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(clip_folder).eval()


def test_texts_and_patches_in_clips_space_are_clips_own(clip_folder, clip_model):
    from rcb_lmms.families.clip import ClipSpace

    model, space = clip_model, ClipSpace(str(clip_folder), "cpu")
    with torch.inference_mode():
        known = model.get_text_features(input_ids=space._tokenizer("red?", return_tensors="pt").input_ids)
        known = getattr(known, "pooler_output", known)
        torch.testing.assert_close(space.text("red?"), known)
        features = torch.randn(5, 32)
        torch.testing.assert_close(
            space.patches(features), model.visual_projection(model.vision_model.post_layernorm(features))
        )
        space._texts.set_attn_implementation("eager")  # torch's counter is blind to sdpa on a CPU
        assert space.flops(5, 1) == counted(lambda: (space.text("red?"), space.patches(features)))


def test_a_text_longer_than_clips_is_read_in_segments(clip_folder, clip_model):
    from rcb_lmms.families.clip import ClipSpace

    model, space = clip_model, ClipSpace(str(clip_folder), "cpu")
    words = "is there a red car in front of the house?"
    ids = space._tokenizer(words).input_ids
    padded = ids + [0] * (-len(ids) % 20)
    rows = []
    with torch.inference_mode():
        for start in range(0, len(padded), 20):
            part = torch.tensor([padded[start : start + 20]])
            mask = torch.tensor([[int(start + place < len(ids)) for place in range(20)]])
            states = model.text_model(input_ids=part, attention_mask=mask).last_hidden_state
            rows.append(model.text_projection(states[0, int(part[0].argmax())]))
        found = space.text(words)
    assert len(rows) == 3
    torch.testing.assert_close(found, torch.stack(rows))


def test_a_session_without_its_clip_model_is_refused_before_the_first_question(family, tmp_path):
    from rcb_lmms.engine.session import Session

    with pytest.raises(UserError, match="the text tower of the CLIP model"):
        Session(family, make_pruner("cdpruner", budget=Budget.tokens(4), clip=str(tmp_path)))


def test_a_clip_model_that_is_not_there_or_of_another_width_is_refused(clip_folder, tmp_path):
    from rcb_lmms.families.clip import ClipSpace

    with pytest.raises(UserError, match="relevance=embedding"):
        ClipSpace(str(tmp_path), "cpu")
    with pytest.raises(UserError, match="a vision tower of width 32"):
        ClipSpace(str(clip_folder), "cpu").patches(torch.randn(3, 48))
