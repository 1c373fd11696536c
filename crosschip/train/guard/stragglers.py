"""One rank or group that is slower than the others, from the time each needs for its own work. Pure, no torch.

Times have to be those of computing, without waiting: at a collective all wait for the slowest, and the whole step's
time is the same for everybody.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from crosschip.train.guard.observed import Event

__all__ = ["STRAGGLER_LIMIT", "Straggler", "StragglerWatch"]

# BLOOM's chronicles tell of one slow node that cost 6 %; a tenth is beyond what a passing burden explains.
STRAGGLER_LIMIT = 1.1
NUM_PARTS = 12
STEPS_A_PART = 5
# By chance a rank is the slower one in a part as often as not: in 10 or more of 12 parts with a chance of 1.9 %, and
# slower by more than the limit far more seldom.
_PARTS_NEEDED = 10


@dataclass(frozen=True)
class Straggler:
    """`slowness` is the median over the parts of its time over the median of the others' times."""

    name: str
    slowness: float
    num_steps: int

    def event(self, step: int) -> Event:
        """The line about it."""
        told = f"{self.name} has computed {self.slowness:.2f} times as long as the others over {self.num_steps} steps"
        return Event(step, "straggler", f"{told}, and all wait for it", "told; examine or replace that chip or node")


class StragglerWatch:
    """Keeps the times of the last 60 steps, and tells of a straggler once until another one or none is found."""

    def __init__(self) -> None:
        self._parts: deque[dict[str, float]] = deque(maxlen=NUM_PARTS)
        self._filling: dict[str, list[float]] = {}
        self._told: str | None = None

    def observe(self, compute_s: Mapping[str, float]) -> Straggler | None:
        """Take the seconds of one step, by rank or group; returns a straggler that is news.

        Whoever joins or leaves begins the watch anew, for its parts are not comparable with those before.
        """
        if compute_s.keys() != self._filling.keys():
            self._parts.clear()
            self._filling = {name: [] for name in compute_s}
        for name, seconds in compute_s.items():
            self._filling[name].append(seconds)
        if min(map(len, self._filling.values()), default=0) < STEPS_A_PART:
            return None
        self._parts.append({name: statistics.median(times) for name, times in self._filling.items()})
        self._filling = {name: [] for name in compute_s}
        return self._news()

    def _news(self) -> Straggler | None:
        if len(self._parts) < NUM_PARTS or len(self._filling) < 2:
            return None
        found = max((self._slowness(name) for name in self._filling), key=lambda each: each.slowness)
        ratios = self._ratios(found.name)
        is_one = sum(ratio > STRAGGLER_LIMIT for ratio in ratios) >= _PARTS_NEEDED
        told, self._told = self._told, found.name if is_one else None
        return found if is_one and told != found.name else None

    def _slowness(self, name: str) -> Straggler:
        return Straggler(name, statistics.median(self._ratios(name)), NUM_PARTS * STEPS_A_PART)

    def _ratios(self, name: str) -> list[float]:
        return [
            part[name] / max(1e-9, statistics.median(seconds for other, seconds in part.items() if other != name))
            for part in self._parts
        ]
