"""Bounds of a median from few values."""

from __future__ import annotations

import random
import statistics

import pytest

from crosschip.qualify.judging.median_bounds import median_bounds


def test_four_values_bound_nothing() -> None:
    """All four above the median has a chance of 1/16, more than one in twenty; of five, 1/32."""
    assert median_bounds([1.0, 2.0, 3.0, 4.0]) is None
    found = median_bounds([5.0, 1.0, 2.0, 4.0, 3.0])
    assert found is not None
    assert (found.lower, found.median, found.upper, found.num) == (1.0, 3.0, 5.0, 5)


def test_twelve_values_leave_out_two_at_each_end() -> None:
    """Fewer than 3 heads of 12 coins: 79/4096 = 0.019; fewer than 4: 299/4096 = 0.073."""
    found = median_bounds([float(each) for each in range(12)])
    assert found is not None
    assert (found.lower, found.upper) == (2.0, 9.0)


def test_one_outlier_moves_nothing() -> None:
    calm = median_bounds([1.0] * 12)
    jump = median_bounds([1.0] * 11 + [1e9])
    assert calm == jump


@pytest.mark.parametrize("num", [5, 8, 12, 40])
@pytest.mark.parametrize("draw", [lambda r: r.gauss(0.0, 1.0), lambda r: r.expovariate(1.0) - 0.6931471805599453])
def test_bounds_hold_whatever_the_distribution(num: int, draw: object) -> None:
    """The true median is 0 in both. Of 4,000 trials 5 % may miss, and three standard deviations (1 %) more."""
    source = random.Random(0)
    found = [median_bounds([draw(source) for _ in range(num)]) for _ in range(4000)]  # type: ignore[operator]
    assert statistics.fmean(each.lower > 0.0 for each in found if each is not None) <= 0.06
    assert statistics.fmean(each.upper < 0.0 for each in found if each is not None) <= 0.06
