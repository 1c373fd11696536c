"""When each stage of a run ends: the stages one after the other, in many trials, put onto the calendar.

What is uncertain once for the whole run (the rates of stops, the speed against its estimate) is drawn once for each
trial and holds for all its stages, so that bad luck adds up as it would.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

import numpy as np
from numpy.typing import NDArray

from crosschip.plan.dates.calendar import Calendar
from crosschip.plan.dates.stages import Stage
from crosschip.plan.failures.problem import PlanError, at_least
from crosschip.plan.failures.rates import FailureRates, SampledRates
from crosschip.plan.failures.simulation import Ledger, simulate

__all__ = ["QUANTILES", "Scenario", "Schedule", "StageDates", "plan_dates"]

Values = NDArray[np.float64]
_Parts = Sequence[tuple[float, float | Values]]

QUANTILES = (0.1, 0.5, 0.9)
_DAY_S = 86400.0
_SPEED_SEED, _RATE_SEED = 1, 2


@dataclass(frozen=True)
class Scenario:
    """All that the dates rest on. `speed_spread` is the standard deviation of the logarithm of true over planned time.

    `rate_factor` multiplies every rate of stops, for questions of the form "what if it broke half as often".
    """

    stages: tuple[Stage, ...]
    rates: FailureRates
    calendar: Calendar
    speed_spread: float = 0.1
    rate_factor: float = 1.0
    num_trials: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.stages:
            raise PlanError("the plan has no stage", "give at least one stage with tokens or steps")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise PlanError(f"two stages have one name: {names}", "name each stage differently")
        at_least("speed_spread", self.speed_spread, 0.0)
        at_least("rate_factor", self.rate_factor, 0.0)
        at_least("num_trials", self.num_trials, 10)


@dataclass(frozen=True)
class StageDates:
    """One stage's dates by trial: `begin_s` and `end_s` in seconds since the plan's start, and where the time went.

    `chip_s` is chips times seconds at work, of a ramp-up those chips that are there.
    """

    stage: Stage
    begin_s: Values
    end_s: Values
    ledger: Ledger
    chip_s: Values

    @property
    def chip_hours(self) -> Values:
        """Chips times hours at work, stops and waiting included, blackouts not."""
        return self.chip_s / 3600


@dataclass(frozen=True)
class Schedule:
    """The stages with their dates."""

    scenario: Scenario
    stages: tuple[StageDates, ...]

    @property
    def end_s(self) -> Values:
        """When the last stage ends, in seconds since the start, by trial."""
        return self.stages[-1].end_s

    def end_days(self, share: float = 0.5) -> float:
        """Days from the start to the end, at this quantile."""
        return float(np.quantile(self.end_s, share)) / _DAY_S

    def end_dates(self) -> tuple[date, date, date]:
        """P10, P50 and P90 of the end date."""
        low, middle, high = (self.scenario.calendar.day(float(np.quantile(self.end_s, each))) for each in QUANTILES)
        return low, middle, high

    def chance_by(self, day: date) -> float:
        """The share of trials that have ended when this day is over."""
        limit_s = ((day - self.scenario.calendar.start).days + 1) * _DAY_S
        return float(np.mean(self.end_s <= limit_s))


def plan_dates(scenario: Scenario) -> Schedule:
    """Live through the scenario's trials; the same seed gives the same luck.

    Raises:
        PlanError: a trial loses between two stops what it does, and so does not come to an end.
    """
    num, seed = scenario.num_trials, scenario.seed
    rates = scenario.rates.sample(num, seed + _RATE_SEED).scaled(scenario.rate_factor)
    speed = np.exp(scenario.speed_spread * np.random.default_rng((seed, _SPEED_SEED)).standard_normal(num))
    at_work = np.zeros(num)
    found: list[StageDates] = []
    for number, stage in enumerate(scenario.stages):
        parts = _parts(stage, found[-1].end_s if found else np.zeros(num), scenario.calendar)
        ledger, chip_s = _live(stage, parts, stage.work_s * speed, rates, (seed, number))
        begin = scenario.calendar.elapsed_s(at_work)
        at_work = at_work + ledger.wall_s
        found.append(StageDates(stage, begin, scenario.calendar.elapsed_s(at_work), ledger, chip_s))
    return Schedule(scenario, tuple(found))


def _live(
    stage: Stage, parts: _Parts, work_s: Values, rates: SampledRates, seed: tuple[int, ...]
) -> tuple[Ledger, Values]:
    """One stage's time and chip-seconds: each part of a ramp-up runs on its own number of chips until the next are
    there."""
    if stage.recovery is None:
        ledger = Ledger.empty(len(rates))
        ledger.useful_s[:] = ledger.wall_s[:] = stage.work_s  # a pause is no faster on faster chips
        ledger.finished[:] = True
        return ledger, ledger.wall_s * stage.num_chips
    whole, chip_s = Ledger.empty(len(rates)), np.zeros(len(rates))
    left = work_s
    for number, (share, length_s) in enumerate(parts):
        chips = max(1, math.ceil(stage.num_chips * share))
        ledger = simulate(rates, chips, stage.recovery, work_s=left / share, horizon_s=length_s, seed=(*seed, number))
        left = np.where(ledger.finished, 0.0, np.maximum(left - ledger.useful_s * share, 0.0))
        whole, chip_s = whole.then(ledger), chip_s + chips * ledger.wall_s
    return whole, chip_s


def _parts(stage: Stage, since_s: Values, calendar: Calendar) -> _Parts:
    """(share of the chips, seconds at work) of each part of a ramp-up whose days count from `since_s`; the last has no
    end. Days of a blackout pass without work."""
    if not stage.ramp:
        return [(1.0, math.inf)]
    edges = [calendar.at_work_s(since_s + each.day * _DAY_S) for each in stage.ramp]
    lengths: list[float | Values] = [*(end - begin for begin, end in itertools.pairwise(edges)), math.inf]
    return [(each.share, length) for each, length in zip(stage.ramp, lengths, strict=True)]
