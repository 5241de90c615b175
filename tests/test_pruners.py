"""Pruners against slow, literal re-statements of their methods, and the contract that all of them keep."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import ClassVar

import numpy as np
import pytest
import torch

from rcb_lmms.budget import Budget
from rcb_lmms.codebook import Codebook
from rcb_lmms.errors import BudgetError, UserError
from rcb_lmms.pruners import PRUNERS, Pruner, Selection, VisualTokens, make_pruner, register
from rcb_lmms.pruners.prumerge import cls_attention_from, count_outliers
from rcb_lmms.pruners.rcb import ALWAYS
from rcb_lmms.pruners.views import choose_views as select

WIDTH, ENCODER = 12, 10

# The contract tests' table: a new method adds its row, the options that it cannot do without.
METHODS = {
    "none": {},
    "rcb": {"codebook": "made for the test"},
    "prumerge": {},
    "prumerge_plus": {},
    "fastv": {},
    "random": {},
    "stride": {},
    "downsample": {},
    "visionzip": {},
    "divprune": {},
    "vispruner": {},
    "fastervlm": {},
    "scope": {},
    "holov": {"preset": "paper"},  # the released code may feed zeros, and feeds tokens by falling attention
    "hiprune": {},
    "cdpruner": {},
    "vidcom2": {},
    "evs": {},
    "pyramiddrop": {},
    "sparsevlm": {},
    "dart": {},
    "v2drop": {},
}
MERGING = {name for name in METHODS if PRUNERS[name].rewrites}
PRUMERGE = ("prumerge", "prumerge_plus")
# Methods that keep some tokens by another rule: a grid, even spaces, unlikeness, a share for every run.
RULES = ("prumerge_plus", "visionzip", "vispruner", "holov")
# Methods that leave a view as it is: they act before the tower or inside the decoder, or not at all.
WHOLE = {name for name in METHODS if PRUNERS[name].stage != "view" or not PRUNERS[name].budgets}


def make_view(n=24, seed=0, dtype=torch.float32, key="a", grid=None):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(n + 1, ENCODER, generator=generator)
    query = torch.randn(ENCODER, generator=generator) * 3
    view = VisualTokens(
        features=torch.randn(n, WIDTH, generator=generator).to(dtype),
        grid=grid or (1, n),
        encoder_features=torch.randn(n, ENCODER, generator=generator).to(dtype),
        keys=keys[1:].to(dtype),
        cls_attention=cls_attention_from(query, keys),
        key=key,
    )
    attention = torch.randn(3, 2, n + 1, generator=generator).mul(2).softmax(-1)[..., 1:]
    more = {"mean_keys": (n, 5), "cls_features": (1, ENCODER), "patch_embeddings": (n, 6), "text_embeddings": (2, 6),
            "question_embeddings": (4, WIDTH)}  # fmt: skip
    return replace(
        view,
        head_attention=attention[0].T,
        received_attention=attention[1].mean(0),
        object_attention=attention[2].mean(0),
        **{field: torch.randn(shape, generator=generator).to(dtype) for field, shape in more.items()},
    )


def make_codebook(m=5, width=WIDTH, seed=9):
    rows = torch.randn(m, width, generator=torch.Generator().manual_seed(seed)) * 30
    return Codebook(rows, {"id": "tiny", "model": "model-a"})


def make(name, budget=None, **options):
    options = {**METHODS[name], **options}
    if options.get("codebook") == "made for the test":
        options["codebook"] = make_codebook()
    return make_pruner(name, budget=budget, **options)


def choose(pruner, view):
    frames = len(view) if pruner.name == "evs" else 1  # which keeps the first frame whole
    return pruner.choose(replace(view, frames=frames), "What is it?")


def peaked_view(outliers, n=576, seed=0):
    """A view whose CLS attention has exactly `outliers` outliers."""
    generator = torch.Generator().manual_seed(seed)
    attention = 1e-3 + 1e-5 * torch.rand(n, generator=generator)
    places = torch.randperm(n, generator=generator)[:outliers]
    attention[places] = 0.02 + 1e-4 * torch.rand(outliers, generator=generator)
    view = make_view(n, seed, grid=(24, 24) if n == 576 else None)
    return replace(view, cls_attention=attention / attention.sum() * 0.9)


# The contract.


@pytest.fixture(params=METHODS)
def name(request):
    return request.param


def budget_for(name, count):
    return Budget.tokens(count) if PRUNERS[name].budgets else None


def test_every_method_has_a_row_in_the_contract_tests():
    assert METHODS.keys() == PRUNERS.keys()


def first_tokens(view, count):
    return Selection(torch.arange(count), torch.zeros(len(view)))


BROKEN = {
    "9 of 24 tokens, where the budget asks for 4": lambda view: first_tokens(view, 9),
    "0 of 24 tokens": lambda view: first_tokens(view, 0),
    "indices from -1 to 2": lambda view: replace(first_tokens(view, 4), kept=torch.tensor([-1, 0, 1, 2])),
    "indices from 0 to 24": lambda view: replace(first_tokens(view, 4), kept=torch.tensor([0, 1, 2, 24])),
    "indices that repeat": lambda view: replace(first_tokens(view, 4), kept=torch.tensor([0, 1, 1, 2])),
    "not ascending": lambda view: replace(first_tokens(view, 4), kept=torch.tensor([3, 2, 1, 0])),
    "scores that are not finite": lambda view: replace(first_tokens(view, 4), scores=torch.full((24,), torch.inf)),
    "that are not finite": lambda view: replace(
        first_tokens(view, 4), scores=torch.full((24,), 1e308, dtype=torch.float64)
    ),
    "kept of shape": lambda view: replace(first_tokens(view, 4), kept=torch.tensor([0.0, 1, 2, 3])),
    "scores of shape": lambda view: replace(first_tokens(view, 4), scores=torch.zeros(3)),
    "merged tokens": lambda view: replace(first_tokens(view, 4), features=torch.zeros(4, ENCODER)),
}


@pytest.mark.parametrize("found", BROKEN)
def test_a_method_that_breaks_its_budget_or_the_contract_is_stopped(found):
    @dataclass(frozen=True)
    class Foreign(Pruner):
        name: ClassVar[str] = "foreign"

        def select(self, view, question=None):
            return BROKEN[found](view)

    with pytest.raises(BudgetError, match=found):
        Foreign(Budget.tokens(4)).choose(make_view())


def test_a_score_is_all_that_a_method_needs():
    class ByNorm(Pruner):
        name = "by_norm"

        def score(self, view, question=None):
            return view.features.norm(dim=1)

    view = make_view()
    selection = ByNorm(Budget.ratio(0.25)).choose(view)
    assert selection.kept.tolist() == sorted(np.argsort(-view.features.norm(dim=1).numpy())[:6].tolist())


def test_a_method_that_reads_the_question_gets_it_and_is_refused_without():
    class ByLength(Pruner):
        name = "by_length"
        sees_question = True

        def score(self, view, question=None):
            return torch.arange(len(view)).float() * (-1) ** len(question)

    pruner, view = ByLength(Budget.tokens(2)), make_view()
    assert pruner.choose(view, "even").kept.tolist() == [22, 23]
    assert pruner.choose(view, "odd").kept.tolist() == [0, 1]
    assert [own.kept.tolist() for own in select(pruner, [view, view], question="odd")] == [[0, 1], [0, 1]]
    with pytest.raises(UserError, match="without a question"):
        pruner.choose(view)


@pytest.mark.parametrize(
    ("found", "facts"),
    {
        "no name": {"name": ""},
        "the stage 'image'": {"stage": "image"},
        "needs that no view has": {"needs": frozenset({"depth"})},
        "unknown kinds": {"budgets": ("words",)},
        "no `count`": {"budgets": ("adaptive",)},
        "without `fit`": {"fits_mean": True},
        "views that compete": {"rewrites": True},
        "does not act on views": {"stage": "layers", "needs": frozenset({"keys"})},
        "without `grid`": {"stage": "pixels"},
        "without `schedule`": {"stage": "layers"},
        "neither": {"select": Pruner.select},
    }.items(),
)
def test_facts_that_contradict_each_other_are_refused_when_a_method_is_registered(found, facts):
    body = {"name": "foreign", "select": lambda self, view, question=None: first_tokens(view, 4), **facts}
    with pytest.raises(UserError, match=found):
        register(type("Foreign", (Pruner,), body))
    assert "foreign" not in PRUNERS


def test_a_name_is_taken_once_and_the_checks_cannot_be_left_out():
    twin = type("Twin", (Pruner,), {"name": "random", "score": lambda self, view, question=None: view.features[:, 0]})
    with pytest.raises(UserError, match=r"a new name for .*Twin"):
        register(twin)
    with pytest.raises(UserError, match="a `choose` of its own"):
        type("Free", (Pruner,), {"name": "free", "choose": lambda self, view: None})


def test_an_installed_package_adds_its_method_and_a_broken_one_is_named(tmp_path):
    (tmp_path / "theirs.py").write_text(
        "from rcb_lmms.pruners.base import Pruner\n"
        "class Last(Pruner):\n"
        "    name = 'last'\n"
        "    def score(self, view, question=None):\n"
        "        import torch\n"
        "        return torch.arange(len(view)).float()\n"
    )
    info = tmp_path / "theirs-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    points = "[rcb_lmms.pruners]\nlast = theirs:Last\nlost = theirs:Lost\n"
    (info / "entry_points.txt").write_text(points)
    shown = subprocess.run(
        [sys.executable, "-c", "from rcb_lmms.models import ENTRIES; print('last' in ENTRIES['llava'])"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout.strip() == "True"
    assert "the pruner lost of the package theirs is left out" in shown.stderr


def test_counts_are_exact_and_indices_ascend(name):
    for n, count in ((24, 2), (24, 7), (24, 24), (7, 3)):
        selection = choose(make(name, budget_for(name, count)), make_view(n))
        expected = n if name in WHOLE else count
        assert (len(selection), len(selection.kept)) == (expected, expected - (name in MERGING))
        assert selection.kept.dtype == torch.int64
        assert (selection.kept.diff() > 0).all()
        assert (selection.scores.shape, selection.scores.dtype) == ((n,), torch.float32)
        assert selection.forced == 0


def test_keeping_all_keeps_every_index(name):
    selection = choose(make(name, budget_for(name, 24)), make_view())
    expected = 23 if name in MERGING else 24  # PruMerge's last token is the residual one
    assert len(set(selection.kept.tolist()) & set(range(24))) == expected
    if name not in MERGING:
        assert selection.kept.tolist() == list(range(24))
        assert selection.features is None


def test_the_kept_tokens_have_the_highest_scores(name):
    selection = choose(make(name, budget_for(name, 7)), make_view())
    kept = set(selection.kept.tolist())
    out = [selection.scores[i].item() for i in range(24) if i not in kept]
    if name in WHOLE or name in RULES:
        return
    assert min(selection.scores[i].item() for i in kept) >= max(out)


def test_the_same_input_gives_the_same_selection(name):
    first, second = (choose(make(name, budget_for(name, 7)), make_view()) for _ in range(2))
    assert torch.equal(first.kept, second.kept)
    assert torch.equal(first.scores, second.scores)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_keeps_its_type(name, dtype):
    selection = choose(make(name, budget_for(name, 7)), make_view(dtype=dtype))
    assert selection.scores.isfinite().all()
    assert selection.scores.dtype == torch.float32
    if name in MERGING:
        assert selection.features.dtype == dtype
        assert selection.features.isfinite().all()


def test_every_preset_is_accepted_and_unknown_ones_are_not(name):
    for preset in ("official", "paper", "paper_literal"):
        make(name, budget_for(name, 7), preset=preset)
    with pytest.raises(UserError, match="official, paper, paper_literal"):
        make(name, budget_for(name, 7), preset="oficial")


def test_budgets_that_cannot_be_spent_are_refused(name):
    every = {
        "tokens": Budget.tokens(3),
        "ratio": Budget.ratio(0.5),
        "threshold": Budget.threshold(0.4),
        "adaptive": Budget.adaptive(),
    }
    for kind in every.keys() - set(PRUNERS[name].budgets):
        with pytest.raises(UserError, match=f"a budget for {name}"):
            make(name, every[kind])
    if not PRUNERS[name].budgets:
        return
    pruner = make(name, Budget.tokens(25))
    # Where the tokens go may be the work of others: the decoder's, the vision tower's.
    spend = {
        "layers": lambda: pruner.schedule(24, 32),
        "pixels": lambda: pruner.grid((4, 6)),
        "view": lambda: choose(pruner, make_view()),
    }[pruner.stage]
    with pytest.raises(BudgetError, match="1 to 24"):
        spend()


def test_unknown_options_and_methods_are_refused_with_the_known_ones(name):
    with pytest.raises(UserError) as caught:
        make(name, budget_for(name, 7), nonsense=1)
    known = sorted({field.name for field in fields(PRUNERS[name])} - {"budget", "preset"})
    assert caught.value.found == "nonsense"
    assert caught.value.allowed == (", ".join(known) or f"none: {name} has no options")
    with pytest.raises(UserError, match=rf"\b{name}\b"):
        make_pruner("nonsense")


def test_methods_with_exact_counts_refuse_to_be_fitted(name):
    if PRUNERS[name].fit is Pruner.fit:
        pruner = make(name, budget_for(name, 7))
        assert pruner.evidence(make_view()) is None
        with pytest.raises(UserError, match="rcb, prumerge"):
            pruner.fit([], [], 7)


def test_imports_are_light():
    code = (
        "import sys, rcb_lmms, rcb_lmms.engine\n"
        "from rcb_lmms import PRUNERS, Budget, Selection, VisualTokens, make_pruner\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)\n"
        "assert rcb_lmms.Codebook.__name__ == 'Codebook'\n"
        "assert rcb_lmms.engine.prune_at_layer.__name__ == 'prune_at_layer'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# RCB.


def cosines(view, codebook):
    tokens, prototypes = view.features.double().numpy(), codebook.prototypes.double().numpy()
    return np.array([[t @ p / np.linalg.norm(t) / np.linalg.norm(p) for p in prototypes] for t in tokens])


def test_rcb_equals_brute_force_in_float64():
    view, codebook = make_view(40), make_codebook()
    expected = cosines(view, codebook).max(1)
    pruner = make("rcb", Budget.tokens(9), codebook=codebook)
    selection = pruner.choose(view)
    np.testing.assert_allclose(-selection.scores.numpy(), expected, atol=2e-7)
    assert selection.kept.tolist() == sorted(np.argsort(expected)[:9].tolist())
    for limit in (0.1, 0.25, 0.45):
        kept = make("rcb", Budget.threshold(limit), codebook=codebook).choose(view).kept
        assert kept.tolist() == np.flatnonzero(expected < limit).tolist()
    assert len(make("rcb", Budget.threshold(0.25), codebook=codebook).choose(view)) == 16


def test_rcb_scores_in_float16_equal_the_released_arithmetic():
    view, codebook = make_view(60, dtype=torch.float16), make_codebook()
    pruner = make("rcb", Budget.threshold(0.45), codebook=codebook, score_dtype="float16", min_keep=0)
    tokens, rows = view.features, codebook.prototypes.half()
    tokens, rows = (part / part.norm(dim=1, keepdim=True) for part in (tokens, rows))
    assert tokens.dtype == rows.dtype == torch.float16
    expected = (tokens @ rows.T).max(dim=1).values
    assert torch.equal(pruner.redundancy(view), expected.float())
    assert torch.equal(pruner.choose(view).kept, (expected < 0.45).nonzero().squeeze(1))
    # The cut is 0.45 rounded to float16, 0.449951: a token that scores exactly this goes, and stays in the paper.
    at_the_cut = torch.zeros(3, WIDTH)
    at_the_cut[:, 0] = torch.tensor([0.4495, 0.45, 0.451])
    at_the_cut[:, 1] = (1 - at_the_cut[:, 0] ** 2).sqrt()
    axis = Codebook(torch.eye(WIDTH)[:1], {"id": "axis", "model": "model-a"})
    view = VisualTokens(at_the_cut.half(), (1, 3))
    options = {"codebook": axis, "score_dtype": "float16"}
    scores = make("rcb", Budget.threshold(0.45), **options).redundancy(view)
    assert scores[1] == torch.tensor(0.45).half()
    assert make("rcb", Budget.threshold(0.45), **options).choose(view).kept.tolist() == [0]
    assert make("rcb", Budget.threshold(0.45), preset="paper", **options).choose(view).kept.tolist() == [0, 1]


def test_rcb_scores_of_tokens_equal_to_a_prototype_are_at_most_one():
    """Rounding gives cosines of 1.0000001, which no threshold could name: fitting to all tokens failed."""
    codebook = make_codebook(64)
    view = VisualTokens(codebook.prototypes * torch.linspace(0.1, 3, 64)[:, None], (8, 8))
    pruner = make("rcb", codebook=codebook)
    scores = pruner.evidence(view)
    assert scores.max() == 1
    assert len(pruner.fit([scores], [1], 64).choose(view)) == 64


@pytest.mark.parametrize("score_dtype", ["float32", "float16", "bfloat16"])
def test_rcb_scores_of_tokens_of_zeros_are_zero(score_dtype):
    view = VisualTokens(torch.zeros(3, WIDTH), (1, 3))
    assert make("rcb", score_dtype=score_dtype).redundancy(view).tolist() == [0, 0, 0]


def tied_view(*levels):
    """Tokens of exact cosines 0, 0.6, 0.8 and 1 to the first axis."""
    rows = {0.0: (0, 1), 0.6: (3, 4), 0.8: (4, 3), 1.0: (1, 0)}
    features = torch.zeros(len(levels), WIDTH)
    features[:, :2] = torch.tensor([rows[level] for level in levels], dtype=torch.float32)
    return VisualTokens(features, (1, len(levels)))


@pytest.mark.parametrize(
    ("preset", "ties", "kept"),
    [
        ("official", 0, [1]),
        ("official", 3, [1, 2]),
        ("official", 4, [1, 2, 3]),
        ("official", Budget.ALL_TIES, [1, 2, 3, 5]),
        ("paper", 0, [1, 2, 3, 5]),
        ("paper_literal", 0, [1, 2, 3, 5]),
        ("paper", 4, [1, 2, 3]),
    ],
)
def test_rcb_ties_at_the_threshold(preset, ties, kept):
    axis = Codebook(torch.eye(WIDTH)[:1], {"id": "axis", "model": "model-a"})
    view = tied_view(0.8, 0.0, 0.6, 0.6, 1.0, 0.6)
    limit = make("rcb", Budget.tokens(1), codebook=axis).redundancy(view)[2].item()
    pruner = make("rcb", Budget.threshold(limit, ties), codebook=axis, preset=preset)
    assert pruner.choose(view).kept.tolist() == kept


def test_rcb_exact_counts_break_ties_by_position():
    axis = Codebook(torch.eye(WIDTH)[:1], {"id": "axis", "model": "model-a"})
    view = tied_view(0.8, 0.0, 0.6, 0.6, 1.0, 0.6)
    assert make("rcb", Budget.tokens(3), codebook=axis).choose(view).kept.tolist() == [1, 2, 3]
    assert make("rcb", Budget.ratio(0.34), codebook=axis).choose(view).kept.tolist() == [1, 2]


def test_rcb_keeps_the_least_redundant_when_nothing_passes():
    view = make_view()
    scores = make("rcb").redundancy(view)
    for min_keep, forced in ((1, 1), (3, 3), (0, 0), (99, 24)):
        selection = make("rcb", Budget.threshold(-1), min_keep=min_keep).choose(view)
        assert selection.forced == forced
        assert selection.kept.tolist() == sorted(scores.argsort()[:forced].tolist())
    some = make("rcb", Budget.threshold(scores.sort().values[2].item()), min_keep=3).choose(view)
    assert (len(some), some.forced) == (3, 1)


@pytest.mark.parametrize("tile", [1, 7, 64])
def test_rcb_in_small_tiles(monkeypatch, tile):
    monkeypatch.setattr("rcb_lmms.pruners.rcb.TILE", tile)
    np.testing.assert_allclose(
        make("rcb").redundancy(make_view(40)), cosines(make_view(40), make_codebook()).max(1), atol=2e-7
    )


def double_softmax(table):
    n, m = table.shape
    scores = []
    for i in range(n):
        over_prototypes = sum(math.exp(table[i, k]) for k in range(m))
        products = []
        for j in range(m):
            over_tokens = sum(math.exp(table[k, j]) for k in range(n))
            products.append(math.exp(table[i, j]) / over_tokens * math.exp(table[i, j]) / over_prototypes)
        scores.append(max(products))
    return np.array(scores)


def test_double_softmax_equals_naive_loops():
    view, codebook = make_view(30), make_codebook()
    expected = double_softmax(cosines(view, codebook))
    pruner = make("rcb", Budget.tokens(11), codebook=codebook, variant="double_softmax")
    np.testing.assert_allclose(pruner.redundancy(view), expected, rtol=2e-6)
    assert pruner.choose(view).kept.tolist() == sorted(np.argsort(expected)[:11].tolist())
    by_cosine = make("rcb", Budget.tokens(11), codebook=codebook).choose(view)
    assert pruner.choose(view).kept.tolist() != by_cosine.kept.tolist()


def test_double_softmax_in_float16_drops_ties_at_the_cut_as_released():
    """OneVision's sizes: products of two softmaxes are subnormal in float16, where most of them are equal."""
    view, codebook = make_view(729, dtype=torch.float16), make_codebook(310)
    options = {"codebook": codebook, "variant": "double_softmax", "score_dtype": "float16"}
    exact = make("rcb", Budget.tokens(144), **options).choose(view)
    assert len(exact) == 144
    official = make("rcb", Budget.tokens(144), tie_mode="official", **options).choose(view)
    scores = (-official.scores).tolist()
    cut = sorted(scores, reverse=True)[585 - 1]  # 585 of 729 go
    assert len(official) == sum(score < cut for score in scores) < 144
    assert set(official.kept.tolist()) < set(exact.kept.tolist())
    everything = make("rcb", Budget.ratio(1), tie_mode="official", **options).choose(view)
    assert len(everything) == 729
    untied = make("rcb", Budget.tokens(144), codebook=codebook, variant="double_softmax", tie_mode="official")
    assert len(untied.choose(view)) == 144


