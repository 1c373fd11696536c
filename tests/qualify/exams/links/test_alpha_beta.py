from __future__ import annotations

import random

import pytest

from crosschip.qualify.exams.links.alpha_beta import fit_alpha_beta

SIZES = (1024, 65536, 1 << 20, 16 << 20)


def times(latency_s: float, bandwidth_gb_s: float, noise: float, seed: int = 0) -> dict[int, list[float]]:
    draw = random.Random(seed)
    return {
        size: [(latency_s + size / bandwidth_gb_s / 1e9) * draw.uniform(1.0 - noise, 1.0 + noise) for _ in range(20)]
        for size in SIZES
    }


@pytest.mark.parametrize(("latency_s", "bandwidth_gb_s"), [(5e-6, 40.0), (2e-2, 0.0125), (1e-4, 3.0)])
def test_what_was_put_in_comes_out(latency_s: float, bandwidth_gb_s: float) -> None:
    exact = fit_alpha_beta(times(latency_s, bandwidth_gb_s, 0.0))
    assert exact is not None
    assert exact.latency_s == pytest.approx(latency_s, rel=1e-6)
    assert exact.bandwidth_gb_s == pytest.approx(bandwidth_gb_s, rel=1e-6)
    assert exact.worst_misfit == pytest.approx(0.0, abs=1e-6)


def test_intervals_hold_the_truth_and_grow_with_noise() -> None:
    """Of forty 95 % intervals from resampled medians of twenty, thirty hold the truth at least: five sigma below."""
    held = {0.02: 0, 0.2: 0}
    width = {}
    for noise in held:
        for seed in range(40):
            fit = fit_alpha_beta(times(1e-4, 3.0, noise, seed))
            assert fit is not None
            assert fit.latency_low_s <= fit.latency_s <= fit.latency_high_s
            held[noise] += fit.bandwidth_low_gb_s <= 3.0 <= fit.bandwidth_high_gb_s
            width[noise] = fit.bandwidth_high_gb_s - fit.bandwidth_low_gb_s
    assert min(held.values()) >= 30, held
    assert width[0.2] > 3 * width[0.02]


def test_two_ways_of_sending_show_as_misfit() -> None:
    both = {size: [1e-5 + size / 1e9] if size < 1 << 20 else [5e-3 + size / 1e9] for size in SIZES}
    fit = fit_alpha_beta(both)
    assert fit is not None
    assert fit.worst_misfit > 0.2


def test_no_fit_without_a_slope() -> None:
    assert fit_alpha_beta({1024: [1e-3]}) is None
    assert fit_alpha_beta({1024: [1e-3], 1 << 20: [1e-5]}) is None
    assert fit_alpha_beta({1024: [1e-3], 1 << 20: []}) is None


def test_latency_is_never_below_zero() -> None:
    fit = fit_alpha_beta({1 << 20: [1.0e-3], 2 << 20: [2.1e-3], 4 << 20: [4.6e-3]})
    assert fit is not None
    assert fit.latency_s == 0.0
