"""Memory that grows with every step, and when it will be full. Pure policy but for `host_memory`, which reads it.

A warm-up is no leak: the first third of the readings does not count. Neither is a staircase: the rest is cut into equal
parts, and what memory surely grows by is what it grew by from part to part in nearly all of them. It is looked at each
time that the number of steps has doubled, for whoever looks all the time sees by chance what is not there.
"""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from crosschip.train.guard.observed import Event

__all__ = ["MemoryGrowth", "MemoryWatch", "host_memory"]

NUM_PARTS = 13
NUM_READINGS = 288
# Of 12 growths drawn around their median, fewer than 2 lie below it with a chance of 0.3 %: the second smallest is the
# lower bound of the median at that level.
_SURE = 1
_GIB = 1 << 30


@dataclass(frozen=True)
class MemoryGrowth:
    """`lower` is what memory surely grows by, in bytes a step; `steps_until_full` at that rate, None if unknown."""

    bytes_per_step: float
    lower: float
    steps_until_full: float | None

    def event(self, step: int, memory: str) -> Event:
        """The line about it; `memory` says which, for example `host memory of rank 0`."""
        told = f"{memory} grows by {self.bytes_per_step / 1024:.1f} KiB a step (surely by {self.lower / 1024:.1f})"
        full = "" if self.steps_until_full is None else f" and is full after {self.steps_until_full:.0f} more steps"
        return Event(step, "memory-growth", told + full, "told; save and restart before it is full")


class MemoryWatch:
    """Readings of one kind of memory over a stage. It alarms when memory would be full before the last step.

    `limit_gib_h` is the growth in GiB an hour that alarms in any case. An alarm is told again when the steps that are
    left until memory is full have halved.
    """

    def __init__(self, limit_gib_h: float) -> None:
        self._limit_gib_h = limit_gib_h
        self._readings: list[tuple[int, int]] = []
        self._every = 1
        self._told_at: float | None = None

    def observe(self, step: int, used: int, left: int | None, steps_left: int, step_s: float) -> MemoryGrowth | None:
        """Take a reading in bytes; returns a growth that is news. `step_s` is the usual time of a step."""
        while self._readings and self._readings[-1][0] >= step:
            self._readings.pop()  # training has gone back, and the step comes again
        if step % self._every:
            return None
        self._readings.append((step, used))
        if len(self._readings) < NUM_READINGS:
            return None
        growth = self._growth(left)
        self._every *= 2  # half as many readings, twice as far apart
        self._readings = [each for each in self._readings if each[0] % self._every == 0]
        if growth.lower <= 0.0:
            return None
        will_be_full = growth.steps_until_full is not None and growth.steps_until_full < steps_left
        if not will_be_full and growth.lower * 3600.0 / max(step_s, 1e-9) < self._limit_gib_h * _GIB:
            return None
        return growth if self._is_news(growth.steps_until_full or float(steps_left)) else None

    def _growth(self, left: int | None) -> MemoryGrowth:
        first, num = len(self._readings) // 3, len(self._readings)
        borders = [first + (num - first) * part // NUM_PARTS for part in range(NUM_PARTS + 1)]
        middles = []
        for begin, end in pairwise(borders):
            steps, sizes = zip(*self._readings[begin:end], strict=True)
            middles.append((statistics.fmean(steps), statistics.median(sizes)))
        slopes = sorted((end[1] - begin[1]) / (end[0] - begin[0]) for begin, end in pairwise(middles))
        lower = slopes[_SURE]
        full = left / lower if left is not None and lower > 0.0 else None
        return MemoryGrowth(statistics.median(slopes), lower, full)

    def _is_news(self, steps_until_full: float) -> bool:
        if self._told_at is not None and steps_until_full > self._told_at / 2:
            return False
        self._told_at = steps_until_full
        return True


def host_memory() -> int | None:
    """Bytes of this process's own host memory; pages of mapped files, such as token stores, do not count."""
    try:
        _, resident, shared, *_ = Path("/proc/self/statm").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