def test_rcb_takes_codebooks_by_path(tmp_path):
    path = make_codebook().save(tmp_path / "tiny.safetensors")
    expected = make("rcb", Budget.tokens(5)).choose(make_view())
    for source in (path, str(path)):
        assert torch.equal(make("rcb", Budget.tokens(5), codebook=source).choose(make_view()).kept, expected.kept)


def test_rcb_refuses_foreign_or_missing_codebooks():
    with pytest.raises(UserError) as caught:
        make("rcb", Budget.tokens(5), codebook=make_codebook(width=16)).choose(make_view())
    message = str(caught.value)
    assert all(part in message for part in ("12", "16", "model-a", "the model in use"))
    with pytest.raises(UserError, match="rcb codebook build"):
        make_pruner("rcb", budget=Budget.tokens(5))
    with pytest.raises(UserError, match=r"threshold=0\.45"):
        make("rcb").choose(make_view())
    for option in ("variant", "score_dtype", "tie_mode"):
        with pytest.raises(UserError, match="nonsense"):
            make("rcb", Budget.tokens(5), **{option: "nonsense"})


@pytest.mark.parametrize("options", [{}, {"variant": "double_softmax"}])
def test_rcb_refuses_a_floor_above_its_count(options):
    """144 tokens stayed where 64 were asked for."""
    with pytest.raises(BudgetError, match="min_keep=1000"):
        make("rcb", Budget.tokens(5), min_keep=1000, **options)
    with pytest.raises(BudgetError, match="a floor of at most 6"):
        make("rcb", Budget.ratio(0.25), min_keep=7, **options).choose(make_view())
    assert len(make("rcb", Budget.tokens(5), min_keep=5, **options).choose(make_view())) == 5


