"""Confidence intervals of paired differences: of two shares, and of two lengths. No torch, no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, stats

from crosschip.paired.pairs import PairTable

__all__ = ["Interval", "LengthInterval", "bootstrap_lengths", "bootstrap_shares", "score_interval", "score_statistic"]

NUM_RESAMPLES = 4999
_EDGE = 1e-12


@dataclass(frozen=True)
class Interval:
    """Both ends and the level, as 0.9."""

    low: float
    high: float
    level: float

    def is_within(self, margin: float) -> bool:
        """Whether it lies between minus and plus the margin."""
        return -margin < self.low and self.high < margin


def score_interval(table: PairTable, level: float) -> Interval:
    """The interval of share B minus share A (Tango 1998), on as many pairs as the problems are worth.

    It has its coverage even where hardly a pair differs; there a bootstrap shrinks to a point.
    """
    if table.num_pairs == 0:
        return Interval(-1.0, 1.0, level)
    scale = 1 / table.design_effect
    gained, lost, num = table.only_b * scale, table.only_a * scale, table.num_effective
    z = float(stats.norm.ppf((1 + level) / 2))

    def low(theta: float) -> float:
        return float(score_statistic(gained, lost, num, theta)) - z

    def high(theta: float) -> float:
        return float(score_statistic(gained, lost, num, theta)) + z

    estimate = (gained - lost) / num
    ends = []
    for function, beyond in ((low, -1 + _EDGE), (high, 1 - _EDGE)):
        same_side = function(beyond) * function(estimate) > 0
        ends.append(beyond if same_side else float(optimize.brentq(function, beyond, estimate, xtol=1e-10)))
    return Interval(max(-1.0, ends[0]), min(1.0, ends[1]), level)


def score_statistic(gained: Any, lost: Any, num: float, theta: float) -> Any:
    """Tango's score statistic: how far the difference seen lies above `theta`, in its standard errors there.

    Takes numbers or arrays of `gained` and `lost` pairs, of `num` in all.
    """
    b = -gained - lost + (2 * num - gained + lost) * theta
    c = -lost * theta * (1 - theta)
    likely_lost = (np.sqrt(np.maximum(0.0, b * b - 8 * num * c)) - b) / (4 * num)
    variance = np.maximum(num * (2 * likely_lost + theta * (1 - theta)), _EDGE)
    return (gained - lost - num * theta) / np.sqrt(variance)


def bootstrap_shares(table: PairTable, level: float, seed: int) -> Interval:
    """The paired percentile bootstrap of share B minus share A, problems drawn with replacement."""
    if len(table.sizes) < 2 or not any(table.differences):
        return Interval(table.difference, table.difference, level)
    sums, sizes = np.array(table.differences, float), np.array(table.sizes, float)

    def difference(drawn: np.ndarray, of: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(drawn.sum(axis=axis) / of.sum(axis=axis))

    return _percentile((sums, sizes), difference, level, seed)


@dataclass(frozen=True)
class LengthInterval:
    """B minus A: the mean and the median of the problems' differences, with their bootstrap intervals."""

    mean_a: float
    mean_b: float
    difference: float
    interval: Interval
    median_difference: float
    median_interval: Interval
    p: float
    deviation: float  # of the problems' differences


def bootstrap_lengths(a: np.ndarray, b: np.ndarray, level: float, seed: int) -> LengthInterval:
    """Compare the mean lengths of the same problems; `a` and `b` hold one number a problem, two at least.

    The p-value is that of the permutation test which exchanges A and B within a problem.
    """
    differences = b - a
    zero = Interval(float(differences[0]), float(differences[0]), level)
    if np.ptp(differences) == 0:
        mean = median = zero
        p = 1.0 if differences[0] == 0 else 2.0 ** (1 - len(differences))
    else:
        mean = _percentile((differences,), lambda drawn, axis=-1: np.mean(drawn, axis=axis), level, seed)
        median = _percentile((differences,), lambda drawn, axis=-1: np.median(drawn, axis=axis), level, seed)
        p = float(
            stats.permutation_test(
                (b, a),
                lambda one, other, axis=-1: np.mean(one - other, axis=axis),
                permutation_type="samples",
                vectorized=True,
                n_resamples=NUM_RESAMPLES,
                rng=np.random.default_rng(seed),
            ).pvalue
        )
    return LengthInterval(
        float(a.mean()),
        float(b.mean()),
        float(differences.mean()),
        mean,
        float(np.median(differences)),
        median,
        p,
        float(differences.std(ddof=1)),
    )


def _percentile(samples: tuple[np.ndarray, ...], statistic: object, level: float, seed: int) -> Interval:
    found = stats.bootstrap(
        samples,
        statistic,
        paired=len(samples) > 1,
        vectorized=True,
        confidence_level=level,
        n_resamples=NUM_RESAMPLES,
        method="percentile",
        batch=500,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(found.low), float(found.high), level)
