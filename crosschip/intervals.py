"""Intervals of shares that were counted and of means over problems, for whoever reports a score."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["bootstrap_mean", "wilson_interval"]

NUM_RESAMPLES = 10_000

_Z_95 = 1.959963984540054  # two-sided 95 % point of the normal distribution


def wilson_interval(num_right: int, num_asked: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927), which stays within [0, 1] and is sound near both ends."""
    if num_asked == 0:
        return 0.0, 1.0
    share, z2 = num_right / num_asked, _Z_95**2
    centre = (share + z2 / (2 * num_asked)) / (1 + z2 / num_asked)
    half = _Z_95 * math.sqrt(share * (1 - share) / num_asked + z2 / (4 * num_asked**2)) / (1 + z2 / num_asked)
    # min and max with the share itself: rounding must not push it out of its own interval
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


def bootstrap_mean(values: npt.ArrayLike, seed: int, num_resamples: int = NUM_RESAMPLES) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean of one number a problem, problems drawn with replacement.

    How often each *distinct* value is drawn is multinomial, so the resamples are one matrix product and their memory
    goes with the distinct values, of which a pass@k has few. Where all values are the same the interval is a point.
    """
    import numpy as np  # here: whoever draws a page needs the other interval alone

    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    num = int(counts.sum())
    assert num > 0, "there is no mean of nothing"
    if len(distinct) == 1:
        return float(distinct[0]), float(distinct[0])
    drawn = np.random.default_rng(seed).multinomial(num, counts / num, size=num_resamples)
    low, high = np.percentile(drawn @ distinct / num, (2.5, 97.5))
    return float(low), float(high)