@pytest.mark.parametrize(
    ("name", "option", "least"),
    [("rcb", "min_keep", 0), ("prumerge", "neighbours", 1), ("fastv", "layer", 1), ("random", "seed", 0)],
)
def test_whole_numbers_are_whole_numbers(name, option, least):
    for value in ("abc", "3", 2.5, 2.0, float("nan"), True, None, [2], least - 1):
        with pytest.raises(UserError, match=f"a whole number, {least} or more"):
            make(name, Budget.tokens(5), **{option: value})


def brute_force_fit(evidence, weights, target, min_keep=0):
    """The smallest distance to the target over every cut (score, position), and where there is `min_keep` over none."""
    cuts = sorted({(score, position) for view in evidence for position, score in enumerate(view.tolist())})
    means = []
    for cut in [(ALWAYS, -1)] * (min_keep > 0) + cuts:
        total = sum(
            weight * max(min_keep, sum((score, position) <= cut for position, score in enumerate(view.tolist())))
            for view, weight in zip(evidence, weights, strict=True)
        )
        means.append(total / sum(weights))
    return min(abs(mean - target) for mean in means)


@pytest.mark.parametrize("levels", [None, 7, 2, 1])
@pytest.mark.parametrize("target", [0.7, 1, 3.3, 8, 11.9, 12])
@pytest.mark.parametrize("min_keep", [0, 1, 3])
def test_rcb_fit_equals_brute_force_over_all_cuts(levels, target, min_keep):
    generator = np.random.default_rng(3)
    sizes, weights = [12, 9, 15, 12], [1, 5, 2.5, 3]
    evidence = [generator.uniform(-1, 1, size).astype(np.float32) for size in sizes]
    if levels is not None:  # heavy ties
        evidence = [np.round(view * levels / 2) / np.float32(levels) for view in evidence]
    evidence = [view.astype(np.float32) for view in evidence]
    native = np.average(sizes, weights=weights)
    pruner = make("rcb", min_keep=min_keep)
    if target > native:
        with pytest.raises(UserError, match="native tokens per view"):
            pruner.fit(evidence, weights, target)
        return
    fitted = pruner.fit(evidence, weights, target)
    achieved = np.average([fitted.retained(view) for view in evidence], weights=weights)
    assert abs(achieved - target) == pytest.approx(brute_force_fit(evidence, weights, target, min_keep), abs=1e-9)
    assert fitted.budget.kind == "threshold"
    assert fitted.budget.value in [ALWAYS] * (min_keep > 0) + np.concatenate(evidence).tolist()


