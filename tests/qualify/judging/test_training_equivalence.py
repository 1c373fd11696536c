import math

import numpy as np

from crosschip.qualify.judging.training_equivalence import (
    equivalence,
    mean_bound,
    smoothed_final,
)


def test_a_difference_of_nothing_with_little_spread_is_equivalent() -> None:
    assert equivalence([1e-4, -1e-4, 5e-5], margin=0.005).shown == "equivalent"


def test_not_significantly_different_is_not_equivalent() -> None:
    found = equivalence([0.02, -0.018, 0.001], margin=0.005)
    assert found.lower < 0 < found.upper
    assert found.shown == "undecided"
    assert found.bound > 0.005


def test_a_difference_beyond_the_margin_is_different() -> None:
    assert equivalence([0.021, 0.020, 0.019], margin=0.005).shown == "different"
    assert equivalence([-0.021, -0.020, -0.019], margin=0.005).shown == "different"


def test_one_pair_decides_nothing() -> None:
    assert equivalence([0.0], margin=0.005).shown == "undecided"


def test_equivalence_is_claimed_wrongly_at_most_as_often_as_stated() -> None:
    # On the margin itself, equivalence must be claimed in at most 5 % of all cases: 2000 tries, 4 standard errors.
    generator = np.random.default_rng(0)
    wrong = sum(equivalence(generator.normal(0.005, 0.001, 5)).shown == "equivalent" for _ in range(2000))
    assert wrong / 2000 <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 2000)


def test_the_final_loss_is_smoothed_over_the_last_steps() -> None:
    assert smoothed_final([9.0] * 7 + [1.0, 2.0, 3.0]) == 2.0
    assert smoothed_final([4.0]) == 4.0


def test_a_mean_beyond_its_limit_is_rejected_with_the_stated_confidence() -> None:
    generator = np.random.default_rng(1)
    on_the_limit = [mean_bound(generator.normal(1.0, 0.3, 8), 1.0).p for _ in range(2000)]
    assert np.mean(np.asarray(on_the_limit) < 0.05) <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 2000)
    assert mean_bound(generator.normal(1.5, 0.1, 8), 1.0).p < 1e-4


def test_both_signs_count_where_the_test_is_two_sided() -> None:
    draws = [-0.011, -0.010, -0.012, -0.010]
    assert mean_bound(draws, 0.005, two_sided=True).p < 0.01
    assert mean_bound(draws, 0.005).p > 0.99


def test_draws_without_spread_are_judged_by_their_mean() -> None:
    assert mean_bound([2.0, 2.0, 2.0], 1.0).p == 0.0
    assert mean_bound([1.0, 1.0, 1.0], 1.0).p == 1.0
