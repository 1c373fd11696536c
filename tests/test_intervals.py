from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosschip.intervals import bootstrap_mean, wilson_interval


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    # Newcombe 1998, table I, method 3: the score interval without continuity correction
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_values_as_published(right: int, asked: int, low: float, high: float) -> None:
    assert wilson_interval(right, asked) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 1000).flatmap(lambda asked: st.tuples(st.integers(0, asked), st.just(asked))))
def test_the_interval_holds_the_share(counts: tuple[int, int]) -> None:
    low, high = wilson_interval(*counts)
    assert 0.0 <= low <= counts[0] / counts[1] <= high <= 1.0


def test_the_bootstrap_is_that_of_problems_drawn_with_replacement() -> None:
    """The multinomial shortcut against drawing indices, up to the noise of 10,000 resamples' percentiles."""
    rng = np.random.default_rng(3)
    values = rng.choice([0.0, 0.25, 0.5, 1.0], size=150, p=[0.4, 0.2, 0.1, 0.3])
    drawn = values[rng.integers(0, 150, size=(10_000, 150))].mean(axis=1)
    low, high = bootstrap_mean(values, seed=0)
    assert (low, high) == bootstrap_mean(list(values), seed=0)
    # A percentile p of n draws lies within 4 standard errors sqrt(p (1 - p) / n) of rank, here 31 % of p's own tail.
    for end, share in ((low, 0.025), (high, 0.975)):
        slack = 8 * (share * (1 - share) / 10_000) ** 0.5  # both sides are drawn
        assert np.quantile(drawn, share - slack) <= end <= np.quantile(drawn, min(1.0, share + slack))


def test_the_bootstrap_covers_the_mean_it_is_of() -> None:
    rng = np.random.default_rng(1)
    chance = np.array([0.0, 0.5, 1.0])
    covered = 0
    for seed in range(400):
        low, high = bootstrap_mean(rng.choice(chance, size=100, p=[0.3, 0.4, 0.3]), seed, num_resamples=2_000)
        covered += low <= 0.5 <= high
    # 95 % promised; a percentile bootstrap of 100 problems loses about a point; 3.3 standard errors of 400 trials
    assert covered / 400 >= 0.94 - 3.3 * (0.95 * 0.05 / 400) ** 0.5


def test_one_value_has_a_point_for_its_interval() -> None:
    assert bootstrap_mean([1.0, 1.0, 1.0], seed=0) == (1.0, 1.0)
