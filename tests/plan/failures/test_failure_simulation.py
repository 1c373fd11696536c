"""The event simulation: every second is accounted for, and its limits are closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosschip.plan.failures import Ledger, PlanError, Recovery, SampledRates, expected_goodput, simulate

DAY_S = 86400.0
PLAIN = Recovery(
    interval_s=1800.0, save_blocking_s=60.0, detection_s=30.0, hang_share=0.0, restart_s=570.0, manual_share=0.0,
    swap_share=0.0,
)  # fmt: skip


def same_rates(num: int, job: float = 0.0, chip: float = 0.0, corruption: float = 0.0) -> SampledRates:
    return SampledRates(np.full(num, job), np.full(num, chip), np.full(num, corruption))


def unaccounted_s(ledger: Ledger) -> float:
    spent = ledger.useful_s + ledger.lost_s + ledger.restart_s + ledger.saving_s + ledger.idle_s
    return float(np.max(np.abs(spent - ledger.wall_s) / np.maximum(ledger.wall_s, 1.0), initial=0.0))


recoveries = st.builds(
    Recovery,
    interval_s=st.floats(60.0, 7200.0),
    save_blocking_s=st.floats(0.0, 300.0),
    save_lag_s=st.floats(0.0, 60.0),
    hang_share=st.floats(0.0, 1.0),
    restart_s=st.floats(0.0, 3600.0),
    manual_share=st.floats(0.0, 0.2),
    num_spares=st.integers(0, 20),
    repair_s=st.floats(0.0, 5 * DAY_S),
    corruption_caught=st.floats(0.0, 1.0),
    num_groups=st.integers(1, 8),
)


@settings(max_examples=60, deadline=None)
@given(recovery=recoveries, job=st.floats(0.0, 10.0), num_chips=st.integers(1, 20_000), seed=st.integers(0, 1000))
def test_no_second_is_lost_or_counted_twice(recovery: Recovery, job: float, num_chips: int, seed: int) -> None:
    rates = same_rates(20, job, 4e-4, 7e-5)
    ledger = simulate(rates, num_chips, recovery, work_s=3 * DAY_S, horizon_s=20 * DAY_S, seed=seed)
    assert unaccounted_s(ledger) < 1e-9
    for each in (ledger.useful_s, ledger.lost_s, ledger.restart_s, ledger.saving_s, ledger.idle_s):
        assert each.min() >= -1e-6
    np.testing.assert_allclose(ledger.useful_s[ledger.finished], 3 * DAY_S)
    np.testing.assert_allclose(ledger.wall_s[~ledger.finished], 20 * DAY_S)


def test_a_second_counted_twice_is_noticed() -> None:
    ledger = simulate(same_rates(5, job=5.0), 8, PLAIN, work_s=DAY_S)
    assert unaccounted_s(replace(ledger, lost_s=ledger.lost_s + 60.0)) > 1e-9


def test_without_stops_only_the_saves_are_added() -> None:
    ledger = simulate(same_rates(3), 1000, PLAIN, work_s=10 * 1800.0 + 1.0)
    np.testing.assert_allclose(ledger.wall_s, 10 * 1800.0 + 1.0 + 11 * 60.0)
    assert ledger.finished.all()
    assert not ledger.num_stops.any()
    nothing = simulate(same_rates(3, job=1.0), 8, PLAIN, work_s=0.0)
    assert not nothing.wall_s.any()
    assert nothing.finished.all()


@pytest.mark.parametrize("between_s", [3000.0, 20_000.0, 200_000.0])
def test_the_mean_wall_time_is_the_exact_closed_form(between_s: float) -> None:
    """Work of whole intervals: wall = work / goodput exactly in expectation; five standard errors are allowed."""
    rates, work = same_rates(2000, job=DAY_S / between_s), 40 * PLAIN.interval_s
    ledger = simulate(rates, 1, PLAIN, work_s=work, seed=3)
    # The first restart is not needed, and the closed form does not count one either.
    goodput = expected_goodput(PLAIN.interval_s, PLAIN.save_blocking_s, 600.0, between_s)
    error = float(ledger.wall_s.std()) / math.sqrt(2000)
    assert abs(float(ledger.wall_s.mean()) - work / goodput) < 5 * error
    # Negative control: a restart a tenth longer is seen to be another job.
    wrong = expected_goodput(PLAIN.interval_s, PLAIN.save_blocking_s, 1200.0, between_s)
    assert abs(float(ledger.wall_s.mean()) - work / wrong) > 5 * error


def test_the_number_of_stops_is_poisson() -> None:
    ledger = simulate(same_rates(4000, job=2.0, chip=1e-3), 3000, PLAIN, horizon_s=10 * DAY_S)
    assert ledger.num_stops.mean() == pytest.approx(50.0, abs=5 * math.sqrt(50.0 / 4000))
    assert ledger.num_stops.var() == pytest.approx(50.0, rel=5 * math.sqrt(2 / 4000))


@settings(max_examples=25, deadline=None)
@given(recovery=recoveries, seed=st.integers(0, 100))
def test_more_stops_mean_less_goodput(recovery: Recovery, seed: int) -> None:
    few, many = (
        simulate(same_rates(400, job=job), 8, recovery, horizon_s=30 * DAY_S, seed=seed).goodput for job in (1.0, 8.0)
    )
    error = math.sqrt((few.var() + many.var()) / 400)
    # A stop cuts a save short for all groups, and one of them alone loses its work: seven more a day, at most so much.
    cut_short = 7 * (1 - 1 / recovery.num_groups) * recovery.save_blocking_s / DAY_S
    assert many.mean() <= few.mean() + 5 * error + cut_short + 1e-12


def test_corruption_that_is_caught_costs_its_latency_and_the_rest_stays() -> None:
    recovery = replace(PLAIN, corruption_caught=1.0, corruption_latency_s=4 * 1800.0)
    rates = same_rates(1000, corruption=1e-3)
    caught = simulate(rates, 1000, recovery, horizon_s=20 * DAY_S)
    crash = simulate(same_rates(1000, job=1.0), 1000, recovery, horizon_s=20 * DAY_S)
    assert not caught.num_silent.any()
    extra = (caught.lost_s - crash.lost_s).mean() / caught.num_stops.mean()
    assert extra == pytest.approx(4 * 1800.0, rel=0.05)
    missed = simulate(rates, 1000, replace(recovery, corruption_caught=0.0), horizon_s=20 * DAY_S)
    assert missed.num_silent.mean() == pytest.approx(20.0, abs=5 * math.sqrt(20.0 / 1000))
    assert not missed.num_stops.any()


def test_spares_end_the_waiting_and_groups_divide_a_stop() -> None:
    rates = same_rates(300, chip=1e-3)
    swapping = replace(PLAIN, swap_share=1.0, repair_s=3 * DAY_S)
    idle = [
        float(simulate(rates, 2000, replace(swapping, num_spares=num), horizon_s=30 * DAY_S).idle_s.mean())
        for num in (0, 3, 8, 30)
    ]
    assert idle == sorted(idle, reverse=True)
    assert idle[-1] == 0.0
    whole, grouped = (simulate(rates, 2000, replace(PLAIN, num_groups=num), horizon_s=30 * DAY_S) for num in (1, 8))
    assert grouped.restart_s.mean() == pytest.approx(whole.restart_s.mean() / 8, rel=0.1)
    assert grouped.goodput.mean() > whole.goodput.mean()


@pytest.mark.parametrize("limit", [{"work_s": 30 * DAY_S}, {"work_s": 90 * DAY_S, "horizon_s": 60 * DAY_S}])
def test_after_many_stops_the_pace_tells_what_following_the_trial_does(
    limit: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates, recovery = same_rates(50, job=100.0), replace(PLAIN, interval_s=300.0, save_blocking_s=10.0, restart_s=300.0)
    followed = simulate(rates, 8, recovery, **limit)
    assert 4_000 < followed.num_stops.min() <= followed.num_stops.max() < 10_000
    monkeypatch.setattr("crosschip.plan.failures.simulation._PACE_KNOWN_AFTER", 2048)
    paced = simulate(rates, 8, recovery, **limit)
    assert unaccounted_s(paced) < 1e-9
    np.testing.assert_array_equal(paced.finished, followed.finished)
    for name in ("useful_s", "lost_s", "restart_s", "saving_s", "wall_s", "num_stops"):
        np.testing.assert_allclose(getattr(paced, name), getattr(followed, name), rtol=0.1)
        assert getattr(paced, name).mean() == pytest.approx(getattr(followed, name).mean(), rel=0.02)


def test_spares_without_number_are_as_many_as_never_run_out() -> None:
    recovery = replace(PLAIN, swap_share=1.0, repair_s=1000 * DAY_S, num_spares=10**15)
    rates = same_rates(50, chip=2e-3)
    never = simulate(rates, 1000, recovery, work_s=300 * DAY_S)
    assert never.num_stops.min() > 512  # more than the events that are drawn at once
    assert not never.idle_s.any()
    enough = replace(recovery, num_spares=int(never.num_stops.max()))
    np.testing.assert_array_equal(simulate(rates, 1000, enough, work_s=300 * DAY_S).wall_s, never.wall_s)
    few = simulate(rates, 1000, replace(recovery, num_spares=300), work_s=300 * DAY_S)
    assert few.idle_s.min() > 0


def test_few_trials_without_an_end_leave_the_others_and_many_are_refused() -> None:
    job = np.full(200, 1.0)
    job[0] = 10_000.0  # a stop every 9 s, and nothing is saved before the next
    ledger = simulate(SampledRates(job, 0 * job, 0 * job), 8, PLAIN, work_s=DAY_S)
    assert ledger.finished.tolist() == [False] + [True] * 199
    assert ledger.wall_s[0] > 100 * ledger.wall_s[1:].max()
    job[1:5] = 10_000.0
    with pytest.raises(PlanError, match="5 of 200 trials do not end"):
        simulate(SampledRates(job, 0 * job, 0 * job), 8, PLAIN, work_s=DAY_S)


def test_one_seed_gives_one_result_and_what_has_no_end_is_refused() -> None:
    rates = same_rates(10, job=3.0)
    first, again = (simulate(rates, 8, PLAIN, horizon_s=DAY_S, seed=5).useful_s for _ in range(2))
    np.testing.assert_array_equal(first, again)
    with pytest.raises(PlanError, match="neither an amount of work nor a horizon"):
        simulate(rates, 8, PLAIN)
    with pytest.raises(PlanError, match="negative"):
        simulate(rates, 8, PLAIN, work_s=-1.0)
    with pytest.raises(PlanError, match="num_chips"):
        simulate(rates, 0, PLAIN, work_s=1.0)
