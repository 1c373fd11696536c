"""How many hosts must stand by so that a job hardly ever waits for one."""

from __future__ import annotations

import math

from scipy.stats import poisson

from crosschip.plan.failures.problem import PlanError, at_least, is_share

__all__ = ["share_waiting", "spares_needed"]


def spares_needed(swaps_per_day: float, repair_days: float, share_waited: float = 0.01) -> int:
    """Spare hosts so that at most `share_waited` of the swaps find none.

    Hosts in repair are a Poisson number of mean swaps x repair time (the queue M/G/infinity), whatever the repair
    times' distribution.

    Raises:
        PlanError: a rate or time below 0, or a share that is not in (0, 1).
    """
    at_least("swaps_per_day", swaps_per_day, 0.0)
    at_least("repair_days", repair_days, 0.0)
    if not 0.0 < share_waited < 1.0:
        raise PlanError(f"a share of {share_waited} of the swaps shall wait", "give a share between 0 and 1")
    mean = swaps_per_day * repair_days
    return 0 if mean == 0 else math.ceil(float(poisson.isf(share_waited, mean))) + 1


def share_waiting(num_spares: int, swaps_per_day: float, repair_days: float) -> float:
    """The share of swaps that find no spare: so many hosts are in repair already."""
    at_least("num_spares", num_spares, 0)
    share = float(poisson.sf(num_spares - 1, swaps_per_day * repair_days))
    is_share("the share of swaps that wait", share)
    return share
