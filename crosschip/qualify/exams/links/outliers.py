"""Which pairs of ranks are slower than the others. Pure policy: no torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["OUTLIER_RATIO", "Outlier", "find_outliers"]

OUTLIER_RATIO = 1.5  # a link at half its width, the mildest common fault of a cable, takes twice as long
_LEAST_PAIRS = 3  # with two nobody can say which is the odd one
_MOST_SHARE = 0.25  # more slow pairs than that are a class of links, not bad cables

Pair = tuple[int, int]


@dataclass(frozen=True)
class Outlier:
    """A pair whose largest message takes `ratio` times as long as the median pair's.

    `is_alone` tells a bad cable from a kind of link: few pairs are slow, or all slow ones share one rank.
    """

    pair: Pair
    time_s: float
    typical_s: float
    is_alone: bool
    shared_rank: int | None = None  # which all slow pairs share when there are several

    @property
    def ratio(self) -> float:
        """How much slower it is."""
        return self.time_s / self.typical_s


def find_outliers(times_s: Mapping[Pair, float], ratio: float = OUTLIER_RATIO) -> list[Outlier]:
    """The pairs that take more than `ratio` times as long as the median pair, the slowest first."""
    if len(times_s) < _LEAST_PAIRS:
        return []
    typical_s = statistics.median(times_s.values())
    slow = {pair: time for pair, time in times_s.items() if time > ratio * typical_s}
    shared = _shared_rank(list(slow)) if len(slow) > 1 else None
    is_alone = shared is not None or len(slow) <= max(1.0, _MOST_SHARE * len(times_s))
    found = [Outlier(pair, time, typical_s, is_alone, shared) for pair, time in slow.items()]
    return sorted(found, key=lambda each: -each.time_s)


def _shared_rank(pairs: list[Pair]) -> int | None:
    common = set(pairs[0]).intersection(*pairs[1:])
    return common.pop() if common else None
