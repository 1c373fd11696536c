"""From time at work to the calendar: a start, and windows in which nothing may run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta

import numpy as np
from numpy.typing import NDArray

from crosschip.plan.failures.problem import PlanError, at_least

__all__ = ["Blackout", "Calendar"]

_DAY_S = 86400.0


@dataclass(frozen=True)
class Blackout:
    """A window without the cluster, both days included: a holiday, maintenance, another tenant."""

    first: date
    last: date
    why: str

    def __post_init__(self) -> None:
        if self.last < self.first:
            raise PlanError(
                f"the blackout {self.why!r} ends on {self.last}, before it begins on {self.first}", "swap its dates"
            )


@dataclass(frozen=True)
class Calendar:
    """When the plan starts, the windows without the cluster, and the restart that each of them costs."""

    start: date
    blackouts: tuple[Blackout, ...] = ()
    restart_s: float = 0.0

    def __post_init__(self) -> None:
        at_least("restart_s", self.restart_s, 0.0)

    @classmethod
    def from_today(
        cls, start: date, today: date, blackouts: Iterable[Blackout] = (), restart_s: float = 0.0
    ) -> Calendar:
        """A calendar whose start must not be over.

        Raises:
            PlanError: the start lies before `today`.
        """
        if start < today:
            raise PlanError(f"the start {start} is before today, {today}", f"give {today} or a later start")
        return cls(start, tuple(blackouts), restart_s)

    def windows_s(self) -> list[tuple[float, float]]:
        """The windows as (begin, end) in seconds since the start, joined where they meet, those before it left out."""
        joined: list[tuple[float, float]] = []
        for each in sorted(self.blackouts, key=lambda blackout: blackout.first):
            begin = max(0.0, (each.first - self.start).days * _DAY_S)
            end = ((each.last - self.start).days + 1) * _DAY_S
            if end <= 0.0:
                continue
            if joined and begin <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
            else:
                joined.append((begin, end))
        return joined

    def elapsed_s(self, at_work_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """Seconds since the start after so many seconds at work: windows and the restarts after them are added.

        Work that is done at the very moment when a window begins is done before it; before the start nothing is done.
        """
        elapsed = np.array(at_work_s, dtype=np.float64)
        for begin, end in self.windows_s():
            restart = self.restart_s if begin > 0.0 else 0.0
            later = elapsed > begin if begin > 0.0 else elapsed >= begin
            elapsed = np.where(later, elapsed + (end - begin) + restart, elapsed)
        return elapsed

    def at_work_s(self, elapsed_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """Seconds at work within so many seconds since the start: the inverse of `elapsed_s`, a window counts none."""
        at_work = np.array(elapsed_s, dtype=np.float64)
        for begin, end in reversed(self.windows_s()):
            restart = self.restart_s if begin > 0.0 else 0.0
            at_work = np.where(at_work > begin, np.maximum(begin, at_work - (end - begin) - restart), at_work)
        return at_work

    def moment(self, elapsed_s: float) -> datetime:
        """The moment so many seconds after the start's midnight.

        Raises:
            PlanError: it lies beyond the year 9999: the plan never ends.
        """
        try:
            return datetime.combine(self.start, time()) + timedelta(seconds=elapsed_s)
        except OverflowError:
            closed_s = sum(end - begin for begin, end in self.windows_s() if begin < elapsed_s)
            raise PlanError(
                f"the plan ends {elapsed_s / _DAY_S / 365:.3g} years after its start, "
                f"{closed_s / _DAY_S / 365:.3g} of them blackouts",
                "shorten the blackouts" if closed_s > elapsed_s / 2 else "use more chips or fewer tokens",
            ) from None

    def day(self, elapsed_s: float) -> date:
        """The day on which that moment lies."""
        return self.moment(elapsed_s).date()
