"""Ranks that do the same work at the same time: is one slower than the others? Pure policy: no torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from crosschip.qualify.judging.median_bounds import MedianBounds, median_bounds

__all__ = ["STRAGGLER_LIMIT", "Straggler", "find_straggler"]

# BLOOM's chronicles tell of one slow node that cost 6 %; a rank that is a tenth slower holds up all others by as much.
STRAGGLER_LIMIT = 1.1
_NUM_PARTS = 12


@dataclass(frozen=True)
class Straggler:
    """The slowest rank and its time over that of the other ranks' median, with bounds."""

    rank: int
    slowness: MedianBounds

    @property
    def is_beyond_limit(self) -> bool:
        """Whether it was slower than the limit in nearly all parts of the time: no passing burden explains that."""
        return self.slowness.lower > STRAGGLER_LIMIT


def find_straggler(rounds_s: Sequence[Sequence[float]]) -> Straggler | None:
    """The slowest rank, from each rank's times of the same rounds; None with fewer than two ranks or too few rounds.

    The rounds that all have made are cut into parts; in each part a rank's median stands against that of the others.
    """
    num_rounds = min((len(each) for each in rounds_s), default=0)
    num_parts = min(_NUM_PARTS, num_rounds)
    if len(rounds_s) < 2 or num_parts == 0:
        return None
    borders = [round(num_rounds * part / num_parts) for part in range(num_parts + 1)]
    spans = [slice(*borders[part : part + 2]) for part in range(num_parts)]
    medians = [[statistics.median(list(times)[span]) for span in spans] for times in rounds_s]
    found = []
    for rank, mine in enumerate(medians):
        others = [[each[part] for other, each in enumerate(medians) if other != rank] for part in range(num_parts)]
        bounds = median_bounds([one / statistics.median(rest) for one, rest in zip(mine, others, strict=True)])
        if bounds is None:
            return None
        found.append(Straggler(rank, bounds))
    return max(found, key=lambda each: each.slowness.median)