@pytest.mark.parametrize("preset", ["official", "paper"])
@pytest.mark.parametrize("target", [1, 5.3, 12, 24])
def test_rcb_fit_is_met_when_views_are_selected(preset, target):
    views = [make_view(seed=seed) for seed in range(6)]
    for view in views[3:]:
        view.features[4:20] = view.features[4]  # a sky: sixteen tokens alike
    pruner = make("rcb", preset=preset, min_keep=0)
    evidence = [pruner.evidence(view) for view in views]
    fitted = pruner.fit(evidence, [1] * 6, target)
    counts = [len(fitted.choose(view)) for view in views]
    assert counts == [fitted.retained(array) for array in evidence]
    assert np.mean(counts) == pytest.approx(target, abs=0.5 / 6 * 3 + 1e-9)
    assert np.mean(counts) == pytest.approx(target, abs=brute_force_fit(evidence, [1] * 6, target) + 1e-9)


def test_rcb_fit_of_one_view_is_within_half_a_token():
    for levels, target in itertools.product((1, 3), (1, 1.4, 5.5, 11.2, 16)):
        scores = np.round(np.linspace(0, levels, 16)).astype(np.float32) / 10
        fitted = make("rcb").fit([scores], [2], target)
        assert abs(fitted.retained(scores) - target) <= 0.5


