"""From rewards to advantages."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosschip.train.rl.advantages import advantages, counts, has_signal, shaped_reward
from crosschip.train.rl.sample import Group
from tests.train.rl.made import group, problem, sample, settings


def test_an_advantage_is_the_reward_less_the_mean_over_the_deviation() -> None:
    found = advantages(group(1.0, 0.0, 0.0, 1.0), settings())
    assert found.tolist() == [1.0, -1.0, -1.0, 1.0]


def test_without_division_the_spread_of_the_rewards_stays() -> None:
    found = advantages(group(1.0, 0.0, 0.0, 0.0), settings(divide_by_deviation=False))
    assert found.tolist() == [0.75, -0.25, -0.25, -0.25]


def test_bad_answers_may_count_less() -> None:
    rewards = group(1.0, 0.0, 0.0, None, 0.0)
    found = advantages(rewards, settings(divide_by_deviation=False, negative_weight=0.4))
    assert found == pytest.approx([0.75, -0.1, -0.1, 0.0, -0.1])
    only_good = advantages(rewards, settings(negative_weight=0.0))
    assert only_good[0] == advantages(rewards, settings())[0]
    assert not only_good[1:].any()


@pytest.mark.parametrize("num_right", range(1, 8))
def test_where_rewards_are_0_and_1_that_is_a_lower_baseline(num_right: int) -> None:
    """A(r) = c (r - b) with b below the mean: what is added to every answer moves no expected gradient."""
    rewards = [1.0] * num_right + [0.0] * (8 - num_right)
    mean = num_right / 8
    found = advantages(group(*rewards), settings(divide_by_deviation=False, negative_weight=0.25))
    scale = found[0] - found[-1]
    baseline = -found[-1] / scale
    assert 0 < baseline < mean
    assert found == pytest.approx([scale * (reward - baseline) for reward in rewards], abs=1e-6)


def test_equal_rewards_teach_nothing() -> None:
    assert advantages(group(1.0, 1.0, 1.0), settings()).tolist() == [0.0, 0.0, 0.0]


def test_a_reward_that_failed_counts_in_no_mean_and_is_not_zero() -> None:
    with_error, without = group(1.0, None, 0.0), group(1.0, 0.0)
    found = advantages(with_error, settings())
    assert found[1] == 0.0
    assert found[[0, 2]].tolist() == advantages(without, settings()).tolist()
    as_zero = advantages(group(1.0, 0.0, 0.0), settings())  # what it would be if an error were a zero
    assert found[0] != as_zero[0]


def test_answers_that_were_cut_off_are_left_out_where_the_recipe_says_so() -> None:
    made = Group(problem(), (sample(1.0), sample(0.0), sample(0.0, finished=False)))
    assert counts(made, settings(over_long="leave out")).tolist() == [True, True, False]
    assert counts(made, settings()).tolist() == [True, True, True]


@pytest.mark.parametrize(("length", "finished", "expected"), [(8, True, 1.0), (12, True, 0.5), (16, False, 0.0)])
def test_the_penalty_for_length_grows_over_the_buffer(length: int, finished: bool, expected: float) -> None:
    made = sample(1.0, token_ids=range(10, 10 + length), finished=finished)
    assert shaped_reward(made, settings(over_long_buffer=8)) == pytest.approx(expected)


@given(st.lists(st.one_of(st.none(), st.floats(-5, 5)), min_size=2, max_size=9), st.booleans())
def test_advantages_sum_to_zero_and_keep_the_order(rewards: list[float | None], divides: bool) -> None:
    found = advantages(group(*rewards), settings(divide_by_deviation=divides))
    assert np.isfinite(found).all()
    assert abs(found.sum()) < 1e-3
    ranked = sorted((reward, found[place]) for place, reward in enumerate(rewards) if reward is not None)
    assert all(later[1] >= earlier[1] - 1e-6 for earlier, later in itertools.pairwise(ranked))


def test_a_group_has_a_signal_where_an_advantage_is_not_zero() -> None:
    cut_off = Group(problem(), (sample(1.0), sample(1.0), sample(0.0, finished=False)))
    assert has_signal(cut_off, settings())
    assert not has_signal(cut_off, settings(over_long="leave out"))
    longer = Group(problem(), (sample(1.0), sample(1.0, token_ids=range(10, 24))))
    assert not has_signal(longer, settings())
    assert has_signal(longer, settings(over_long_buffer=8))
    assert not has_signal(group(1.0, None), settings())
