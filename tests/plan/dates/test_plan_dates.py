"""Dates: the calendar, stages, ramp-up, quantiles, what moves the end, the fall-back rule, money, joined vendors."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import date

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosschip.plan.dates import (
    Blackout,
    Calendar,
    Effect,
    FallBack,
    Group,
    Prices,
    Ramp,
    Rollouts,
    Scenario,
    bill,
    fall_back,
    join_groups,
    on_other_chip,
    pause,
    plan_dates,
    reinforcement,
    sensitivity,
    training,
)
from crosschip.plan.failures import FailureRates, Gamma, PlanError, Recovery, published_rates
from crosschip.plan.page.document import sensitivity_document
from crosschip.plan.page.drawings import draw_tornado

START = date(2027, 1, 4)
DAY_S = 86400.0
RECOVERY = Recovery(interval_s=1800.0, num_spares=20)
NEVER = FailureRates(Gamma(1.0, 1e15), Gamma(1.0, 1e15), Gamma(1.0, 1e15))
TEN_DAYS = training("pre-training", 1e12, 1e6, 0.864, 1024, RECOVERY, chip="A")


def scenario(*stages: object, **more: object) -> Scenario:
    return Scenario(stages or (TEN_DAYS,), **{"rates": published_rates(), "calendar": Calendar(START), **more})  # type: ignore[arg-type]


def test_without_stops_and_spread_the_end_is_arithmetic() -> None:
    plain = scenario(rates=NEVER, speed_spread=0.0)
    saves = math.ceil(10 * DAY_S / 1800.0) * RECOVERY.save_blocking_s
    assert plan_dates(plain).end_days() == pytest.approx(10 + saves / DAY_S)
    both = replace(plain, stages=(*plain.stages, pause("review", 3), replace(TEN_DAYS, name="again")))
    assert plan_dates(both).end_days() == pytest.approx(2 * (10 + saves / DAY_S) + 3)


def test_a_blackout_adds_its_days_and_a_restart_only_if_it_is_met() -> None:
    calendar = Calendar(START, (Blackout(date(2027, 1, 6), date(2027, 1, 7), "maintenance"),), restart_s=600.0)
    at_work = np.array([1.0, 2.0, 3.0]) * DAY_S
    np.testing.assert_allclose(calendar.elapsed_s(at_work), [DAY_S, 2 * DAY_S, 5 * DAY_S + 600])
    meeting = (Blackout(date(2027, 1, 5), date(2027, 1, 6), "a"), Blackout(date(2027, 1, 6), date(2027, 1, 8), "b"))
    joined = Calendar(START, meeting)
    assert joined.windows_s() == [(DAY_S, 5 * DAY_S)]
    before = Calendar(START, (Blackout(date(2026, 12, 24), date(2027, 1, 4), "holidays"),))
    assert before.elapsed_s(np.array([10.0]))[0] == DAY_S + 10.0


@given(days=st.lists(st.floats(0, 100), min_size=2, max_size=10), first=st.integers(0, 80), length=st.integers(0, 20))
def test_more_work_never_ends_earlier(days: list[float], first: int, length: int) -> None:
    day = date.fromordinal(START.toordinal() + first)
    calendar = Calendar(START, (Blackout(day, date.fromordinal(day.toordinal() + length), "x"),), restart_s=60.0)
    elapsed = calendar.elapsed_s(np.sort(np.array(days)) * DAY_S)
    assert (np.diff(elapsed) >= -1e-6).all()


def test_a_ramp_up_takes_the_time_that_the_missing_chips_would_have_saved() -> None:
    ramped = replace(TEN_DAYS, ramp=(Ramp(0, 0.25), Ramp(8, 1.0)))
    days = plan_dates(scenario(ramped, rates=NEVER, speed_spread=0.0)).end_days()
    assert days == pytest.approx(16.0, abs=0.02)  # 8 days at a quarter do 2 days' work; the rest is the saves
    with pytest.raises(PlanError, match="day 0"):
        replace(TEN_DAYS, ramp=(Ramp(3, 1.0),))


def test_quantiles_are_in_order_and_the_spread_of_speed_widens_them() -> None:
    narrow, wide = (plan_dates(scenario(speed_spread=spread)) for spread in (0.0, 0.2))
    assert narrow.end_dates()[0] <= narrow.end_dates()[1] <= narrow.end_dates()[2]
    assert wide.end_days(0.9) - wide.end_days(0.1) > 2 * (narrow.end_days(0.9) - narrow.end_days(0.1))
    # A lognormal factor: P90 of the time over its P50 is exp(1.2816 x spread); 1,000 trials know it to some 3 %.
    assert wide.end_days(0.9) / wide.end_days(0.5) == pytest.approx(math.exp(1.2816 * 0.2), rel=0.05)
    assert wide.chance_by(START) == 0.0
    assert 0.4 < wide.chance_by(wide.end_dates()[1]) <= 0.75


def test_a_step_of_reinforcement_is_writing_then_learning_or_the_longer_of_both() -> None:
    apart = Rollouts(1000, 4000, 100, rollout_tokens_per_s=1e5, train_tokens_per_s=2e5, scoring_s=5, tail=2.0)
    assert apart.rollout_s == pytest.approx(1000 * 4000 * 2 / 1e5 + 5)
    assert apart.step_s == pytest.approx(apart.rollout_s + 1000 * 4100 / 2e5)
    assert replace(apart, overlapped=True).step_s == apart.rollout_s
    assert reinforcement("RL", 100, apart, 64, RECOVERY).work_s == pytest.approx(100 * apart.step_s)
    with pytest.raises(PlanError, match="tail"):
        replace(apart, tail=0.5)


def test_what_moves_the_end_moves_it_the_right_way() -> None:
    base = scenario(calendar=Calendar(START, (Blackout(date(2027, 1, 6), date(2027, 1, 7), "x"),)), num_trials=300)
    effects = {each.change.split(" (")[0]: each for each in sensitivity(plan_dates(base))}
    assert effects["stops twice as often"].days_p50 > 0 > effects["stops half as often"].days_p50
    assert effects["one more day between stops"].days_p50 < 0
    assert effects["steps take 10 % longer"].days_p50 == pytest.approx(1.0, rel=0.25)
    assert effects["without blackouts"].days_p50 == pytest.approx(-2.0, rel=0.1)
    assert "later" in effects["stops twice as often"].words()
    other = plan_dates(scenario(replace(TEN_DAYS, work_s=90 * DAY_S)))
    assert "chip B" in (told := on_other_chip(plan_dates(base), other, "chip B").words())
    assert "weeks later" in told


CHOICE = FallBack(100, 60, 1e5, 1.5e5, 2e5, switch_days=14, switch_cost=1e6)


@pytest.mark.parametrize("portable", [True, False])
@pytest.mark.parametrize("day", [5, 30, 80])
def test_at_the_milestone_both_ways_cost_the_same_and_below_it_the_switch_is_cheaper(portable: bool, day: int) -> None:
    choice = replace(CHOICE, portable=portable)
    share = choice.milestone(day)
    assert choice.stay_cost(day, share) == pytest.approx(choice.switch_cost_in_all(share), rel=1e-6)
    assert choice.stay_cost(day, 0.9 * share) > choice.switch_cost_in_all(0.9 * share)
    if not portable:  # closed form
        cost = choice.switch_cost_in_all(share)
        assert share == pytest.approx(day * 3e5 / (day * 3e5 + cost))


def test_milestones_rise_and_a_dearer_switch_asks_for_less() -> None:
    milestones = fall_back(CHOICE, START)
    assert [each.share for each in milestones] == sorted(each.share for each in milestones)
    assert replace(CHOICE, switch_cost=1e8).milestone(30) < CHOICE.milestone(30)
    assert "(pretrain, step 9), planned 10%" in milestones[0].words("pretrain, step 9")
    assert replace(CHOICE, portable=False).last_switch_day(100) == pytest.approx(26)
    assert replace(CHOICE, portable=False).last_switch_day(70) is None
    with pytest.raises(PlanError, match="no switch can ever be cheaper"):
        FallBack(1, 1, 0, 1, 0, 1)


@pytest.mark.parametrize("deadline", [75.0, 90.0, 120.0])
@pytest.mark.parametrize("days_b", [60.0, 150.0])
def test_the_last_day_of_a_switch_just_meets_the_deadline(deadline: float, days_b: float) -> None:
    choice = replace(CHOICE, days_b=days_b)
    last = choice.last_switch_day(deadline)

    def ends(day: float) -> float:
        return day + choice.switch_days + days_b * (1 - day / choice.days_a)

    if last is None:
        assert min(ends(day) for day in np.linspace(0, choice.days_a, 101)) > deadline
    else:
        assert ends(last) <= deadline + 1e-6
        assert last == choice.days_a or ends(last + 0.1) > deadline


def test_the_bill_adds_spares_energy_and_says_what_it_left_out() -> None:
    paid = replace(TEN_DAYS, spare_chips=20 * 8)
    schedule = plan_dates(scenario(paid, rates=NEVER, speed_spread=0.0))
    found = bill(schedule, Prices(per_chip_hour=2.0, chip_kw=1.0, per_kwh=0.1))
    hours = schedule.end_days() * 24 * (1024 + 20 * 8)
    assert found.chip_hours[1] == pytest.approx(hours)
    assert found.money is not None
    assert found.money[1] == pytest.approx(hours * 2.1)
    assert found.energy_mwh is not None
    assert not found.left_out
    nothing = bill(schedule, Prices())
    assert nothing.money is None
    assert len(nothing.left_out) == 2
    with pytest.raises(PlanError, match="'A' has no prices"):
        bill(schedule, {"B": Prices()})


def test_chips_of_two_kinds_in_one_stage_are_each_paid_at_their_price() -> None:
    mixed = replace(TEN_DAYS, num_chips=1024, beside=(("B", 24),), recovery=replace(RECOVERY, num_spares=0))
    schedule = plan_dates(scenario(mixed, rates=NEVER, speed_spread=0.0))
    found = bill(schedule, {"A": Prices(per_chip_hour=1.0), "B": Prices(per_chip_hour=3.0)})
    assert found.money is not None
    assert found.money[1] == pytest.approx(schedule.end_days() * 24 * (1000 + 3 * 24))
    assert mixed.chips == (("A", 1000), ("B", 24))


def test_a_change_that_moves_a_long_run_by_minutes_is_none_and_a_short_run_by_minutes_is_told() -> None:
    assert Effect("x", 0.01, 0.0, 100.0).words() == "x: no difference"
    assert Effect("x", 0.01, 0.0, 0.1).words() == "x: 14 min later"
    assert Effect("x", -0.5, 0.0, 2.0).words() == "x: 12 h earlier"


def test_groups_of_two_vendors_add_up_and_a_thin_link_takes_its_share() -> None:
    groups = [Group("A", 64, 3e5), Group("B", 32, 1e5)]
    free = join_groups(groups, tokens_between=1e8, exchange_s=0.0)
    assert free.tokens_per_s == pytest.approx(4e5)
    assert free.batch_shares == (0.75, 0.25)
    thin = join_groups(groups, tokens_between=1e8, exchange_s=80.0)
    assert thin.utilisation == pytest.approx(250 / 330)
    hidden = join_groups(groups, tokens_between=1e8, exchange_s=80.0, overlap=0.5)
    assert hidden.utilisation == pytest.approx(1.0)
    equal = join_groups(groups, tokens_between=1e8, exchange_s=0.0, divided_by_speed=False)
    assert equal.tokens_per_s == pytest.approx(2e5)  # the slow group sets the pace
    assert join_groups(groups[:1], tokens_between=1e8, exchange_s=80.0).utilisation == 1.0


def test_wrong_input_says_what_to_change() -> None:
    with pytest.raises(PlanError, match="before today"):
        Calendar.from_today(START, date(2027, 2, 1))
    with pytest.raises(PlanError, match="swap its dates"):
        Blackout(date(2027, 2, 2), date(2027, 2, 1), "x")
    with pytest.raises(PlanError, match="tokens of x"):
        training("x", 0, 1, 1, 8, RECOVERY)
    with pytest.raises(PlanError, match="one name"):
        scenario(TEN_DAYS, TEN_DAYS)
    with pytest.raises(PlanError, match="years after its start"):
        plan_dates(scenario(replace(TEN_DAYS, work_s=1e13), rates=NEVER)).end_dates()


def test_a_question_whose_trials_do_not_end_is_told_and_leaves_the_plan() -> None:
    always = FailureRates(Gamma(1e6, 1e6 / 60), Gamma(1.0, 1e15), Gamma(1.0, 1e15))  # 60 stops a day
    recovery = Recovery(interval_s=1800.0, save_blocking_s=0.0, restart_s=600.0, manual_share=0.0, swap_share=0.0)
    slow = replace(TEN_DAYS, work_s=DAY_S, recovery=recovery)
    base = plan_dates(scenario(slow, rates=always, num_trials=10))
    often = replace(base, scenario=replace(base.scenario, rate_factor=20.0))
    effects = {each.change: each for each in sensitivity(often)}
    assert math.isinf(effects["stops twice as often"].days_p50)
    assert "do not come to an end" in effects["stops twice as often"].words()
    told = {each["change"]: each for each in sensitivity_document(list(effects.values()))}
    assert told["stops twice as often"]["days_p50"] is None
    assert "does not end" in draw_tornado(list(told.values()))


def test_chip_hours_of_a_ramp_up_are_of_the_chips_that_are_there() -> None:
    whole, ramped = (
        plan_dates(scenario(stage, rates=NEVER, speed_spread=0.0))
        for stage in (TEN_DAYS, replace(TEN_DAYS, ramp=(Ramp(0, 0.25), Ramp(8, 1.0))))
    )
    assert ramped.stages[0].chip_hours[0] == pytest.approx(whole.stages[0].chip_hours[0], rel=0.01)
    hours, paid = (bill(each, Prices(per_chip_hour=1.0)) for each in (whole, ramped))
    assert paid.money is not None
    assert paid.money[1] == paid.chip_hours[1] == pytest.approx(hours.chip_hours[1], rel=0.01)


def test_a_ramp_up_counts_the_days_of_the_calendar() -> None:
    ramped = replace(TEN_DAYS, ramp=(Ramp(0, 0.25), Ramp(8, 1.0)))
    closed = Calendar(START, (Blackout(date(2027, 1, 6), date(2027, 1, 9), "closed"),))  # the days 2 to 5
    days = plan_dates(scenario(ramped, rates=NEVER, speed_spread=0.0, calendar=closed)).end_days()
    assert days == pytest.approx(8 + 9, abs=0.02)  # four days at a quarter do one day's work


@given(st.lists(st.floats(0, 100), min_size=1, max_size=10), st.integers(0, 80), st.integers(0, 20))
def test_time_at_work_is_the_inverse_of_time_elapsed(days: list[float], first: int, length: int) -> None:
    day = date.fromordinal(START.toordinal() + first)
    calendar = Calendar(START, (Blackout(day, date.fromordinal(day.toordinal() + length), "x"),), restart_s=60.0)
    at_work = np.array(days) * DAY_S
    np.testing.assert_allclose(calendar.at_work_s(calendar.elapsed_s(at_work)), at_work, atol=1e-6)


def test_a_stage_does_not_begin_in_a_blackout() -> None:
    calendar = Calendar(START, (Blackout(START, date(2027, 1, 10), "holidays"),))
    found = plan_dates(scenario(rates=NEVER, calendar=calendar))
    assert (found.stages[0].begin_s == 7 * DAY_S).all()


def test_a_blackout_without_an_end_is_what_is_to_be_shortened() -> None:
    calendar = Calendar(START, (Blackout(date(2027, 1, 5), date(9999, 12, 31), "closed"),))
    with pytest.raises(PlanError, match="of them blackouts") as caught:
        plan_dates(scenario(rates=NEVER, calendar=calendar)).end_dates()
    assert caught.value.remedy == "shorten the blackouts"
