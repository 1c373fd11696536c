"""Detectors over the numbers of each step: not finite, zero, stuck, spiking. Pure policy, no torch.

Each has `look`, which changes nothing (a step may be replayed), and `accept`, which takes a believed step into account.
"""

from __future__ import annotations

import math
from collections import deque
from itertools import pairwise

from crosschip.train.guard.observed import Kind, StepNumbers, Suspicion, is_same

__all__ = ["SpikeWatch", "StuckLossWatch", "suspect_at_once"]

STUCK_AFTER = 5  # two fp32 losses of different batches agree to the last bit about once in 10^5 steps, five never
WINDOW = 128  # steps whose spread counts
RECENT = 48  # steps whose median is the level: a fall over a longer time would hide a spike
LEAST_WINDOW = 32

# Added before the logarithm is taken, to nats of loss and to gradient norms of about one: close to zero a loss may well
# be ten times the last one, and nothing has happened.
_OFFSET = 0.1

# To standard deviations of a normal distribution: medians and 95th percentiles of absolute values, and a distance to
# the 95th percentile. The largest of them counts, as upper tails are heavy.
_MEDIAN_TO_SIGMA = 1.4826
_ABSOLUTE_Q95_TO_SIGMA = 1.0 / 1.96
_Q95_TO_SIGMA = 1.0 / 1.645
_DIFFERENCE_TO_SIGMA = 2.0**-0.5
_LEAST_SIGMA = 1e-3  # below it a loss repeats itself, and its noise says nothing


def suspect_at_once(numbers: StepNumbers) -> Suspicion | None:
    """What one step alone shows: numbers that are not finite, a loss or gradients of exactly zero."""
    if not all(map(math.isfinite, numbers.compared)):
        return Suspicion("non-finite", f"loss {numbers.loss:.6g}, gradient norm {numbers.gradient_norm:.6g}")
    if numbers.loss == 0.0:
        return Suspicion("zero-loss", f"the loss is exactly 0.0, gradient norm {numbers.gradient_norm:.6g}")
    if numbers.gradient_norm == 0.0:
        return Suspicion("zero-gradient", f"every gradient is exactly zero at loss {numbers.loss:.6g}")
    return None


class StuckLossWatch:
    """A loss that is the same to the last bit in several steps, each with another batch."""

    def __init__(self) -> None:
        self._last = math.nan
        self._num_same = 0

    def look(self, loss: float) -> Suspicion | None:
        """Whether `loss` would be the last of `STUCK_AFTER` equal ones."""
        if is_same(loss, self._last) and self._num_same + 1 >= STUCK_AFTER:
            return Suspicion("stuck-loss", f"the loss is {loss!r}, to the last bit, for {self._num_same + 1} steps")
        return None

    def accept(self, loss: float) -> None:
        """Count it."""
        self._num_same = self._num_same + 1 if is_same(loss, self._last) else 1
        self._last = loss


class SpikeWatch:
    """A positive number that jumps up, measured on its logarithm against the last steps' median and spread.

    Only a rise counts, so the fall at a training's beginning is none; and a slow drift carries the level with it, and
    makes its spread as large as its distance. `least_ratio` is the smallest factor over the level that counts, however
    quiet the last steps were.
    """

    def __init__(self, kind: Kind, name: str, limit_z: float, least_ratio: float) -> None:
        self._kind: Kind = kind
        self._name = name
        self._limit_z = limit_z
        self._least_rise = math.log(least_ratio)
        self._logs: deque[float] = deque(maxlen=WINDOW)

    def look(self, value: float) -> Suspicion | None:
        """Whether `value` is far above the last steps; None while they are few, or below zero."""
        if len(self._logs) < LEAST_WINDOW or value <= 0.0:
            return None
        level, sigma = _level(list(self._logs))
        rise = math.log(value + _OFFSET) - level
        if rise < self._least_rise or rise < self._limit_z * sigma:
            return None
        return Suspicion(
            self._kind,
            f"{self._name} {value:.4g} stands {rise / sigma:.0f} deviations above the last steps' median "
            f"{math.exp(level) - _OFFSET:.4g} (limit {self._limit_z:g})",
        )

    def accept(self, value: float) -> None:
        """Put it into the window."""
        if value > 0.0:
            self._logs.append(math.log(value + _OFFSET))


def _level(logs: list[float]) -> tuple[float, float]:
    """The median of the recent ones, and the spread. That of differences between neighbours knows no trend."""
    recent = sorted(logs[-RECENT:])
    level = recent[len(recent) // 2]
    deviations = sorted(abs(each - level) for each in recent)
    differences = sorted(abs(later - earlier) for earlier, later in pairwise(logs))
    sigma = max(
        _MEDIAN_TO_SIGMA * deviations[len(deviations) // 2],
        _Q95_TO_SIGMA * (_q95(recent) - level),
        _MEDIAN_TO_SIGMA * _DIFFERENCE_TO_SIGMA * differences[len(differences) // 2],
        _ABSOLUTE_Q95_TO_SIGMA * _DIFFERENCE_TO_SIGMA * _q95(differences),
        _LEAST_SIGMA,
    )
    return level, sigma


def _q95(ordered: list[float]) -> float:
    return ordered[int(0.95 * (len(ordered) - 1))]
