"""Rates of mismatches with their bounds, and what they mean for many chips."""

from __future__ import annotations

import pytest
import torch

from crosschip.qualify.exams.stability.corruption import PLANNED_CHIPS, implied_words, mismatch_rate, rate_words

HOUR_S = 3600.0


def test_nothing_seen_bounds_the_rate_by_three_over_the_time() -> None:
    rate = mismatch_rate(0, 10 * HOUR_S)
    assert (rate.per_hour, rate.lower) == (0.0, 0.0)
    assert rate.upper == pytest.approx(2.9957 / 10, rel=1e-4)  # -log 0.05
    assert rate_words(rate) == "no mismatch in 10 device-hours: the rate is below 0.3 per device-hour (95 %)"


@pytest.mark.parametrize(("count", "lower", "upper"), [(1, 0.0513, 4.744), (3, 0.8177, 7.754), (10, 5.425, 16.962)])
def test_bounds_are_those_of_the_tables(count: int, lower: float, upper: float) -> None:
    """Garwood (1936), one side each."""
    rate = mismatch_rate(count, 2 * HOUR_S)
    assert rate.per_hour == count / 2
    assert (rate.lower * 2, rate.upper * 2) == pytest.approx((lower, upper), rel=1e-3)


@pytest.mark.parametrize("mean", [0.5, 2.0, 7.0])
def test_bounds_hold_in_nineteen_of_twenty_cases(mean: float) -> None:
    """The chance that a bound misses the true rate, summed over every count that can come."""
    counts = torch.arange(60, dtype=torch.float64)
    chances = torch.exp(counts * torch.tensor(mean, dtype=torch.float64).log() - mean - torch.lgamma(counts + 1))
    rates = [mismatch_rate(int(count), HOUR_S) for count in counts]
    too_low = sum(float(chance) for chance, rate in zip(chances, rates, strict=True) if rate.upper < mean)
    too_high = sum(float(chance) for chance, rate in zip(chances, rates, strict=True) if rate.lower > mean)
    assert too_low <= 0.05
    assert too_high <= 0.05


def test_what_it_means_for_many_chips() -> None:
    once_in_a_thousand_hours = mismatch_rate(1, 1000 * HOUR_S)
    assert once_in_a_thousand_hours.per_day(1000)[0] == pytest.approx(24.0)
    assert "on 10,000 chips 240 a day expected" in implied_words(once_in_a_thousand_hours, PLANNED_CHIPS)
    assert implied_words(mismatch_rate(0, HOUR_S), (100,)) == "on 100 chips up to 7,190 a day not excluded"


def test_no_time_gives_no_rate() -> None:
    with pytest.raises(ValueError, match=r"from 0\.0 s"):
        mismatch_rate(0, 0.0)
