"""One rank or group that is slower than the others, from the time each needs for its own work. Pure, no torch.

Times have to be those of computing, without waiting: at a collective all wait for the slowest, and the whole step's
time is the same for everybody.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from crosschip.train.guard.observed import Event

__all__ = ["STRAGGLER_LIMIT", "Straggler", "StragglerWatch"]

# BLOOM's chronicles tell of one slow node that cost 6 %; a tenth is beyond what a passing burden explains.
STRAGGLER_LIMIT = 1.1
NUM_PARTS = 12
# A part has so many steps, and seconds, unless one is far slower: else what passes within a minute is worth no line.
# (Two groups of 0.27 s a step on two cores of a virtual machine: one was 1.32 times slower for 16 s in half an hour,
# with a core all the time.)
STEPS_A_PART, PART_S, _FAR = 5, 5.0, 2.0
# By chance a rank is the slower one in a part as often as not: in 10 or more of 12 parts with a chance of 1.9 %, and
# slower by more than the limit far more seldom.
_PARTS_NEEDED = 10


@dataclass(frozen=True)
class Straggler:
    """`slowness` is the median over the parts of its time over the median of the others' times.

    `of_it_waited` is the share of its time in which it was ready to compute and had no core. `is_busy`: without that
    time it is no straggler.
    """

    name: str
    slowness: float
    num_steps: int
    of_it_waited: float = 0.0
    is_busy: bool = False

    def event(self, step: int) -> Event:
        """The line about it."""
        told = f"{self.name} has computed {self.slowness:.2f} times as long as the others over {self.num_steps} steps"
        if self.is_busy:
            waited = f"{self.of_it_waited:.0%} of it waiting for a core, and all wait for it"
            return Event(step, "busy-machine", f"{told}, {waited}", "told; see what else computes on its machine")
        return Event(step, "straggler", f"{told}, and all wait for it", "told; examine or replace that chip or node")


class StragglerWatch:
    """Keeps the times of the last 60 steps, or of a minute if these take less and nobody takes twice the others' time.

    A straggler is told once, until another one or none is found.
    """

    def __init__(self) -> None:
        self._parts: deque[_Part] = deque(maxlen=NUM_PARTS)
        self._filling: dict[str, list[_Times]] = {}
        self._told: tuple[str, bool] | None = None

    def observe(self, compute_s: Mapping[str, float], waited_s: Mapping[str, float] | None = None) -> Straggler | None:
        """Take the seconds of one step, by rank or group; returns a straggler that is news.

        `waited_s` are those of them in which it waited for a core. Whoever joins or leaves begins the watch anew, for
        its parts are not comparable with those before.
        """
        if compute_s.keys() != self._filling.keys():
            self._parts.clear()
            self._filling = {name: [] for name in compute_s}
        for name, seconds in compute_s.items():
            waited = 0.0 if waited_s is None else waited_s[name]
            self._filling[name].append(_Times(seconds, max(0.0, seconds - waited)))
        num_steps = min(map(len, self._filling.values()), default=0)
        if num_steps < STEPS_A_PART or not self._is_long_enough():
            return None
        self._parts.append(_Part(num_steps, {name: _Times.median(times) for name, times in self._filling.items()}))
        self._filling = {name: [] for name in compute_s}
        return self._news()

    def _is_long_enough(self) -> bool:
        """Whether the part that is being filled has its seconds, or one rank or group is far slower in it."""
        *others, slowest = sorted(sum(each.whole_s for each in times) for times in self._filling.values())
        return slowest >= PART_S or (bool(others) and slowest > _FAR * statistics.median(others))

    def _news(self) -> Straggler | None:
        if len(self._parts) < NUM_PARTS or len(self._filling) < 2:
            return None
        name = max(self._filling, key=lambda each: statistics.median(self._ratios(each)))
        ratios = self._ratios(name)
        is_one, is_busy = _is_beyond(ratios), not _is_beyond(self._ratios(name, "on_core_s"))
        told, self._told = self._told, (name, is_busy) if is_one else None
        if not is_one or told == self._told:
            return None
        own = [part.times[name] for part in self._parts]
        waited = statistics.median(1.0 - each.on_core_s / max(1e-9, each.whole_s) for each in own)
        num_steps = sum(part.num_steps for part in self._parts)
        return Straggler(name, statistics.median(ratios), num_steps, waited, is_busy)

    def _ratios(self, name: str, which: Literal["whole_s", "on_core_s"] = "whole_s") -> list[float]:
        times = [{each: getattr(part.times[each], which) for each in part.times} for part in self._parts]
        own = [part.pop(name) for part in times]
        others = [list(part.values()) for part in times]
        return [one / max(1e-9, statistics.median(seconds)) for one, seconds in zip(own, others, strict=True)]


class _Times(NamedTuple):
    """Seconds of computing, and those of them with a core."""

    whole_s: float
    on_core_s: float

    @staticmethod
    def median(times: Sequence[_Times]) -> _Times:
        return _Times(*(statistics.median(each) for each in zip(*times, strict=True)))


class _Part(NamedTuple):
    """Some steps, and the median time of each rank or group in them."""

    num_steps: int
    times: dict[str, _Times]


def _is_beyond(ratios: Sequence[float]) -> bool:
    return sum(ratio > STRAGGLER_LIMIT for ratio in ratios) >= _PARTS_NEEDED
