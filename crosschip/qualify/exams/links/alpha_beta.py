"""Latency and bandwidth from the times of messages: t = latency + bytes / bandwidth. Pure: no torch.

The model is Hockney's (1994). Each size counts by its relative error, since a message of a kilobyte and one of ten
megabytes are measured equally well in percent. The intervals come from resampling the repeats of each size.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["AlphaBeta", "fit_alpha_beta"]

_NUM_RESAMPLES = 400
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class AlphaBeta:
    """A fitted link, with the bounds of 95 % intervals.

    `worst_misfit` is the largest relative distance of a size's median time from the fit: where it is large, one latency
    and one bandwidth do not describe the link.
    """

    latency_s: float
    latency_low_s: float
    latency_high_s: float
    bandwidth_gb_s: float
    bandwidth_low_gb_s: float
    bandwidth_high_gb_s: float
    worst_misfit: float

    def document(self) -> dict[str, Any]:
        """The fit for JSON."""
        return asdict(self)


def fit_alpha_beta(times_s: Mapping[int, Sequence[float]], seed: int = 0) -> AlphaBeta | None:
    """Fit the times of the repeats of each size in bytes; None with fewer than two sizes or without a slope."""
    if len(times_s) < 2 or any(not times for times in times_s.values()):
        return None
    medians = {size: statistics.median(times) for size, times in times_s.items()}
    fitted = _fit(medians)
    if fitted is None:
        return None
    latency_s, s_per_byte = fitted
    draw = random.Random(seed)
    again = [_fit(_resampled(times_s, draw)) for _ in range(_NUM_RESAMPLES)]
    latencies = sorted(each[0] for each in again if each is not None)
    slopes = sorted(each[1] for each in again if each is not None)
    low, high = _bounds(latencies, latency_s), _bounds(slopes, s_per_byte)
    misfit = max(abs(time / (latency_s + size * s_per_byte) - 1) for size, time in medians.items())
    return AlphaBeta(latency_s, low[0], low[1], 1e-9 / s_per_byte, 1e-9 / high[1], 1e-9 / high[0], worst_misfit=misfit)


def _resampled(times_s: Mapping[int, Sequence[float]], draw: random.Random) -> dict[int, float]:
    return {size: statistics.median(draw.choices(times, k=len(times))) for size, times in times_s.items()}


def _bounds(ordered: Sequence[float], middle: float) -> tuple[float, float]:
    """The interval, which holds the fit itself."""
    if not ordered:
        return middle, middle
    skipped = int(len(ordered) * (1 - _CONFIDENCE) / 2)
    return min(middle, ordered[skipped]), max(middle, ordered[-1 - skipped])


def _fit(medians: Mapping[int, float]) -> tuple[float, float] | None:
    """Weighted least squares of latency (not below 0) and seconds per byte; None where more bytes take no longer."""
    weights = {size: 1.0 / time**2 for size, time in medians.items() if time > 0.0}
    total = sum(weights.values())
    if len(weights) < 2:
        return None
    mean_size = sum(weight * size for size, weight in weights.items()) / total
    mean_time = sum(weight * medians[size] for size, weight in weights.items()) / total
    spread = sum(weight * (size - mean_size) ** 2 for size, weight in weights.items())
    joint = sum(weight * (size - mean_size) * (medians[size] - mean_time) for size, weight in weights.items())
    slope = joint / spread
    latency = mean_time - slope * mean_size
    if latency < 0.0:
        latency = 0.0
        slope = sum(weight * size * medians[size] for size, weight in weights.items()) / sum(
            weight * size**2 for size, weight in weights.items()
        )
    return (latency, slope) if slope > 0.0 else None
