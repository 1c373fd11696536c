"""The distances between two engines' answers, against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from crosschip.golden.distance import bucketed_kl, kl_of_lists, mean_with_bound, top1_agreement
from crosschip.golden.views import curve_distance


def kl_by_hand(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def test_bucketed_kl_is_the_kl_of_the_buckets() -> None:
    p, q = [0.5, 0.3, 0.2], [0.4, 0.4, 0.2]
    found = bucketed_kl(np.log([p[:2]]), np.log([q[:2]]), np.log(p[2:]), np.log(q[2:]))
    assert found[0] == pytest.approx(kl_by_hand(p, q))


def test_lists_are_treated_alike_on_both_sides() -> None:
    same = {1: math.log(0.6), 2: math.log(0.3)}
    assert kl_of_lists([same], [same])[0] == 0.0
    p, q = {1: math.log(0.6), 2: math.log(0.3)}, {1: math.log(0.5), 2: math.log(0.4)}
    assert kl_of_lists([p], [q])[0] == pytest.approx(kl_by_hand([0.6, 0.3, 0.1], [0.5, 0.4, 0.1]))


def test_a_near_tie_at_the_end_of_the_lists_costs_little_and_other_tokens_much() -> None:
    p = {1: math.log(0.7), 2: math.log(0.10001)}
    q = {1: math.log(0.7), 3: math.log(0.10001)}
    assert kl_of_lists([p], [q])[0] < 1e-4
    assert kl_of_lists([{1: math.log(0.9)}], [{2: math.log(0.9)}])[0] > 1.0


def test_a_token_that_is_listed_for_another_reason_does_not_bound_the_others() -> None:
    """The prompt's own next token stands in both lists however unlikely it is; what is not listed may be likelier."""
    top = {1: math.log(0.5), 2: math.log(0.2), 3: math.log(0.101)}
    other = {1: math.log(0.5), 2: math.log(0.2), 4: math.log(0.101)}
    least = [(math.log(0.101), math.log(0.101))]
    near = kl_of_lists([top], [other], least)[0]
    beside = {9: math.log(1e-6)}
    assert kl_of_lists([top | beside], [other | beside], least)[0] == pytest.approx(near, abs=1e-4)
    assert kl_of_lists([top | beside], [other | beside])[0] > 10 * near, "bounded by the unlikely one"


@pytest.mark.parametrize("wrong", [{1: math.nan}, {}])
def test_what_is_no_number_is_infinitely_far(wrong: dict[int, float]) -> None:
    assert kl_of_lists([{1: -0.1}], [wrong])[0] == math.inf
    assert mean_with_bound(np.array([0.0, math.inf])).upper_95 == math.inf


def test_the_bound_holds_the_mean_in_95_of_100_cases() -> None:
    draws = np.random.default_rng(0).exponential(size=(2000, 200))
    held = np.mean([mean_with_bound(draw).upper_95 > 1.0 for draw in draws])
    assert 0.92 < held < 0.97  # exponential draws are skewed: the normal approximation is a little short


def test_agreement_by_margin_forgives_near_ties() -> None:
    plain, weighted = top1_agreement(np.array([1, 2]), np.array([1, 3]), np.array([5.0, 0.001]))
    assert plain == 0.5
    assert weighted > 0.999


def test_a_curve_is_as_far_as_all_its_steps_are() -> None:
    """One step of an honest chip may differ much; a wrong backward differs at each."""
    recorded = [2.0, 2.0, 2.0, 2.0]
    found = curve_distance((recorded, recorded), ([2.0, 2.2, 2.0, 2.0], [2.2, 2.2, 1.8, 1.8]))
    assert (found.loss, found.loss_step) == (pytest.approx(0.1 / 2), 2)
    assert found.gradient_norm == pytest.approx(0.1)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 1e300])
def test_a_curve_with_a_step_that_is_no_number_is_far(wrong: float) -> None:
    assert curve_distance(([2.0, 2.0], [1.0, 1.0]), ([2.0, wrong], [1.0, 1.0])).loss > 1e6
