"""A leak grows in all parts of a soak alike; warm-ups, staircases and noise do not."""

from __future__ import annotations

import random

import pytest

from crosschip.qualify.exams.stability.memory_slope import LEAST_GROWTH_BYTES, memory_slope, memory_verdict

MIB = 1 << 20
GIB = 1 << 30
TIMES_S = [float(second) for second in range(61)]  # a minute


def verdict_of(sizes: list[float], left: float | None = 100 * GIB) -> str:
    slope = memory_slope(TIMES_S[: len(sizes)], sizes)
    assert slope is not None
    return memory_verdict(slope, left)[0]


def test_a_leak_is_told_with_its_slope_and_its_end() -> None:
    slope = memory_slope(TIMES_S, [GIB + second * MIB for second in TIMES_S])
    assert slope is not None
    assert (slope.bytes_per_hour, slope.lower, slope.upper) == pytest.approx((3600 * MIB,) * 3)
    assert memory_verdict(slope, 36_000 * MIB) == ("FAIL", pytest.approx(10.0))
    assert memory_verdict(slope, 3600 * 1000 * MIB) == ("PASS WITH LIMITS", pytest.approx(1000.0))
    assert memory_verdict(slope, None) == ("FAIL", None)


def test_a_leak_is_seen_through_noise() -> None:
    source = random.Random(0)
    assert verdict_of([GIB + second * MIB + source.gauss(0.0, MIB) for second in TIMES_S]) == "FAIL"


@pytest.mark.parametrize(
    "size",
    [
        lambda second: GIB,
        lambda second: GIB + 50 * MIB * min(second, 19.0),  # the warm-up's third
        lambda second: GIB + 200 * MIB * (second > 30) + 300 * MIB * (second > 45),  # a staircase
        lambda second: GIB + 900 * MIB * (1 - 0.7**second),  # a cache that fills
        lambda second: GIB - second * MIB,
        lambda second: GIB + 100 * MIB * (second % 2),
    ],
)
def test_what_is_no_leak_passes(size: object) -> None:
    assert verdict_of([size(second) for second in TIMES_S]) == "PASS"  # type: ignore[operator]


def test_noise_alone_is_seldom_accused() -> None:
    """Steps of a random walk point up in half of the parts; at most one walk in twenty looks like growth."""
    source, accused = random.Random(1), 0
    for _ in range(400):
        sizes = [float(GIB)]
        for _ in TIMES_S[1:]:
            sizes.append(sizes[-1] + source.gauss(0.0, MIB))
        accused += verdict_of(sizes) != "PASS"
    assert accused <= 400 * 0.05


def test_growth_too_small_for_the_time_is_not_called() -> None:
    """Over the 40 s after the warm-up."""
    most = LEAST_GROWTH_BYTES / 40
    assert verdict_of([GIB + second * most * 0.9 for second in TIMES_S], None) == "PASS"
    assert verdict_of([GIB + second * most * 1.1 for second in TIMES_S], None) == "FAIL"


def test_too_few_readings_say_nothing() -> None:
    assert memory_slope(TIMES_S[:7], [float(GIB)] * 7) is None
    assert memory_slope(TIMES_S[:8], [float(GIB)] * 8) is not None
    assert memory_slope([], []) is None
