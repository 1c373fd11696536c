"""Whether two ways of training are equivalent: statistics over seeds and steps. No torch.

"Not significantly different" is not "equivalent": equivalence is shown by two one-sided tests (TOST; Schuirmann 1987)
against a margin that is stated beforehand, a difference by the opposite test against the same margin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from crosschip.qualify.judging.student import student_tail, student_threshold

__all__ = [
    "LOSS_MARGIN",
    "Equivalence",
    "MeanBound",
    "equivalence",
    "loss_scale",
    "mean_bound",
    "smoothed_final",
]

LOSS_MARGIN = 0.005  # relative: final losses closer than this are the same training
_LEAST_SCALE = 2.0**-126  # fp32's least normal number: of a loss that is 0 throughout
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


def loss_scale(loss: float, curve: Sequence[float]) -> float:
    """What a difference from `loss`, one of `curve`, is relative to.

    That is the loss itself. One that reaches 0 or less has no natural zero: where it is small, how far it moves counts.
    """
    if min(curve) > 0.0:
        return loss
    return max(abs(loss), max(curve) - min(curve), _LEAST_SCALE)


def equivalence(differences: Sequence[float], margin: float = LOSS_MARGIN, alpha: float = 0.05) -> Equivalence:
    """Two one-sided tests of paired differences (one a seed) against `margin`, in the unit of the differences.

    `different` is the opposite claim: the interval lies wholly beyond the margin. One pair alone decides nothing.
    """
    values = np.asarray(differences, dtype=np.float64)
    mean = float(values.mean())
    if values.size < 2:
        return Equivalence(mean, -math.inf, math.inf, margin, values.size, "undecided")
    half = student_threshold(alpha, values.size - 1) * float(values.std(ddof=1)) / math.sqrt(values.size)
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
    half = student_threshold(alpha, draws.size - 1) * error
    t = excess / error if error > 0.0 else math.copysign(math.inf, excess if excess else -1.0)
    p = student_tail(t, draws.size - 1)
    return MeanBound(mean, mean - half, mean + half, limit, p, draws.size)
