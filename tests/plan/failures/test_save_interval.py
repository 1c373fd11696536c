"""How often to save: the exact optimum, its limits, and the published formulas beside it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosschip.plan.failures import (
    PlanError,
    Recovery,
    best_interval,
    expected_goodput,
    save_time,
    young_interval,
)

SAVES = st.floats(0.1, 600.0)
BETWEEN = st.floats(600.0, 1e6)


def daly_interval(save_s: float, between_s: float) -> float:
    """Daly 2006, "A higher order estimate of the optimum checkpoint interval"."""
    ratio = save_s / (2 * between_s)
    return math.sqrt(2 * save_s * between_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_s


def first_order_goodput(interval_s: float, save_s: float, stop_s: float, between_s: float) -> float:
    """Meta's formula (arXiv 2410.21680)."""
    return max(0.0, 1.0 - (stop_s + interval_s / 2) / between_s) / (1.0 + save_s / interval_s)


@given(save=SAVES, between=BETWEEN, stop=st.floats(0.0, 3600.0))
def test_no_other_interval_is_better(save: float, between: float, stop: float) -> None:
    best = best_interval(save, between)
    at_best = expected_goodput(best, save, stop, between)
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert expected_goodput(best * factor, save, stop, between) <= at_best * (1 + 1e-9)


def test_youngs_and_dalys_intervals_are_the_limit_of_short_saves() -> None:
    assert best_interval(1e-2, 1e5) == pytest.approx(young_interval(1e-2, 1e5), rel=1e-3)
    assert best_interval(30, 1e5) == pytest.approx(daly_interval(30, 1e5), rel=1e-4)
    assert best_interval(30, 1e5) != pytest.approx(young_interval(30, 1e5), rel=1e-3)  # they do differ


def test_both_branches_of_the_optimum_meet() -> None:
    assert best_interval(0.99e-6 * 1e5, 1e5) == pytest.approx(best_interval(1.01e-6 * 1e5, 1e5), rel=0.02)


def test_an_infinitely_fast_store_saves_each_step_and_loses_only_the_restart() -> None:
    assert save_time(1e15, math.inf) == 0.0
    interval = best_interval(0.0, 3600.0, least_s=1.0)
    assert interval == 1.0
    assert expected_goodput(interval, 0.0, 60.0, 3600.0) == pytest.approx(math.exp(-60 / 3600), rel=1e-3)


@given(save=SAVES, between=BETWEEN, interval=st.floats(60.0, 7200.0), stop=st.floats(0.0, 3600.0))
def test_more_stops_longer_saves_and_longer_restarts_never_help(
    save: float, between: float, interval: float, stop: float
) -> None:
    here = expected_goodput(interval, save, stop, between)
    assert expected_goodput(interval, save, stop, between / 2) <= here
    assert expected_goodput(interval, save * 2, stop, between) <= here
    assert expected_goodput(interval, save, stop + 10, between) <= here
    assert here <= expected_goodput(interval, save, stop, math.inf) == interval / (interval + save)


def test_metas_formula_is_the_first_order_of_the_exact_one() -> None:
    exact = expected_goodput(1000, 10, 100, 1e6)
    assert first_order_goodput(1000, 10, 100, 1e6) == pytest.approx(exact, abs=3e-5)  # (cycle + stop)^2 / M^2 and below
    assert first_order_goodput(1000, 10, 100, 2000) != pytest.approx(expected_goodput(1000, 10, 100, 2000), rel=0.03)


def test_a_save_that_is_slower_than_the_next_is_refused_with_what_to_do() -> None:
    with pytest.raises(PlanError, match="600 s at most") as caught:
        Recovery(interval_s=100, save_blocking_s=0, save_lag_s=600)
    assert "faster store" in caught.value.remedy
    for wrong in ({"interval_s": 0}, {"interval_s": 1, "hang_share": 1.5}, {"interval_s": 1, "restart_s": math.nan}):
        with pytest.raises(PlanError):
            Recovery(**wrong)  # type: ignore[arg-type]