def test_rcb_fit_refuses_targets_out_of_reach():
    scores = [np.zeros(10, np.float32), np.ones(20, np.float32)]
    with pytest.raises(UserError, match=r"17\.5 native tokens per view"):
        make("rcb").fit(scores, [1, 3], 18)
    with pytest.raises(UserError, match="positive"):
        make("rcb").fit(scores, [1, 3], 0)
    # One token of every fourth question is a mean of 0.25, and 0.1 is nearer to none.
    with pytest.raises(UserError, match=r"means from 0\.25"):
        make("rcb", min_keep=0).fit(scores, [1, 3], 0.1)
    assert make("rcb").fit(scores, [1, 3], 17.5).budget == Budget.threshold(1.0, ties=20)


# Random.


def test_random_depends_on_seed_and_content_alone():
    views = [make_view(seed=seed, key=f"image-{seed}") for seed in range(5)]
    pruner = make("random", Budget.tokens(6))
    forward = [pruner.choose(view).kept.tolist() for view in views]
    torch.rand(17)
    backward = [pruner.choose(view).kept.tolist() for view in reversed(views)]
    assert forward == backward[::-1]
    assert len({tuple(kept) for kept in forward}) == 5
    assert forward[0] != make("random", Budget.tokens(6), seed=0).choose(views[0]).kept.tolist()
    assert forward[0] == [4, 5, 6, 14, 18, 22]  # the same on every machine


