"""A job's life with stops, event by event, for many trials at once.

Every second of a trial is exactly one of: useful work that stayed, work that was lost, detection and restart, saving,
or idle (no spare node). Between two stops everything is known in closed form, so each event costs a few operations on a
vector of trials, whatever the number of chips. After many stops a trial's pace is known, and takes it to its end: else
the unluckiest of a thousand would decide how long a plan takes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosschip.plan.failures.problem import PlanError, at_least
from crosschip.plan.failures.rates import SampledRates
from crosschip.plan.failures.recovery import Recovery

__all__ = ["Ledger", "simulate"]

Values = NDArray[np.float64]

_DAY_S = 86400.0
_EVENTS_DRAWN = 256  # events whose random numbers are drawn at once, for all trials
# Stops. Luck is a percent of the pace by then, or a few where stops are as frequent as saves.
_PACE_KNOWN_AFTER = 10_240
_MOST_STOPS = 2_000_000  # of a trial that has no end; where few have none, the quantiles of the others stand
_ENDLESS_SHARE = 0.01
_STATE = (
    "number", "work", "horizon", "useful", "lost", "restart", "saving", "idle", "wall", "stops", "down_idle",
    "down_restart", "spare_at", "next_spare", "per_s", "corrupt_below", "swap_below",
)  # fmt: skip


@dataclass
class Ledger:
    """Where the seconds of each trial went; all arrays have one value for each trial.

    `finished` says whether the work was done before the horizon, `num_silent` how many silent corruptions stayed in the
    weights unnoticed.
    """

    useful_s: Values
    lost_s: Values
    restart_s: Values
    saving_s: Values
    idle_s: Values
    wall_s: Values
    num_stops: Values
    num_silent: Values
    finished: NDArray[np.bool_]

    @property
    def goodput(self) -> Values:
        """Useful time over wall time; 1 for a trial without any time."""
        return np.divide(self.useful_s, self.wall_s, out=np.ones_like(self.wall_s), where=self.wall_s > 0)

    @classmethod
    def empty(cls, num: int) -> Ledger:
        """A ledger of so many trials in which nothing has happened."""
        zeros = {each.name: np.zeros(num) for each in fields(cls) if each.name != "finished"}
        return cls(**zeros, finished=np.zeros(num, dtype=bool))

    def then(self, later: Ledger) -> Ledger:
        """This ledger and what came after it as one; finished is what the later one says."""
        sums: dict[str, Any] = {
            each.name: getattr(self, each.name) + getattr(later, each.name)
            for each in fields(self)
            if each.name != "finished"
        }
        return Ledger(**sums, finished=later.finished)


def simulate(
    rates: SampledRates,
    num_chips: int,
    recovery: Recovery,
    *,
    work_s: float | Values = np.inf,
    horizon_s: float | Values = np.inf,
    seed: int | tuple[int, ...] = 0,
) -> Ledger:
    """Run a job of `work_s` seconds of useful work on `num_chips` until it is done or `horizon_s` has passed.

    One trial for each draw in `rates`. The same seed gives the same stops in units of their rates, so that two calls
    differ by what was changed and not by luck. Work that ends saves once more. At most a trial in a
    hundred may stop so often that it never comes to an end: it is left at its two-millionth stop.

    Raises:
        PlanError: neither work nor horizon is finite, or more trials than that never come to an end.
    """
    at_least("num_chips", num_chips, 1)
    work = np.broadcast_to(np.asarray(work_s, dtype=np.float64), len(rates)).copy()
    horizon = np.broadcast_to(np.asarray(horizon_s, dtype=np.float64), len(rates)).copy()
    if np.isnan(work).any() or np.isnan(horizon).any() or (np.minimum(work, horizon) < 0).any():
        raise PlanError("work or horizon is negative or no number", "give seconds of at least 0")
    if np.isinf(work).any() and np.isinf(horizon).any():
        raise PlanError("the job has neither an amount of work nor a horizon", "give work_s or horizon_s")
    random = np.random.default_rng(seed)
    ledger = Ledger.empty(len(rates))
    trials = _Trials(rates, num_chips, recovery, work, horizon, ledger)
    for _ in range(_PACE_KNOWN_AFTER // _EVENTS_DRAWN):
        gaps = random.exponential(size=(_EVENTS_DRAWN, len(rates)))
        chances = random.random((_EVENTS_DRAWN, 3, len(rates)))
        if trials.live(gaps, chances) == 0:
            break
    if endless := trials.keep_pace():
        raise PlanError(
            f"{endless} of {len(rates)} trials do not end within {_MOST_STOPS:,} stops, one every "
            f"{1 / float(np.median(trials.per_s)):.3g} s: what is done between two of them is lost again",
            "save more often, restart faster, or use fewer chips",
        )
    ledger.num_silent = random.poisson(trials.silent_per_s * ledger.wall_s).astype(np.float64)
    return ledger


class _Trials:
    """The state of the trials that go on, one value for each; `number` is a trial's place in the ledger."""

    def __init__(
        self, rates: SampledRates, num_chips: int, recovery: Recovery, work: Values, horizon: Values, ledger: Ledger
    ) -> None:
        num = len(rates)
        self.recovery, self.ledger = recovery, ledger
        corrupt = rates.corruption_per_day * num_chips
        caught = corrupt * recovery.corruption_caught
        stops = rates.stops_per_day(num_chips)
        self.silent_per_s = (corrupt - caught) / _DAY_S  # of all trials, open or not
        self.per_s = (stops + caught) / _DAY_S
        total = np.maximum(stops + caught, 1e-300)
        self.corrupt_below = caught / total
        self.swap_below = self.corrupt_below + recovery.swap_share * rates.chip_per_day * num_chips / total
        self.number = np.arange(num)
        self.work, self.horizon = work, horizon
        self.useful, self.lost, self.restart, self.saving, self.idle, self.wall, self.stops = np.zeros((7, num))
        self.down_idle, self.down_restart = np.zeros((2, num))
        # When each spare is there again; with equal repair times the oldest is always the next, so a ring will do. How
        # many nodes are broken at once depends on the mean repair time only (a queue M/G/infinity). It grows up to
        # `num_spares` with the events: an event takes one spare at most, and most of a large number are never needed.
        self.spare_at = np.zeros((num, 0))
        self.next_spare = np.zeros(num, dtype=np.int64)
        self._drop(self.work <= 0.0, finished=True)
        self._drop(self.horizon <= 0.0, finished=False)

    def live(self, gaps: Values, chances: Values) -> int:
        """Go on by one event for each row of draws; the number of trials that are still open."""
        more_spares = min(len(gaps), self.recovery.num_spares - self.spare_at.shape[1])
        self.spare_at = np.hstack([self.spare_at, np.zeros((len(self.number), more_spares))])
        draws, kinds = gaps[:, self.number], chances[:, :, self.number]
        for event in range(len(gaps)):
            if not len(self.number):
                return 0
            going = self._advance(draws[event], kinds[event])
            if not going.all():
                draws, kinds = draws[:, going], kinds[:, :, going]
        return len(self.number)

    def keep_pace(self) -> int:
        """Take the open trials to their ends at the pace they have had; the number of those that have none, if many."""
        with np.errstate(divide="ignore"):
            until_end, until_horizon = self.work / self.useful, self.horizon / self.wall
            times = np.minimum(until_end, until_horizon)
        most_times = _MOST_STOPS / self.stops
        endless = times > most_times
        if endless.sum() > _ENDLESS_SHARE * len(self.silent_per_s):
            return int(endless.sum())
        times = np.minimum(times, most_times)
        for name in ("useful", "lost", "restart", "saving", "idle", "wall", "stops"):
            setattr(self, name, getattr(self, name) * times)
        self._drop((until_end <= until_horizon) & ~endless, finished=True)
        self._drop(np.ones(len(self.number), dtype=bool), finished=False)
        return 0

    def _advance(self, gaps: Values, chances: Values) -> NDArray[np.bool_]:
        """Let each trial live until its next stop, its end or the horizon; which of them go on.

        `gaps` are exponential draws of mean 1, `chances` three rows of uniform draws: the kind of stop, whether it
        hangs, and whether people are needed.
        """
        recovery = self.recovery
        with np.errstate(divide="ignore"):
            gap = self.down_idle + gaps / self.per_s  # a job that waits for a node does not run, so nothing stops it
        left = self.work - self.useful
        needed = left * 1.0
        if recovery.save_blocking_s > 0.0:  # else endless work times no save would be no number
            needed += np.ceil(left / recovery.interval_s) * recovery.save_blocking_s
        until_end = self.down_idle + self.down_restart + needed
        until_horizon = self.horizon - self.wall
        span = np.minimum(np.minimum(gap, until_end), until_horizon)
        ends = until_end <= span
        stops = ~ends & (gap < until_horizon)

        spent_idle = np.minimum(span, self.down_idle)
        spent_restart = np.minimum(span - spent_idle, self.down_restart)
        run = span - spent_idle - spent_restart
        useful, saving, lost = self._cycles(run, left, chances[0], stops)
        self.useful += np.where(ends, left, useful)
        self.saving += np.where(ends, run - left, saving)
        self.lost += lost
        self.idle += spent_idle
        self.restart += spent_restart
        self.wall += span
        self.stops += stops
        self._fall(chances)
        if stops.all():
            return stops
        self._drop(ends, finished=True)
        cut = ~stops[~ends]
        self._drop(cut, finished=False)
        return stops

    def _cycles(
        self, run: Values, left: Values, kind: Values, stops: NDArray[np.bool_]
    ) -> tuple[Values, Values, Values]:
        """(useful, saving, lost) of a run of work and saves that ends with a stop, or is cut by the horizon."""
        recovery = self.recovery
        interval, save = recovery.interval_s, recovery.save_blocking_s
        full = np.floor(run / (interval + save))
        rest = np.clip(run - full * (interval + save), 0.0, interval + save)
        part = np.minimum(rest, np.minimum(interval, left - full * interval))  # the last save comes when work ends
        done = full * interval + part
        late = (full > 0) & (rest < recovery.save_lag_s)  # the newest save is not on disk yet
        corrupt = kind < self.corrupt_below
        # A corruption is noticed late: the saves since are no good either.
        back = np.ceil(recovery.corruption_latency_s / interval) * interval
        lost = part + late * interval + corrupt * back
        lost = stops * np.minimum(lost, self.useful + done) / recovery.num_groups
        return done - lost, full * save + (rest - part), lost

    def _fall(self, chances: Values) -> None:
        """What each trial must go through after its stop; of no effect for one that ended."""
        recovery = self.recovery
        detection = np.where(chances[1] < recovery.hang_share, recovery.hang_detection_s, recovery.detection_s)
        people = (chances[2] < recovery.manual_share) * recovery.manual_s
        self.down_restart = (detection + recovery.restart_s + people) / recovery.num_groups
        taken = np.flatnonzero((chances[0] >= self.corrupt_below) & (chances[0] < self.swap_below))
        now = self.wall[taken]
        there = now + recovery.repair_s  # without spares the node itself must come back
        if recovery.num_spares:
            slot = self.next_spare[taken] % recovery.num_spares
            there = np.maximum(self.spare_at[taken, slot], now)
            self.spare_at[taken, slot] = there + recovery.repair_s
            self.next_spare[taken] += 1
        self.down_idle[:] = 0.0
        self.down_idle[taken] = (there - now) / recovery.num_groups

    def _drop(self, done: NDArray[np.bool_], *, finished: bool) -> None:
        """Write the trials that are `done` into the ledger and go on without them."""
        if not done.any():
            return
        at, ledger = self.number[done], self.ledger
        for name in ("useful", "lost", "restart", "saving", "idle", "wall"):
            getattr(ledger, f"{name}_s")[at] = getattr(self, name)[done]
        ledger.num_stops[at], ledger.finished[at] = self.stops[done], finished
        for name in _STATE:
            setattr(self, name, getattr(self, name)[~done])
