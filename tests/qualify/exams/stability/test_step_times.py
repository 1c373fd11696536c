"""Drift and tail of step times, with what the host's own work says beside them."""

from __future__ import annotations

import random

import pytest

from crosschip.qualify.exams.stability.step_times import StepTimes, drift_is_the_chips, step_times, tail_is_high


def times(num: int = 240, factor: float = 1.0, seed: int = 0) -> list[float]:
    """Ten milliseconds with 5 % of noise, later `factor` times as long."""
    source = random.Random(seed)
    return [0.01 * (1 + 0.05 * source.random()) * (factor if place > num * 0.6 else 1.0) for place in range(num)]


def of(values: list[float]) -> StepTimes:
    found = step_times(values)
    assert found is not None
    return found


def test_a_chip_that_gets_slower_drifts() -> None:
    slower = of(times(factor=1.3))
    assert slower.drift is not None
    assert 1.2 < slower.drift.lower <= slower.drift.median <= slower.drift.upper < 1.4
    assert drift_is_the_chips(slower, of(times(seed=1)))
    assert drift_is_the_chips(slower, None)


@pytest.mark.parametrize("factor", [1.0, 1.05, 0.7])
def test_a_steady_chip_does_not(factor: float) -> None:
    assert not drift_is_the_chips(of(times(factor=factor)), of(times(seed=1)))


def test_a_host_that_gets_slower_is_not_the_chip() -> None:
    assert not drift_is_the_chips(of(times(factor=1.3)), of(times(factor=1.35, seed=1)))


def test_slow_growth_drifts_as_well() -> None:
    slower = of([each * (1 + place / 400) for place, each in enumerate(times())])
    assert drift_is_the_chips(slower, None)


def test_one_slow_spell_is_no_drift() -> None:
    spell = [each * (2.0 if 150 < place < 160 else 1.0) for place, each in enumerate(times())]
    assert not drift_is_the_chips(of(spell), None)


def late(seed: int = 0, factor: float = 6.0) -> list[float]:
    """One step in fifty is late."""
    return [each * (factor if place % 50 == 7 else 1.0) for place, each in enumerate(times(seed=seed))]


def test_a_tail_is_the_chips_or_the_hosts() -> None:
    chip = of(late())
    assert chip.tail == pytest.approx(6.0, rel=0.1)
    assert tail_is_high(chip, of(times(seed=1)))
    assert tail_is_high(chip, None)
    assert not tail_is_high(chip, of(late(seed=1)))
    assert not tail_is_high(of(late(factor=2.0)), None)
    assert not tail_is_high(of(times()), None)


def test_few_steps_say_little() -> None:
    assert step_times([0.01] * 4) is None  # the first is warm-up
    few = of(times(10))
    assert (few.p99_s, few.tail, few.drift) == (None, None, None)
    assert not drift_is_the_chips(few, None)
    assert not tail_is_high(few, None)


def test_the_warm_up_does_not_count() -> None:
    found = of([5.0] * 24 + times(216))
    assert found.num == 216
    assert found.max_s < 0.011
