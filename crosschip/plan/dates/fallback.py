"""The fall-back rule: by which day must a run on chip A have got how far, or is the switch to chip B cheaper?

On a day d after the start the run on A stands at a share f of its work. If it goes on at the pace it has shown, it
needs d (1 - f) / f more days; a switch needs its own days and then B's days for what is left (or for everything, where
the weights cannot move). Each side costs its cluster's price and what a day of delay is worth. The milestone of day d
is the share f at which both cost the same: below it the switch is cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta

from crosschip.plan.failures.problem import PlanError, at_least, positive

__all__ = ["FallBack", "Milestone", "fall_back"]


@dataclass(frozen=True)
class FallBack:
    """What the choice rests on.

    Attributes:
        days_a: days that the whole run is planned to take on A, `days_b` on B (at P90, so that the fall-back is safe).
        cost_a_per_day: price of A's cluster a day, `cost_b_per_day` of B's; `delay_per_day` is what a later end costs.
        switch_days: from the decision to B's first step: the cluster, the port, the qualification.
        switch_cost: paid once for it.
        portable: the weights and the optimizer's state move to B with a certificate; else B begins anew.
    """

    days_a: float
    days_b: float
    cost_a_per_day: float
    cost_b_per_day: float
    delay_per_day: float
    switch_days: float
    switch_cost: float = 0.0
    portable: bool = True

    def __post_init__(self) -> None:
        for name in ("days_a", "days_b"):
            positive(name, getattr(self, name))
        for name in ("cost_a_per_day", "cost_b_per_day", "delay_per_day", "switch_days", "switch_cost"):
            at_least(name, getattr(self, name), 0.0)
        if self.cost_a_per_day + self.delay_per_day == 0.0:
            raise PlanError(
                "neither chip A's price nor a day of delay costs anything, so no switch can ever be cheaper",
                "give a price per chip-hour, or what a day of delay costs",
            )

    def stay_cost(self, day: float, done: float) -> float:
        """What going on costs from `day` on, at the pace shown: `done` is the share of the work done by then."""
        if done <= 0.0:
            return math.inf
        return day * (1 - done) / done * (self.cost_a_per_day + self.delay_per_day)

    def switch_cost_in_all(self, done: float) -> float:
        """What the switch costs: once, then days of waiting, then B's days for what it has to do."""
        days = self.days_b * ((1 - done) if self.portable else 1.0)
        return (
            self.switch_cost + self.switch_days * self.delay_per_day + days * (self.cost_b_per_day + self.delay_per_day)
        )

    def milestone(self, day: float) -> float:
        """The share of the work that must be done by `day`; with less, the switch is the cheaper way."""
        positive("day", day)
        low, high = 0.0, 1.0
        for _ in range(60):  # what staying costs above the switch falls as more is done
            middle = (low + high) / 2
            if self.stay_cost(day, middle) > self.switch_cost_in_all(middle):
                low = middle
            else:
                high = middle
        return high

    def last_switch_day(self, deadline_days: float) -> float | None:
        """The last day on which B still ends in time; None if it never does, even from the first day on.

        Where the weights are portable the run on A counts at its planned pace until then.
        """
        positive("deadline_days", deadline_days)
        spare = deadline_days - self.switch_days - self.days_b
        if not self.portable:
            return spare if spare >= 0 else None
        if spare < 0 and self.days_b <= self.days_a:
            return None
        gained = self.days_b / self.days_a  # days of B that one day on A saves
        # day + switch_days + days_b - gained * day <= deadline
        if gained >= 1.0:  # A is as fast as B: each day on A helps, until its own end
            first = -spare / (gained - 1.0) if gained > 1.0 else (0.0 if spare >= 0 else math.inf)
            return self.days_a if first <= self.days_a else None
        return min(spare / (1.0 - gained), self.days_a)


@dataclass(frozen=True)
class Milestone:
    """By the end of `day`, `share` of the work must be done; `planned` is the share that the plan expects then."""

    day: date
    share: float
    planned: float

    def words(self, where: str) -> str:
        """Such as `by 2027-03-01: 28 % of the work (pretrain, step 4,100 of 15,000), planned 33 %`."""
        return f"by {self.day}: {self.share:.0%} of the work ({where}), planned {self.planned:.0%}"


def fall_back(choice: FallBack, start: date, shares: Sequence[float] = (0.1, 0.25, 0.5, 0.75)) -> list[Milestone]:
    """The milestones at these shares of the planned duration on A."""
    found = []
    for share in shares:
        days = max(1, round(share * choice.days_a))
        planned = min(1.0, days / choice.days_a)
        found.append(Milestone(start + timedelta(days=days), choice.milestone(days), planned))
    return found
