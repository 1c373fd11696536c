"""The tests and intervals keep what they promise, over simulated pairs; each with what happens when a formula is wrong.

Rates over N simulations are held to the promise plus or minus 3.3 standard errors of a rate over N (1 in 1,000).
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from crosschip.handoff.answers.verdicts import verdict_of
from crosschip.paired.intervals import bootstrap_shares, score_interval
from crosschip.paired.pairs import PairTable, sign_test, table_of
from crosschip.paired.power import (
    pairs_for_difference,
    pairs_for_margin,
    power_of_test,
    smallest_difference,
    smallest_length_difference,
)

ALPHA = 0.05


def slack(rate: float, trials: int) -> float:
    return 3.3 * math.sqrt(rate * (1 - rate) / trials)


def drawn(rng: np.random.Generator, num: int, discordance: float, drop: float) -> PairTable:
    """Independent pairs, one a problem."""
    lost, gained = (discordance + drop) / 2, (discordance - drop) / 2
    differences = rng.choice([-1, 1, 0], size=num, p=[lost, gained, 1 - discordance])
    only_a, only_b = int((differences < 0).sum()), int((differences > 0).sum())
    return PairTable(num - only_a - only_b, only_a, only_b, 0, tuple(differences.tolist()), (1,) * num)


@given(st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_one_pair_a_problem_is_mcnemars_exact_test(gained: int, lost: int) -> None:
    found = sign_test([1] * gained + [-1] * lost + [0] * 7)
    num, few = gained + lost, min(gained, lost)
    expected = stats.binomtest(few, num, 0.5).pvalue if num else 1.0
    assert found.exact == pytest.approx(expected, abs=1e-12)
    if gained != lost:  # the textbook's mid-p: the exact p minus the chance of what was seen
        assert found.mid_p == pytest.approx(expected - stats.binom.pmf(few, num, 0.5), abs=1e-12)


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_several_pairs_a_problem_flip_together(differences: list[int]) -> None:
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    expected = sum(each >= abs(sum(differences)) for each in sums) / len(sums)
    assert sign_test(differences).exact == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("discordance", [0.02, 0.1, 0.4])
def test_false_alarms_stay_below_alpha(discordance: float) -> None:
    rng, trials = np.random.default_rng(1), 3000
    alarms = sum(sign_test(drawn(rng, 200, discordance, 0.0).differences).exact <= ALPHA for _ in range(trials))
    assert alarms / trials <= ALPHA + slack(ALPHA, trials)


def test_samples_of_one_problem_are_no_new_problems() -> None:
    """Five answers that fall together: flipped one by one they alarm far too often, flipped by problem they do not."""
    rng, trials = np.random.default_rng(2), 1500
    alarms = naive = 0
    for _ in range(trials):
        by_problem = rng.choice([-5, 5, 0], size=60, p=[0.1, 0.1, 0.8])
        alarms += sign_test(by_problem.tolist()).exact <= ALPHA
        naive += sign_test(np.repeat(np.sign(by_problem), 5).tolist()).exact <= ALPHA
    assert alarms / trials <= ALPHA + slack(ALPHA, trials)
    assert naive / trials > 4 * ALPHA


@pytest.mark.parametrize(("num", "discordance"), [(60, 0.0), (200, 0.05), (500, 0.3)])
def test_the_smallest_difference_is_found_with_the_promised_power(num: int, discordance: float) -> None:
    rng, trials = np.random.default_rng(3), 2000
    drop = smallest_difference(num, discordance, ALPHA)
    assert drop is not None

    def rate(of: float) -> float:
        tables = (drawn(rng, num, max(discordance, of), of) for _ in range(trials))
        return sum(each.difference < 0 and sign_test(each.differences).exact <= ALPHA for each in tables) / trials

    assert abs(rate(drop) - 0.8) <= slack(0.8, trials)
    assert rate(drop * 0.8) < 0.8 - slack(0.8, trials)  # a formula that is a fifth off would show


def test_too_few_pairs_see_nothing() -> None:
    """Five pairs that all differ have p = 1/16."""
    assert smallest_difference(5, 0.2, ALPHA) is None
    assert power_of_test(5, 1.0, 1.0, ALPHA) == 0.0
    assert power_of_test(6, 1.0, 1.0, ALPHA) == pytest.approx(1.0)


@pytest.mark.parametrize("discordance", [0.01, 0.1, 0.4])
def test_the_number_of_pairs_for_one_point_is_enough_and_not_much_more(discordance: float) -> None:
    num = pairs_for_difference(0.01, discordance, ALPHA)
    assert num is not None
    assert power_of_test(num, discordance, 0.01, ALPHA) >= 0.8
    assert power_of_test(0.9 * num, discordance, 0.01, ALPHA) < 0.8


def test_the_score_interval_of_pairs_that_never_differ_has_its_closed_form() -> None:
    table = PairTable(150, 0, 0, 0, (0,) * 150, (1,) * 150)
    z2 = stats.norm.ppf(0.95) ** 2
    found = score_interval(table, 0.9)
    assert (found.low, found.high) == pytest.approx((-z2 / (150 + z2), z2 / (150 + z2)), abs=1e-8)
    assert bootstrap_shares(table, 0.9, 0).high == 0.0  # which is why it decides nothing


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 200))
@settings(max_examples=60, deadline=None)
def test_the_score_interval_leaves_out_zero_where_the_score_test_rejects(gained: int, lost: int, same: int) -> None:
    """Tango's statistic at no difference is McNemar's, (b - c) / sqrt(b + c)."""
    differences = (1,) * gained + (-1,) * lost + (0,) * same
    found = score_interval(PairTable(same, lost, gained, 0, differences, (1,) * len(differences)), 0.95)
    assert -1 <= found.low <= (gained - lost) / len(differences) <= found.high <= 1
    statistic = (gained - lost) / math.sqrt(gained + lost) if gained + lost else 0.0
    if abs(abs(statistic) - 1.959964) > 1e-3:
        assert (not found.low <= 0 <= found.high) == (abs(statistic) > 1.959964)


@pytest.mark.parametrize(("num", "discordance", "drop"), [(60, 0.05, 0.0), (200, 0.02, 0.01), (400, 0.2, 0.05)])
def test_the_score_interval_covers(num: int, discordance: float, drop: float) -> None:
    """Near its level on average (Tango 1998: within about two points)."""
    rng, trials = np.random.default_rng(4), 1000
    covers = 0
    for _ in range(trials):
        interval = score_interval(drawn(rng, num, discordance, drop), 0.9)
        covers += interval.low <= -drop <= interval.high
    assert covers / trials >= 0.88 - slack(0.9, trials)


def test_the_bootstrap_of_shares_does_not_cover_where_few_differ() -> None:
    rng = np.random.default_rng(5)
    intervals = [bootstrap_shares(drawn(rng, 60, 0.02, 0.01), 0.9, 0) for _ in range(60)]
    assert sum(each.low <= -0.01 <= each.high for each in intervals) / 60 < 0.8


def test_equivalence_is_rarely_found_where_the_drop_is_the_margin() -> None:
    rng, trials = np.random.default_rng(6), 1500
    passes = 0
    for _ in range(trials):
        table = drawn(rng, 600, 0.06, 0.03)
        passes += verdict_of(table.difference, score_interval(table, 1 - 2 * ALPHA), 1.0, ALPHA, 0.03) == "PASS"
    assert passes / trials <= ALPHA + slack(ALPHA, trials)


@pytest.mark.parametrize("discordance", [0.0, 0.03, 0.2])
def test_so_many_pairs_show_equivalence(discordance: float) -> None:
    rng, trials = np.random.default_rng(7), 600
    num = pairs_for_margin(0.03, discordance, ALPHA)

    def rate(of: int) -> float:
        tables = [drawn(rng, of, discordance, 0.0) for _ in range(trials)]
        found = [verdict_of(each.difference, score_interval(each, 0.9), 1.0, ALPHA, 0.03) for each in tables]
        return found.count("PASS") / trials

    assert rate(num) >= 0.8 - slack(0.8, trials)
    assert rate(int(0.7 * num)) < 0.8
    assert pairs_for_margin(0.01, 0.2, ALPHA) < 20_000  # by the normal approximation


def test_a_verdict_fails_an_honest_pair_no_more_often_than_alpha() -> None:
    rng, trials = np.random.default_rng(8), 1500
    fails = 0
    for _ in range(trials):
        table = drawn(rng, 150, 0.1, 0.0)
        p = sign_test(table.differences).exact
        fails += verdict_of(table.difference, score_interval(table, 0.9), p, ALPHA, 0.01) == "FAIL"
    assert fails / trials <= ALPHA / 2 + slack(ALPHA / 2, trials)  # only drops fail


def test_the_design_effect_counts_copies_once_and_strangers_fully() -> None:
    rng = np.random.default_rng(9)
    once = [(f"{place}", bool(a), bool(b)) for place, (a, b) in enumerate(rng.random((300, 2)) < 0.7)]
    copies = table_of(once * 4)
    assert copies.design_effect == pytest.approx(4.0, rel=0.02)
    assert score_interval(copies, 0.9).high == pytest.approx(score_interval(table_of(once), 0.9).high, rel=0.03)
    strangers = table_of(
        [(f"{place % 300}", bool(a), bool(b)) for place, (a, b) in enumerate(rng.random((1200, 2)) < 0.7)]
    )
    assert strangers.design_effect < 1.3
    few = table_of([("one", True, False)] + [(f"{place % 50}", True, True) for place in range(150)])
    assert few.design_effect == 3.0  # nothing can be told from one problem


def test_the_smallest_length_difference_is_found_with_the_promised_power() -> None:
    rng, trials, num = np.random.default_rng(10), 2000, 100
    seen = smallest_length_difference(12.0, num, ALPHA)
    differences = rng.normal(seen, 12.0, size=(trials, num))
    found = stats.ttest_1samp(differences, 0.0, axis=1).pvalue <= ALPHA
    assert abs(found.mean() - 0.8) <= slack(0.8, trials) + 0.01  # Student's t instead of the normal: under a point
