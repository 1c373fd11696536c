"""Does memory grow with work? A robust slope with its bounds, and what it means for the memory that is left. No torch.

A warm-up is no leak: the first third of the soak does not count. Neither is a staircase: the rest is cut into equal
parts, and the slope's lower bound is what memory grew by in nearly all of them. Allocators, arenas and caches grow by a
few jumps or ever more slowly; a leak per call grows in each part alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from crosschip.qualify.finding import Verdict
from crosschip.qualify.judging.median_bounds import median_bounds

__all__ = ["LEAST_GROWTH_BYTES", "LEAST_READINGS", "PLANNED_RUN_HOURS", "MemorySlope", "memory_slope", "memory_verdict"]

PLANNED_RUN_HOURS = 720.0  # a month, as a pre-training run takes
# What must have been gained at least, at the lower bound, before it counts: 64 pages of 4 KiB. Lists, logs and the
# interpreter's own caches move by less.
LEAST_GROWTH_BYTES = 256 << 10
LEAST_READINGS = 8  # of which five growths are left after the warm-up
_WARM_UP = 1 / 3
_MOST_PARTS = 12
_HOUR_S = 3600.0


@dataclass(frozen=True)
class MemorySlope:
    """Bytes per hour over the time after the warm-up; each bound holds with a confidence of 95 %."""

    bytes_per_hour: float
    lower: float
    upper: float
    num_parts: int
    span_s: float

    @property
    def least_seen(self) -> float:
        """Bytes per hour below which this soak is too short to call growth a leak."""
        return LEAST_GROWTH_BYTES / self.span_s * _HOUR_S


def memory_slope(times_s: Sequence[float], sizes: Sequence[float]) -> MemorySlope | None:
    """The slope of sizes in bytes that were read after equal rounds of work; None when they are too few.

    The warm-up is the first third of the readings.
    """
    first = int(len(sizes) * _WARM_UP)
    num_parts = min(_MOST_PARTS, len(sizes) - first - 1)
    if num_parts < 1:
        return None
    last = len(sizes) - 1
    borders = [first + round((last - first) * part / num_parts) for part in range(num_parts + 1)]
    slopes = [
        (sizes[end] - sizes[begin]) / (times_s[end] - times_s[begin]) * _HOUR_S
        for begin, end in pairwise(borders)
        if times_s[end] > times_s[begin]
    ]
    found = median_bounds(slopes)
    if found is None:
        return None
    return MemorySlope(found.median, found.lower, found.upper, found.num, times_s[last] - times_s[first])


def memory_verdict(slope: MemorySlope, left_bytes: float | None) -> tuple[Verdict, float | None]:
    """The verdict and the hours until the memory is full, at the lower bound; None when it does not grow.

    FAIL when it would be full within a month's run, or when nobody can tell how much is left; slower growth is a limit.
    """
    if slope.lower <= slope.least_seen:
        return "PASS", None
    if left_bytes is None:
        return "FAIL", None
    hours = left_bytes / slope.lower
    return ("FAIL" if hours < PLANNED_RUN_HOURS else "PASS WITH LIMITS"), hours