def test_random_is_uniform():
    pruner = make("random", Budget.tokens(6))
    hits = np.zeros(24)
    for draw in range(400):
        hits[pruner.choose(make_view(seed=0, key=str(draw))).kept.numpy()] += 1
    # Each count is hypergeometric with mean 100 and deviation 8.7; 4.5 deviations.
    assert np.abs(hits - 100).max() < 39


# PruMerge.


def slow_prumerge(view, plus=False):
    """The released code's steps for one image, with loops: kept tokens in its order, then the merged features."""
    a = view.cls_attention.double().tolist()
    x, keys = view.encoder_features.double().numpy(), view.keys.double().numpy()
    n = len(a)
    q1, q3 = (float(np.percentile(view.cls_attention.numpy(), q, method="linear")) for q in (25, 75))
    outliers = [value for value in a if value > q3 + 1.5 * (q3 - q1)]
    ratio = len(outliers) / n
    order = sorted(range(n), key=lambda i: (-a[i], i))
    kept = order[: int(n * ratio)]
    if plus:
        stride = int(int(1 / ratio) / 3)
        kept = kept + [i for i in range(0, n - 1, stride) if i not in kept]
    merged = []
    for i in kept:
        cosine = {j: keys[i] @ keys[j] / np.linalg.norm(keys[i]) / np.linalg.norm(keys[j]) for j in range(n) if j != i}
        nearest = sorted(cosine, key=lambda j: (-cosine[j], j))[:32]
        merged.append(x[i] + sum(a[j] * x[j] for j in nearest))
    merged.append(sum(a[j] * x[j] for j in range(n) if j not in kept))
    return kept, np.array(merged)


@pytest.mark.parametrize("name", PRUMERGE)
@pytest.mark.parametrize(("outliers", "n"), [(9, 100), (20, 576), (35, 576)])
def test_prumerge_equals_the_released_steps(name, outliers, n):
    view = peaked_view(outliers, n)
    kept, merged = slow_prumerge(view, plus=name == "prumerge_plus")
    official = make(name, order="official").choose(view)
    assert official.kept.tolist() == kept
    np.testing.assert_allclose(official.features, merged, atol=2e-6)
    ascending = make(name, Budget.adaptive()).choose(view)
    assert ascending.kept.tolist() == sorted(kept)
    places = [kept.index(i) for i in sorted(kept)]
    np.testing.assert_allclose(ascending.features, merged[[*places, len(kept)]], atol=2e-6)
    assert torch.equal(ascending.scores, view.cls_attention)


