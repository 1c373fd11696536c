"""Intervals of shares that were counted, for whoever reports a score."""

from __future__ import annotations

import math

__all__ = ["wilson_interval"]

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
