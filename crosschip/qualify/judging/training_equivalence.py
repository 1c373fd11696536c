"""Whether two ways of training are equivalent: statistics over seeds and steps. Pure numbers: numpy, no torch.

"Not significantly different" is not "equivalent": equivalence is shown by two one-sided tests (TOST; Schuirmann 1987)
against a margin that is stated beforehand, a difference by the opposite test against the same margin.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

__all__ = [
    "LOSS_MARGIN",
    "Equivalence",
    "MeanBound",
    "equivalence",
    "mean_bound",
    "smoothed_final",
    "student_t_quantile",
    "student_t_tail",
]

LOSS_MARGIN = 0.005  # relative: final losses closer than this are the same training
_FINAL_SHARE = 0.3  # of the steps: what the final loss is averaged over, so that one batch does not decide

Shown = Literal["equivalent", "different", "undecided"]


@dataclass(frozen=True)
class Equivalence:
    """The outcome of TOST. `lower` to `upper` is the interval that holds the mean with probability 1 - 2 alpha."""

    mean: float
    lower: float
    upper: float
    margin: float
    num_pairs: int
    shown: Shown

    @property
    def bound(self) -> float:
        """The smallest margin for which these numbers would show equivalence."""
        return max(abs(self.lower), abs(self.upper))


@dataclass(frozen=True)
class MeanBound:
    """A mean over draws and how sure it is that its distance from 0 exceeds a limit: `p` is small when it does."""

    mean: float
    lower: float  # of the mean, one-sided 95 %
    upper: float
    limit: float
    p: float
    num_draws: int


def smoothed_final(losses: Sequence[float]) -> float:
    """The mean loss over the last 30 % of the steps."""
    count = max(1, math.ceil(_FINAL_SHARE * len(losses)))
    return float(np.mean(np.asarray(losses, dtype=np.float64)[-count:]))


def equivalence(differences: Sequence[float], margin: float = LOSS_MARGIN, alpha: float = 0.05) -> Equivalence:
    """Two one-sided tests of paired differences (one a seed) against `margin`, in the unit of the differences.

    `different` is the opposite claim: the interval lies wholly beyond the margin. One pair alone decides nothing.
    """
    values = np.asarray(differences, dtype=np.float64)
    mean = float(values.mean())
    if values.size < 2:
        return Equivalence(mean, -math.inf, math.inf, margin, values.size, "undecided")
    half = student_t_quantile(1.0 - alpha, values.size - 1) * float(values.std(ddof=1)) / math.sqrt(values.size)
    lower, upper = mean - half, mean + half
    shown: Shown = "undecided"
    if -margin < lower and upper < margin:
        shown = "equivalent"
    elif lower > margin or upper < -margin:
        shown = "different"
    return Equivalence(mean, lower, upper, margin, values.size, shown)


def mean_bound(values: Sequence[float], limit: float, two_sided: bool = False, alpha: float = 0.05) -> MeanBound:
    """Test of `mean <= limit` (with `two_sided`: of `|mean| <= limit`) by Student's t over independent draws."""
    draws = np.asarray(values, dtype=np.float64)
    mean = float(draws.mean())
    excess = (abs(mean) if two_sided else mean) - limit
    if draws.size < 2:
        return MeanBound(mean, -math.inf, math.inf, limit, 1.0, draws.size)
    error = float(draws.std(ddof=1)) / math.sqrt(draws.size)
    half = student_t_quantile(1.0 - alpha, draws.size - 1) * error
    t = excess / error if error > 0.0 else math.copysign(math.inf, excess if excess else -1.0)
    p = student_t_tail(t, draws.size - 1)
    return MeanBound(mean, mean - half, mean + half, limit, p, draws.size)


def student_t_tail(t: float, dof: int) -> float:
    """P(T > t) for Student's t with `dof` degrees of freedom, by the incomplete beta function (A&S 26.7.1)."""
    if not math.isfinite(t):
        return 0.0 if t > 0 else 1.0
    tail = 0.5 * _incomplete_beta(dof / (dof + t * t), 0.5 * dof, 0.5)
    return tail if t >= 0 else 1.0 - tail


@functools.lru_cache(maxsize=256)
def student_t_quantile(probability: float, dof: int) -> float:
    """The t with P(T <= t) = `probability`, by bisection."""
    if probability < 0.5:
        return -student_t_quantile(1.0 - probability, dof)
    low, high = 0.0, 1.0
    while student_t_tail(high, dof) > 1.0 - probability:
        high *= 2.0
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if student_t_tail(middle, dof) > 1.0 - probability else (low, middle)
    return 0.5 * (low + high)


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (Numerical Recipes, 6.4)."""
    if x <= 0.0 or x >= 1.0:
        return 0.0 if x <= 0.0 else 1.0
    if x > (a + 1.0) / (a + b + 2.0):
        return 1.0 - _incomplete_beta(1.0 - x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) * _beta_fraction(x, a, b) / a


def _beta_fraction(x: float, a: float, b: float) -> float:
    """Lentz's method; it converges in some tens of steps for x below (a + 1) / (a + b + 2)."""
    tiny = 1e-300
    c, d = 1.0, 1.0 / max(tiny, 1.0 - (a + b) * x / (a + 1.0))
    fraction = d
    for m in range(1, 500):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d, c = 1.0 / _away_from_zero(1.0 + even * d, tiny), _away_from_zero(1.0 + even / c, tiny)
        fraction *= d * c
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d, c = 1.0 / _away_from_zero(1.0 + odd * d, tiny), _away_from_zero(1.0 + odd / c, tiny)
        fraction *= d * c
        if abs(d * c - 1.0) < 1e-14:
            break
    return fraction


def _away_from_zero(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny
