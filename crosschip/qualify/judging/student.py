"""Student's t distribution, by scipy's special functions (the module `scipy.stats` takes a second to import)."""

from __future__ import annotations

import math

from scipy.special import stdtr, stdtrit

__all__ = ["student_tail", "student_threshold"]


def student_tail(t: float, freedom: int) -> float:
    """The chance of a value above `t`, which may be infinite."""
    if math.isinf(t):
        return 0.0 if t > 0 else 1.0
    return float(stdtr(freedom, -t))


def student_threshold(level: float, freedom: int) -> float:
    """The value that is exceeded with the chance `level`."""
    return -float(stdtrit(freedom, level))
