"""Bounds of a median that hold whatever the distribution: by the sign test, from ordered values. No torch here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["CONFIDENCE", "MedianBounds", "median_bounds"]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class MedianBounds:
    """A median with its lower and its upper bound, each of which holds with a confidence of 95 %."""

    median: float
    lower: float
    upper: float
    num: int


def median_bounds(values: Sequence[float]) -> MedianBounds | None:
    """The median of what the values are drawn from; None below five values, which bound nothing at this confidence.

    With a chance of one half a value lies below the median, so the r-th smallest exceeds it with the chance that fewer
    than r of n fair coins show heads. A single jump, however high, moves neither bound.
    """
    num, rank = len(values), 0
    while _chance_of_fewer(num, rank + 1) <= 1.0 - CONFIDENCE:
        rank += 1
    if rank == 0:
        return None
    ordered = sorted(values)
    return MedianBounds(statistics.median(ordered), ordered[rank - 1], ordered[num - rank], num)


def _chance_of_fewer(num: int, heads: int) -> float:
    return sum(math.comb(num, each) for each in range(heads)) / 2.0**num if heads <= num else 1.0
