"""Performance cliffs: calls that take far longer on a chip than their share on the reference would allow. No torch.

A chip takes some proportion of the reference's time for a call's work, and some time for any call at all. The
proportion that is typical of the chip is measured on the subject's own operators; a call beyond 20 times what both
together let expect is a cliff. An operator that silently runs on the host looks like this.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["CLIFF_FACTOR", "CallTime", "launches_of", "slowness", "typical_proportion"]

CLIFF_FACTOR = 20.0

# Fewer calls than this with work worth measuring say nothing of what is typical: the chip is then expected to be no
# slower than the reference.
_FEWEST_CALLS = 5


@dataclass(frozen=True)
class CallTime:
    """One traced call's time in seconds on the chip and on the reference, and how many tensors it has."""

    call_id: str
    operator: str
    chip_s: float
    reference_s: float
    num_tensors: int


def launches_of(num_tensors: int) -> float:
    """How many trivial calls' time a call may need before it works: a chip may take lists of tensors one by one."""
    return max(1.0, num_tensors / 4)


def typical_proportion(times: Sequence[CallTime], launch_s: float) -> float:
    """The median over operators of the chip's time, less its launch, in proportion to the reference's.

    Only calls on which the reference works for longer than a launch on the chip count: the others measure the launch.
    An operator counts once, with the median of its calls: one that is slow and makes most calls is not typical.
    """
    proportions: dict[str, list[float]] = {}
    for each in times:
        if each.reference_s > launch_s:
            working_s = max(0.0, each.chip_s - launch_s * launches_of(each.num_tensors))
            proportions.setdefault(each.operator, []).append(working_s / each.reference_s)
    if sum(map(len, proportions.values())) < _FEWEST_CALLS:
        return 1.0
    return statistics.median(statistics.median(found) for found in proportions.values())


def slowness(each: CallTime, typical: float, launch_s: float) -> float:
    """How many times longer than expected a call takes; a cliff from `CLIFF_FACTOR`."""
    return each.chip_s / (typical * each.reference_s + launch_s * launches_of(each.num_tensors))
