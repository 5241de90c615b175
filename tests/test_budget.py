"""Budgets: every rounding and every refusal, by number."""

from __future__ import annotations

import pytest

from rcb_lmms.budget import Budget, layer_average, rank_for_layer_average
from rcb_lmms.errors import UserError


@pytest.mark.parametrize(
    ("budget", "native", "count"),
    [
        (Budget.tokens(64), 576, 64),
        (Budget.tokens(576), 576, 576),
        (Budget.ratio(0.25), 576, 144),
        (Budget.ratio(1), 729, 729),
        (Budget.ratio(0.5), 729, 364),  # 364.5 goes to the even neighbour,
        (Budget.ratio(0.5), 731, 366),  # and so does 365.5
        (Budget.ratio(0.1), 10, 1),  # int(10 * (1 - 0.9)) would be 0
        (Budget.ratio(64 / 576), 576, 64),
    ],
)
def test_count(budget, native, count):
    assert budget.count(native) == count


@pytest.mark.parametrize(
    ("budget", "native", "text"),
    [
        (Budget.tokens(577), 576, "1 to 576"),
        (Budget.ratio(0.01), 10, "0 retained tokens"),
        (Budget.threshold(0.45), 576, "threshold=0.45"),
        (Budget.adaptive(), 576, "adaptive"),
    ],
)
def test_count_refuses(budget, native, text):
    with pytest.raises(UserError, match=text):
        budget.count(native)


NO_NUMBERS = [float("nan"), float("inf"), 1e400, -float("inf"), True, False, "64", "nan", None, [36], 10**400]


@pytest.mark.parametrize("count", [0, -1, 0.5, 64.5, 1e300, *NO_NUMBERS])
def test_tokens_are_whole_and_positive(count):
    with pytest.raises(UserError, match="whole numbers"):
        Budget.tokens(count)


@pytest.mark.parametrize("share", [0, -0.1, 1.01, 1e-9, *NO_NUMBERS])
def test_ratio_is_a_share(share):
    with pytest.raises(UserError, match="from 1e-06 to 1"):
        Budget.ratio(share)


@pytest.mark.parametrize("cosine", [-1.1, 1.5, *NO_NUMBERS])
def test_threshold_is_a_cosine(cosine):
    with pytest.raises(UserError, match="-1 to 1"):
        Budget.threshold(cosine)


@pytest.mark.parametrize("ties", [-5, 1.5, 2**31, *NO_NUMBERS])
def test_ties_are_a_position(ties):
    with pytest.raises(UserError, match="from 0 to"):
        Budget.threshold(0.5, ties)


def test_names():
    assert [str(b) for b in (Budget.tokens(64), Budget.ratio(0.25), Budget.threshold(0.45), Budget.adaptive())] == [
        "tokens=64",
        "ratio=0.25",
        "threshold=0.45",
        "adaptive",
    ]


@pytest.mark.parametrize(("rank", "average"), [(144, 171), (64, 96)])
def test_layer_average_of_the_nominal_ranks(rank, average):
    assert layer_average(rank, 576, layer=2, layers=32) == average


@pytest.mark.parametrize(("target", "rank"), [(144, 115), (64, 30), (576, 576)])
def test_rank_for_layer_average(target, rank):
    assert rank_for_layer_average(target, 576, layer=2, layers=32) == rank
    assert layer_average(rank, 576, 2, 32) == pytest.approx(target, abs=0.5)


def test_layer_average_below_the_full_layers_is_refused_with_the_arithmetic():
    with pytest.raises(UserError, match=r"\(2 x 2880 \+ 30 x rank\) / 32 = 64 needs rank -123\.7"):
        rank_for_layer_average(64, 2880, layer=2, layers=32)
