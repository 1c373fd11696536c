"""What moves the end date: one thing changed at a time, with the same luck, so that the difference is the change's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from crosschip.plan.dates.schedule import Scenario, Schedule, plan_dates
from crosschip.plan.dates.stages import Stage
from crosschip.plan.failures.problem import PlanError
from crosschip.plan.failures.recovery import Recovery

__all__ = ["Effect", "on_other_chip", "sensitivity"]

_DAY_H = 24.0
_LEAST_SHARE = 0.001


@dataclass(frozen=True)
class Effect:
    """Days that one change adds to (or, negative, takes from) the P50 and the P90 of the end date.

    `of_days` is the plan's own P50: a change of less than a thousandth of it is told as none. Both are infinite where a
    trial loses between two stops what it does, and so does not come to an end.
    """

    change: str
    days_p50: float
    days_p90: float
    of_days: float = 0.0

    def words(self) -> str:
        """Such as `stops twice as often: 11 days later`."""
        days = self.days_p50
        if math.isinf(days):
            return f"{self.change}: some trials stop so often that they do not come to an end"
        if abs(days) <= max(_LEAST_SHARE * self.of_days, 1e-6):
            return f"{self.change}: no difference"
        return f"{self.change}: {_length(abs(days))} {'later' if days > 0 else 'earlier'}"


def _length(days: float) -> str:
    if days >= 28:
        return f"{days / 7:.0f} weeks"
    if days >= 1:
        return f"{days:.{0 if days >= 10 else 1}f} days"
    return f"{days * 24:.2g} h" if days >= 1 / 24 else f"{days * 1440:.2g} min"


def sensitivity(base: Schedule) -> list[Effect]:
    """The usual questions to a plan, largest effect first."""
    effects = []
    for change, changed in _questions(base.scenario):
        try:
            effects.append(_effect(change, base.end_days, plan_dates(changed).end_days))
        except PlanError:
            effects.append(Effect(change, math.inf, math.inf, base.end_days()))
    return sorted(effects, key=lambda effect: -abs(effect.days_p50))


def on_other_chip(base: Schedule, other: Schedule, chip: str) -> Effect:
    """The same run on another chip, planned in `other`."""
    return _effect(f"on {chip}", base.end_days, other.end_days)


def _effect(change: str, before: Callable[[float], float], after: Callable[[float], float]) -> Effect:
    return Effect(change, after(0.5) - before(0.5), after(0.9) - before(0.9), before(0.5))


def _questions(scenario: Scenario) -> Iterator[tuple[str, Scenario]]:
    running = [stage for stage in scenario.stages if stage.recovery is not None]
    if running:
        largest = max(running, key=lambda stage: stage.work_s)
        hours = scenario.rates.hours_between_stops(largest.num_chips)[1] / max(scenario.rate_factor, 1e-12)
        day_more = scenario.rate_factor * hours / (hours + _DAY_H)
        yield (
            f"one more day between stops ({hours:.3g} h to {hours + _DAY_H:.3g} h)",
            replace(scenario, rate_factor=day_more),
        )
    yield "stops half as often", replace(scenario, rate_factor=scenario.rate_factor / 2)
    yield "stops twice as often", replace(scenario, rate_factor=scenario.rate_factor * 2)
    yield "steps take 10 % longer", _work(scenario, 1.1)
    yield "steps take 10 % less", _work(scenario, 1 / 1.1)
    yield "restarts in half the time", _recovery(scenario, lambda each: replace(each, restart_s=each.restart_s / 2))
    yield "restarts take twice as long", _recovery(scenario, lambda each: replace(each, restart_s=each.restart_s * 2))
    yield (
        "no hang goes unnoticed for longer than a crash",
        _recovery(scenario, lambda each: replace(each, hang_share=0.0)),
    )
    yield (
        "saves in the tenfold time",
        _recovery(scenario, lambda each: replace(each, save_blocking_s=each.save_blocking_s * 10)),
    )
    yield "half the spare hosts", _recovery(scenario, lambda each: replace(each, num_spares=each.num_spares // 2))
    if scenario.calendar.blackouts:
        yield "without blackouts", replace(scenario, calendar=replace(scenario.calendar, blackouts=()))


def _work(scenario: Scenario, factor: float) -> Scenario:
    def slower(stage: Stage) -> Stage:
        return stage if stage.recovery is None else replace(stage, work_s=stage.work_s * factor)

    return replace(scenario, stages=tuple(slower(stage) for stage in scenario.stages))


def _recovery(scenario: Scenario, change: Callable[[Recovery], Recovery]) -> Scenario:
    def changed(stage: Stage) -> Stage:
        return stage if stage.recovery is None else replace(stage, recovery=change(stage.recovery))

    return replace(scenario, stages=tuple(changed(stage) for stage in scenario.stages))