@pytest.mark.parametrize(
    ("outliers", "most"), [(16, 64), (20, 84), (32, 128), (35, 150), (40, 184), (50, 242), (60, 252), (70, 358)]
)
def test_prumerge_plus_counts_of_the_released_stride(outliers, most):
    view = peaked_view(outliers)
    assert count_outliers(view.cls_attention) == outliers
    kept = make("prumerge_plus", order="official").choose(view).kept.tolist()
    stride = int(int(1 / (outliers / 576)) / 3)
    grid = list(range(0, 575, stride))
    assert outliers + len(grid) == most
    assert len(kept) == most - len(set(grid) & set(kept[:outliers]))
    assert len(set(kept)) == len(kept)


def test_outliers_lie_strictly_above_the_fence_of_the_box_plot():
    attention = torch.arange(101.0)  # quartiles 25 and 75, fence 150
    for last, outliers in ((100, 0), (150, 0), (150.001, 1)):
        attention[100] = last
        assert count_outliers(attention) == outliers


@pytest.mark.parametrize("name", PRUMERGE)
def test_prumerge_without_outliers_or_with_too_many(name):
    flat = replace(make_view(576), cls_attention=torch.full((576,), 1e-3))
    assert len(make(name).choose(flat).kept) == {"prumerge": 1, "prumerge_plus": 3}[name]
    many = peaked_view(140)
    selection = make(name).choose(many)
    assert len(selection.kept) == {"prumerge": 140, "prumerge_plus": 575}[name]
    assert len(selection) <= 576


def test_prumerge_scale():
    view = peaked_view(20)
    counts = {scale: len(make("prumerge", scale=scale).choose(view)) for scale in (0, 0.5, 1, 3.5, 28.7, 100)}
    assert counts == {0: 2, 0.5: 11, 1: 21, 3.5: 71, 28.7: 575, 100: 576}


def test_prumerge_with_a_count_takes_the_highest_attention():
    view = peaked_view(20)
    selection = make("prumerge", Budget.tokens(64)).choose(view)
    assert len(selection) == 64
    assert selection.kept.tolist() == sorted(view.cls_attention.argsort(descending=True)[:63].tolist())
    assert len(make("prumerge", Budget.ratio(0.25)).choose(view)) == 144


