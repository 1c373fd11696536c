"""Mean lengths compared by a bootstrap of problems and a permutation within problems."""

from __future__ import annotations

import numpy as np
import pytest

from crosschip.handoff.answers.judging import Levels, judge_lengths, with_verdicts
from crosschip.handoff.answers.scoring import LengthPair
from crosschip.paired import intervals
from crosschip.paired.intervals import bootstrap_lengths


def pairs(num: int, seed: int, factor: float, noise: float = 3.0) -> list[LengthPair]:
    rng = np.random.default_rng(seed)
    a = rng.gamma(6.0, 10.0, num)
    b = factor * a + rng.normal(0.0, noise, num)
    return [
        LengthPair((str(place), None), float(one), float(other))
        for place, (one, other) in enumerate(zip(a, b, strict=True))
    ]


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "PASS"), (1.5, "FAIL"), (0.6, "FAIL"), (1.1, "INCONCLUSIVE")])
def test_a_change_of_the_mean_in_either_direction(factor: float, verdict: str) -> None:
    (result,) = with_verdicts([judge_lengths(pairs(100, 0, factor), "tokens", Levels(), 0)], Levels())
    assert result.verdict == verdict
    assert result.difference == pytest.approx(result.b - result.a)


def test_few_problems_and_no_reasoning_at_all_show_nothing() -> None:
    few = judge_lengths(pairs(9, 0, 1.0), "tokens", Levels(), 0)
    assert "9 problems" in few.no_power
    none = judge_lengths([LengthPair((str(place), None), 0.0, 0.0) for place in range(40)], "tokens", Levels(), 0)
    assert none.no_power.startswith("no power")
    assert with_verdicts([few, none], Levels())[0].verdict == "INCONCLUSIVE"


def test_the_interval_covers_and_the_test_keeps_its_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 200 resamples each; a percentile interval of 80 skewed differences misses by a few points (Efron 1987)."""
    monkeypatch.setattr(intervals, "NUM_RESAMPLES", 199)
    rng, trials = np.random.default_rng(1), 250
    covers = alarms = 0
    for trial in range(trials):
        a = rng.gamma(6.0, 10.0, 80)
        found = bootstrap_lengths(a, a + rng.gamma(2.0, 5.0, 80) - 10.0, 0.9, trial)
        covers += found.interval.low <= 0.0 <= found.interval.high
        alarms += found.p <= 0.05
    error = (0.9 * 0.1 / trials) ** 0.5
    assert covers / trials >= 0.87 - 3.3 * error
    assert alarms / trials <= 0.05 + 3.3 * (0.05 * 0.95 / trials) ** 0.5


def test_the_median_stays_where_a_few_answers_run_away() -> None:
    a = np.full(50, 60.0) + np.arange(50)
    b = a.copy()
    b[:5] += 500.0  # five loops
    found = bootstrap_lengths(a, b, 0.9, 0)
    assert found.difference == pytest.approx(50.0)
    assert (found.median_difference, found.median_interval.high) == (0.0, 0.0)


def test_equal_shifts_have_an_interval_of_no_width() -> None:
    a = np.arange(12.0)
    found = bootstrap_lengths(a, a + 2, 0.9, 0)
    assert (found.interval.low, found.interval.high, found.deviation) == (2.0, 2.0, 0.0)
    assert found.p == 2.0**-11
