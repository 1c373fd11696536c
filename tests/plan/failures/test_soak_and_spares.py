"""Evidence from a qualification's soak, spare nodes, corruption, and the usual recovery."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from crosschip.plan.failures import (
    Gamma,
    PlanError,
    expected_corruption,
    failure_outlook,
    published_rates,
    read_soak,
    recovery_figures,
    share_waiting,
    spares_needed,
    usual_recovery,
    with_soak,
)
from crosschip.qualify.finding import ExamRecord, Finding
from crosschip.qualify.report_document import ReportHead, report_document


def soaked(tmp_path: Any, hours: float, mismatches: int = 0, crash: bool = False) -> dict[str, Any]:
    record = ExamRecord("stability")
    record.measurements.append({"check": "silent corruption", "device_hours": hours, "mismatches": mismatches})
    if crash:
        record.findings.append(Finding("stability", "stability", "FAIL", "aten.mm", "crash", "ended the process"))
    head = ReportHead("npu:0", "train", "soak", "first", "recipe", tmp_path / "r.json", 0.0)
    return report_document(head, [record], 1.0)


def test_a_short_soak_hardly_moves_the_rates_and_a_long_clean_one_does(tmp_path: Any) -> None:
    prior = published_rates()
    short = with_soak(prior, read_soak(soaked(tmp_path, 1.0)))
    assert short.chip_per_day.mean == pytest.approx(prior.chip_per_day.mean, rel=1e-3)
    long = with_soak(prior, read_soak(soaked(tmp_path, 24.0 * 50_000)))
    assert long.chip_per_day.mean < prior.chip_per_day.mean / 5
    crashed = with_soak(prior, read_soak(soaked(tmp_path, 1.0, mismatches=2, crash=True)))
    assert crashed.chip_per_day.mean > prior.chip_per_day.mean * 1.3
    assert crashed.corruption_per_day.mean > prior.corruption_per_day.mean * 2


def test_the_soaks_own_bound_is_the_rule_of_three(tmp_path: Any) -> None:
    soak = read_soak(soaked(tmp_path, 24.0))
    assert soak.chip_rate_bound == pytest.approx(3.0, rel=0.01)
    assert "3e+03 stops a day on 1,000 chips" in soak.words(1000)


@pytest.mark.parametrize("report", [{}, {"document": "plan"}, {"document": "qualification", "exams": None}, []])
def test_what_holds_no_soak_is_refused(report: Any) -> None:
    with pytest.raises(PlanError) as caught:
        read_soak(report)
    assert "qualif" in caught.value.remedy


def test_spares_keep_their_promise_in_a_simulated_repair_shop() -> None:
    """Poisson breakdowns, exponential repairs: the share of breakdowns that finds at most n - 1 nodes in repair."""
    swaps, days = 5.0, 3.0
    needed = spares_needed(swaps, days, 0.05)
    random = np.random.default_rng(0)
    at = np.cumsum(random.exponential(1 / swaps, 20_000))
    back = at + random.exponential(days, at.size)
    window = 400  # more breakdowns than any repair lasts for
    in_repair = np.array([(back[max(0, i - window) : i] > at[i]).sum() for i in range(window, at.size)])
    assert (in_repair >= needed).mean() <= 0.05 + 5 * math.sqrt(0.05 * 0.95 / 1000)
    assert (in_repair >= needed - 3).mean() > 0.05  # three fewer would break it
    assert share_waiting(needed, swaps, days) <= 0.05
    assert spares_needed(0.0, 3.0) == 0


def test_corruption_is_counted_over_the_rates_uncertainty() -> None:
    rate, random = Gamma(0.5, 0.5 / 7e-6), np.random.default_rng(0)
    found = expected_corruption(rate, 16_384, 54, 0.5)
    drawn = random.poisson(rate.at(random.random(200_000)) * 16_384 * 54 / 2)
    assert found.expected_unnoticed == pytest.approx(drawn.mean(), rel=0.02)
    assert found.chance_unnoticed == pytest.approx((drawn > 0).mean(), abs=0.005)


def test_the_usual_recovery_follows_the_store_and_names_its_figures() -> None:
    rates = published_rates()
    fast, slow = (
        usual_recovery(rates, 2048, 8, save_bytes=1e13, store_gb_s=store, blocking=True) for store in (1000.0, 10.0)
    )
    assert slow.save_blocking_s == 100 * fast.save_blocking_s
    assert slow.interval_s > 5 * fast.interval_s
    figures = recovery_figures(usual_recovery(rates, 2048, 8, restart_s=60.0))
    assert figures["restart_s"].origin == "given"
    assert figures["hang_share"].origin == "published"
    assert figures["repair_s"].origin == "assumed"
    outlook = failure_outlook(rates, 2048, fast)
    best = max(outlook.curve, key=lambda point: point[1])
    assert best[0] == pytest.approx(fast.interval_s, rel=0.2)  # the curve's own spacing
