"""A link between groups that is slower than it was, or stood still, from how long exchanges take. Pure, no torch.

A group that comes late keeps the others waiting in the exchange as a slow link does. So each tells how long it was busy
since the exchange before, and only what that does not explain is the link's.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping

from crosschip.train.guard.observed import Event

__all__ = ["LinkWatch"]

# A machine that is shared with others stops a process for a fraction of a second now and then, TCP sends again after
# 0.2 s and then 0.4 s: what is longer is told.
STALL_S = 1.5
_STALL_TIMES = 10.0  # the usual time of an exchange

_EXCHANGES_A_PART = 3
_USUAL_PARTS = 12  # that tell what is usual
_LEAST_PARTS = 4
_SLOW_TIMES = 3.0  # the usual time of an exchange
_SLOW_SHARE = 0.25  # of a step: what is less costs less than a group that is slow
_SLOW_PARTS = 2  # in a row


class LinkWatch:
    """Takes the seconds of each exchange, and tells of a slow link once until it is as usual again."""

    def __init__(self) -> None:
        self._begin(frozenset())

    def _begin(self, groups: frozenset[str]) -> None:
        self._groups = groups
        self._usual: deque[float] = deque(maxlen=_USUAL_PARTS)
        self._filling: list[float] = []
        self._busy_s: deque[float] = deque(maxlen=_USUAL_PARTS * _EXCHANGES_A_PART)
        self._num_slow = 0

    def observe(self, step: int, exchange_s: float, busy_s: Mapping[str, float], own: str) -> Event | None:
        """One exchange among the groups that tell `busy_s`, their seconds since the one before; what is news of it.

        Whoever joins or leaves begins the watch anew.
        """
        if busy_s.keys() != self._groups:
            self._begin(frozenset(busy_s))
            return None  # groups that meet for the first time have not counted from the same moment
        latest = max(busy_s.values())
        link_s = max(0.0, exchange_s - (latest - busy_s[own]))
        self._busy_s.append(latest)
        usual_s = statistics.median(self._usual) if len(self._usual) >= _LEAST_PARTS else None
        if usual_s is not None and link_s > max(STALL_S, _STALL_TIMES * usual_s):
            return _stall(step, link_s, usual_s)
        self._filling.append(link_s)
        if len(self._filling) < _EXCHANGES_A_PART:
            return None
        part_s, self._filling = statistics.fmean(self._filling), []
        return self._take_part(step, part_s, usual_s)

    def _take_part(self, step: int, part_s: float, usual_s: float | None) -> Event | None:
        step_s = statistics.median(self._busy_s)
        if usual_s is None or part_s <= max(_SLOW_TIMES * usual_s, usual_s + _SLOW_SHARE * step_s):
            self._num_slow = 0
            self._usual.append(part_s)
            return None
        self._num_slow += 1
        return _slow(step, part_s, usual_s, step_s) if self._num_slow == _SLOW_PARTS else None


def _stall(step: int, link_s: float, usual_s: float) -> Event:
    told = f"an exchange took {link_s:.1f} s longer than computing explains, and usually takes {usual_s:.2f} s"
    return Event(step, "link-stall", told, "told, and going on; look at the network if it comes again")


def _slow(step: int, part_s: float, usual_s: float, step_s: float) -> Event:
    told = f"exchanges take {part_s:.2f} s instead of {usual_s:.2f} s, beside {step_s:.2f} s of computing"
    return Event(step, "slow-link", told, "told; look at the network, or train with [groups] mode = 'diloco'")
