"""Series of readings, made short enough for a page and safe for JSON. No torch here."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["MOST_POINTS", "finite", "thinned"]

MOST_POINTS = 200


def finite(value: float | None, digits: int = 6) -> float | None:
    """The value rounded to some significant digits; None for what JSON has no word for."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")


def thinned(times_s: Sequence[float], values: Sequence[float]) -> list[list[float | None]]:
    """At most 200 points `[seconds, value]`: the series itself, or evenly spaced readings with the first and last."""
    num = len(values)
    if num <= MOST_POINTS:
        places = list(range(num))
    else:
        places = [round(place * (num - 1) / (MOST_POINTS - 1)) for place in range(MOST_POINTS)]
    return [[finite(times_s[place]), finite(values[place], 12)] for place in places]