def test_prumerge_plus_with_a_count_spreads_the_rest():
    view = peaked_view(20)
    best = view.cls_attention.argsort(descending=True)[:20].tolist()
    kept = make("prumerge_plus", Budget.tokens(65), order="official").choose(view).kept.tolist()
    assert kept[:20] == best
    rest = [i for i in range(576) if i not in best]
    assert kept[20:] == [rest[j * 556 // 44] for j in range(44)]
    few = make("prumerge_plus", Budget.tokens(11), order="official").choose(view).kept.tolist()
    assert few == best[:10]


def test_prumerge_refusals():
    with pytest.raises(UserError, match="CLS token"):
        make("prumerge").choose(replace(make_view(), cls_attention=None))
    for name in PRUMERGE:
        with pytest.raises(UserError, match="2 to 24 tokens"):
            make(name, Budget.tokens(1)).choose(make_view())
        with pytest.raises(UserError, match="ascending, official"):
            make(name, order="raster")
        for scale in (-1, float("nan"), float("inf"), "abc", True):
            with pytest.raises(UserError, match="a number, 0 or more"):
                make(name, scale=scale)


def test_prumerge_fit_equals_brute_force_over_scales():
    views = [peaked_view(outliers, seed=outliers) for outliers in (5, 12, 12, 31, 60)] + [peaked_view(7, 100)]
    weights = [3, 1, 2, 1, 4, 2]
    pruner = make("prumerge")
    evidence = [pruner.evidence(view).numpy() for view in views]
    assert [view.tolist() for view in evidence][3:] == [[31, 576], [60, 576], [7, 100]]

    def mean(scale):
        return np.average([min(n - 1, max(1, round(scale * k))) + 1 for k, n in evidence], weights=weights)

    grid = np.unique([(2 * j + 1) / (2 * k) for k, n in evidence for j in range(int(n))])
    means = np.array([mean(scale) for scale in [0.0, *((grid[1:] + grid[:-1]) / 2), grid[-1] + 1]])
    for target in [2, 502, *np.linspace(2.2, 502, 40)]:  # all tokens are 502.8 on average
        fitted = pruner.fit(evidence, weights, target)
        assert abs(mean(fitted.scale) - target) == pytest.approx(np.abs(means - target).min(), abs=1e-9)
    fitted = pruner.fit(evidence, weights, 64)
    assert [fitted.retained(array) for array in evidence] == [len(fitted.choose(view)) for view in views]


def test_prumerge_fit_refuses_what_no_scale_reaches():
    pruner = make("prumerge")
    evidence = [np.array([10, 576]), np.array([0, 576])]  # without outliers there is one centre at any scale
    assert pruner.fit(evidence, [1, 1], 289).retained(evidence[0]) == 576
    for target in (1.5, 290):
        with pytest.raises(UserError, match=r"means from 2 .* to 289"):
            pruner.fit(evidence, [1, 1], target)


def test_prumerge_plus_meets_a_mean_by_a_count():
    pruner = make("prumerge_plus")
    assert pruner.evidence(make_view()) is None
    fitted = pruner.fit([np.array([30.0])], [1], 143.6)
    assert fitted.budget == Budget.tokens(144)
    assert fitted.retained(np.array([30.0])) == len(fitted.choose(peaked_view(20))) == 144


def test_cls_attention_is_a_softmax_over_cls_and_patches():
    view_keys = torch.randn(5, 4)
    query = torch.randn(4)
    logits = [sum(q * k for q, k in zip(query.tolist(), row.tolist(), strict=True)) / 2 for row in view_keys]
    total = sum(math.exp(value) for value in logits)
    expected = [math.exp(value) / total for value in logits[1:]]
    attention = cls_attention_from(query, view_keys)
    torch.testing.assert_close(attention, torch.tensor(expected))
    assert attention.sum() < 1


# FastV.


def test_fastv_ranks():
    nominal = make("fastv", Budget.tokens(64))
    assert nominal.rank(576, 32) == 64
    assert make("fastv", Budget.ratio(0.25)).rank(576, 32) == 144
    averaged = make("fastv", Budget.tokens(144), convention="layer_average")
    assert averaged.rank(576, 32) == 115
    assert replace(averaged, layer=3).rank(576, 32) == 99
    with pytest.raises(UserError, match=r"layer averages from 180\.9"):
        make("fastv", Budget.tokens(64), convention="layer_average").rank(2880, 32)
    for options in ({"layer": 0}, {"mode": "zero"}, {"convention": "mean"}):
        with pytest.raises(UserError):
            make("fastv", Budget.tokens(64), **options)


# Stride.


def test_stride_takes_the_middles_of_equal_parts():
    for n in (1, 7, 24, 144):
        for count in range(1, n + 1):
            kept = make("stride", Budget.tokens(count)).choose(make_view(n)).kept.tolist()
            assert kept == [math.floor((i + Fraction(1, 2)) * Fraction(n, count)) for i in range(count)]
            assert len(set(kept)) == count
    assert make("stride", Budget.ratio(0.25)).choose(make_view(24)).kept.tolist() == [2, 6, 10, 14, 18, 22]


def test_stride_counts_the_views_of_an_image_together():
    views = [make_view(n, seed) for seed, n in enumerate((9, 4, 25))]
    found = select(make("stride", Budget.tokens(5)), views, "image")  # 38 tokens: 3, 11, 19, 26, 34
    assert [own.kept.tolist() for own in found] == [[3], [2], [6, 13, 21]]
    assert [own.scores.nonzero().flatten().tolist() for own in found] == [[3], [2], [6, 13, 21]]


# Downsampling; what the vision tower makes of it is in test_downsample.py.


@pytest.mark.parametrize("side", [1, 4, 24, 27])
def test_a_smaller_view_is_as_near_to_a_square_and_to_its_budget_as_promised(side):
    for count in range(1, side * side + 1):
        rows, columns = make("downsample", Budget.tokens(count)).grid((side, side))
        assert rows * rows <= count < (rows + 1) ** 2
        assert rows <= columns <= side
        wider = columns + 1 <= side and rows * (columns + 1) <= count
        assert rows * columns <= count
        assert not wider
        assert (rows * columns == count) or (math.sqrt(count) % 1)
    assert (rows, columns) == (side, side)


def test_budgets_of_the_paper_as_smaller_views():
    grids = {144: (12, 12), 115: (10, 11), 86: (9, 9), 64: (8, 8), 58: (7, 8), 32: (5, 6), 29: (5, 5), 6: (2, 3)}
    for count, grid in grids.items():
        assert make("downsample", Budget.tokens(count)).grid((24, 24)) == grid
    assert make("downsample", Budget.ratio(0.25)).grid((27, 27)) == (13, 14)  # 182 of 729
    # Views that share a budget are made equal.
    assert make("downsample", Budget.tokens(14)).grid((4, 4), views=3) == (2, 2)
    assert make("downsample", Budget.ratio(0.25)).grid((4, 4), views=3) == (2, 2)
    for count, views, words in ((2, 3, "3 views of it"), (17, 1, "1 to 16"), (51, 3, "1 to 16")):
        with pytest.raises(UserError, match=words):
            make("downsample", Budget.tokens(count)).grid((4, 4), views)


@pytest.mark.parametrize("native", [24, 144, 196, 729])
def test_double_softmax_keeps_what_the_released_rounding_of_the_dropped_share_leaves(native):
    view, codebook = make_view(native), make_codebook(7)
    for share in (0.1, 0.25, 1 / 3, 0.5, 0.7, 1.0):
        pruner = make("rcb", Budget.ratio(share), codebook=codebook, variant="double_softmax")
        cosines = np.asarray(view.features, dtype=np.float64)
        rows = codebook.prototypes.numpy().astype(np.float64)
        cosines = cosines @ rows.T / np.linalg.norm(cosines, axis=1)[:, None] / np.linalg.norm(rows, axis=1)
        powers = np.exp(cosines)
        redundancy = (powers / powers.sum(0) * (powers / powers.sum(1)[:, None])).max(1)
        dropped = round(native * (1 - share))
        # As released: the tokens strictly below the last one that goes.
        expected = np.flatnonzero(redundancy < np.sort(redundancy)[-dropped]) if dropped else np.arange(native)
        assert pruner.choose(view).kept.tolist() == expected.tolist()
    half = make("rcb", Budget.ratio(0.5), codebook=codebook, variant="double_softmax")
    assert len(half.choose(make_view(729))) == 365


def test_random_draws_what_the_released_code_draws():
    views = [make_view(seed=seed) for seed in range(3)]
    pruner = make("random", Budget.tokens(7), draws="released")
    torch.manual_seed(1234)
    kept = [pruner.choose(view).kept.tolist() for view in views]
    torch.manual_seed(1234)
    assert kept == [torch.rand(24).argsort()[:7].sort().values.tolist() for _ in views]
