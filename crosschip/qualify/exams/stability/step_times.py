"""Step times of a soak: median, tail, jitter and drift, beside those of the host. Pure policy: no torch.

Other work on the machine makes steps late, so nothing here is more than a limit; and a fixed piece of the host's work,
timed after each step, says whether the host itself was late.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from crosschip.qualify.judging.median_bounds import MedianBounds, median_bounds

__all__ = [
    "DRIFT_LIMIT",
    "LEAST_FOR_P99",
    "TAIL_LIMIT",
    "StepTimes",
    "drift_is_the_chips",
    "step_times",
    "tail_is_high",
]

DRIFT_LIMIT = 1.1  # a step a tenth longer in the second half than in the first: a day in ten
TAIL_LIMIT = 3.0  # p99 over p50: one step in a hundred thrice as long costs 2 %, and all ranks wait for it
LEAST_FOR_P99 = 100
_MOST_PARTS = 24
_LEAST_PER_PART = 2
_WARM_UP = 0.1


@dataclass(frozen=True)
class StepTimes:
    """Times in seconds after the warm-up. `drift` is the factor from the first half to the second, with its bounds.

    `jitter` is the distance between the quartiles over the median; `p99_s` is None with fewer than 100 steps.
    """

    num: int
    p50_s: float
    max_s: float
    jitter: float
    p99_s: float | None
    drift: MedianBounds | None

    @property
    def tail(self) -> float | None:
        """p99 over p50."""
        return None if self.p99_s is None or self.p50_s <= 0.0 else self.p99_s / self.p50_s


def step_times(times_s: Sequence[float]) -> StepTimes | None:
    """What the times say; None when there are fewer than four. The first tenth counts as warm-up.

    The drift is that of Cox and Stuart (1955): up to 24 parts, each of the first half against its counterpart in the
    second; it sees slow growth, and a jump about the middle.
    """
    kept = list(times_s)[math.ceil(len(times_s) * _WARM_UP) :]
    if len(kept) < 4:
        return None
    low, middle, high = statistics.quantiles(kept, n=4)
    p99_s = statistics.quantiles(kept, n=100)[98] if len(kept) >= LEAST_FOR_P99 else None
    return StepTimes(len(kept), middle, max(kept), (high - low) / middle if middle else 0.0, p99_s, _drift(kept))


def _drift(kept: list[float]) -> MedianBounds | None:
    half = min(_MOST_PARTS, len(kept) // _LEAST_PER_PART) // 2
    if half == 0:
        return None
    size = len(kept) / (2 * half)
    parts = [kept[round(part * size) : round((part + 1) * size)] for part in range(2 * half)]
    # Means, since work that is put aside now and then is late in the mean only; without the latest step of each part.
    means = [statistics.fmean(sorted(part)[:-1]) for part in parts]
    if min(means[:half]) <= 0.0:
        return None
    return median_bounds([means[place + half] / means[place] for place in range(half)])


def drift_is_the_chips(steps: StepTimes, host: StepTimes | None) -> bool:
    """Whether steps became longer beyond the limit and beyond whatever happened to the host's own work."""
    if steps.drift is None or steps.drift.lower <= DRIFT_LIMIT:
        return False
    return host is None or host.drift is None or steps.drift.lower > DRIFT_LIMIT * max(1.0, host.drift.upper)


def tail_is_high(steps: StepTimes, host: StepTimes | None) -> bool:
    """Whether p99 is beyond the limit, and the host's own work has no such tail."""
    if steps.tail is None or steps.tail <= TAIL_LIMIT:
        return False
    return host is None or host.tail is None or steps.tail > TAIL_LIMIT * max(1.0, host.tail)
