"""Seconds in which a link's bandwidth fell, from a sustained run. Pure policy: no torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["FLAP_FRACTION", "Flap", "Second", "Sustained", "judge_sustained"]

FLAP_FRACTION = 0.25  # of the median: less for whole seconds is no neighbour's traffic but a link that went down
_LEAST_SECONDS = 5
_LEAST_FOR_S = 2.0  # one second may be cut by its borders, or hold one pause of the host
_LEAST_HOST_WAIT = 0.2  # of a rank's time spent ready to run and not running


@dataclass(frozen=True)
class Second:
    """One second of the run, or as long as a message took that did not end within it.

    `host_wait` is the largest share of it that a rank waited for a core.
    """

    at_s: float
    bandwidth_gb_s: float
    host_wait: float = 0.0
    passed_s: float = 1.0


@dataclass(frozen=True)
class Flap:
    """Consecutive seconds of low bandwidth. `is_hosts` says that ranks waited for cores meanwhile."""

    at_s: float
    for_s: int
    bandwidth_gb_s: float  # mean
    is_hosts: bool


@dataclass(frozen=True)
class Sustained:
    """What a sustained run shows: the median of its seconds, below what a second counts as a fall, and the falls."""

    num_seconds: int
    median_gb_s: float
    lowest_gb_s: float
    flap_below_gb_s: float
    flaps: list[Flap]


def judge_sustained(seconds: Sequence[Second]) -> Sustained | None:
    """The run's median and its flaps; None when it is too short to tell.

    The first second warms up and does not count.
    """
    kept = seconds[1:]
    if len(kept) < _LEAST_SECONDS:
        return None
    # The upper half's median: a link that is down for half of the time must not set the standard.
    ordered = sorted(each.bandwidth_gb_s for each in kept)
    median = statistics.median(ordered)
    flap_below = FLAP_FRACTION * statistics.median(ordered[len(ordered) // 2 :])
    runs: list[list[Second]] = [[]]
    for each in kept:
        if each.bandwidth_gb_s < flap_below:
            runs[-1].append(each)
        elif runs[-1]:
            runs.append([])
    usual_wait = statistics.median(each.host_wait for each in kept)
    flaps = [_flap(run, usual_wait) for run in runs if sum(each.passed_s for each in run) >= _LEAST_FOR_S]
    return Sustained(len(kept), median, ordered[0], flap_below, flaps)


def _flap(run: Sequence[Second], usual_wait: float) -> Flap:
    """Ranks that wait for a link sleep, those that wait for a core do so more than usual."""
    for_s = [each.passed_s for each in run]
    mean = statistics.fmean((each.bandwidth_gb_s for each in run), for_s)
    waits = statistics.fmean((each.host_wait for each in run), for_s)
    return Flap(run[0].at_s, round(sum(for_s)), mean, waits >= max(_LEAST_HOST_WAIT, usual_wait))
