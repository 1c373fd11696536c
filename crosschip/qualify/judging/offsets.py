"""Errors of one sign: their mean in units of the usual error, beyond what honest implementations have. Numpy only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crosschip.qualify.judging.student import student_threshold

__all__ = [
    "BIAS_LIMIT",
    "FINE",
    "HARMLESS",
    "MIN_DISTINCT",
    "ROUNDED",
    "Offset",
    "judge_offset",
    "mean_and_error",
    "offsets_of",
]

Array = NDArray[np.float64]

# A mean error of half the usual error. Truncation instead of rounding has 1.73 times it: half a unit in the last place
# against 1/sqrt(12) of one.
BIAS_LIMIT = 0.5
# In fp32 and finer the unit is at least one last place: functions such as exp are made of polynomials there, whose
# errors lean to one side within an argument's range on any chip.
FINE = 2.0**-23
# A bias needs outputs of many values: one constant is rounded in one direction by any honest chip.
MIN_DISTINCT = 64

# A thousand operators one after the other, each with an error of one sign of this share of its results, stay below the
# margin within which two trainings count as equivalent (0.5 %). An H100's attention in fp32 has one of 1e-7.
HARMLESS = 2.0**-18

ROUNDED = "rounded"  # the golden result in the result's dtype, as one of the honest implementations


@dataclass(frozen=True)
class Offset:
    """A mean error of one sign: `effect` in units of the usual error, beyond what honest implementations have."""

    kind: str
    effect: float
    lower: float  # of |effect|, with the asked confidence
    z: float
    share: float = 0.0  # |effect| as a share of the results

    @property
    def fails(self) -> bool:
        """Whether it is surely larger than the limit."""
        return self.lower > BIAS_LIMIT

    @property
    def is_harmless(self) -> bool:
        """Whether it is too small beside the results to move a training."""
        return self.share < HARMLESS


def offsets_of(
    error: Array, honest_errors: Mapping[str, Array], golden: Array, usual: float
) -> dict[str, tuple[float, dict[str, float]]]:
    """Mean errors in units of `usual`: away from zero (`bias`), upwards (`shift`), with the result (`gain`)."""
    unit = usual if usual > 0 else 1.0
    weights = {
        "bias": np.sign(golden),
        "shift": np.ones_like(golden),
        "gain": golden / max(math.sqrt(float(np.mean(np.square(golden)))), 1e-300),
    }
    unit *= golden.size
    return {
        kind: (
            float(error @ weight) / unit,
            {name: float(each @ weight) / unit for name, each in honest_errors.items()},
        )
        for kind, weight in weights.items()
    }


def judge_offset(kind: str, draws: Sequence[tuple[float, Mapping[str, float]]], unit: float, sure: float) -> Offset:
    """The chip's mean error beyond the range that honest implementations span on the same draws.

    A draw is the chip's mean error and those of the honest by name, in units of the usual error, which is the share
    `unit` of the results. `sure` is the level of the lower bound.
    """
    chip = np.array([mine for mine, _ in draws])
    # An implementation that takes only some of the draws counts as the rounded golden result in the others.
    names = {name: None for _, others in draws for name in others}
    by_name = [others for _, others in draws]
    honest = np.array([[each.get(name, each[ROUNDED]) for name in names] for each in by_name])
    honest = np.column_stack([honest, np.zeros(len(draws))])  # none at all is honest; a constant summand gives RNE one
    means = honest.mean(axis=0)
    if means.min() - 1e-9 <= chip.mean() <= means.max() + 1e-9:
        return Offset(kind, 0.0, 0.0, 0.0)
    nearest = int(means.argmax() if chip.mean() > means.max() else means.argmin())
    effect, error = mean_and_error(chip - honest[:, nearest])
    threshold = student_threshold(sure, len(draws) - 1)
    z = effect / error if error > 0 else math.copysign(1e6, effect)
    return Offset(kind, effect, max(0.0, abs(effect) - threshold * error), z, abs(effect) * unit)


def mean_and_error(values: Array) -> tuple[float, float]:
    """The mean and its standard error."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else math.inf
    return float(np.mean(values)), deviation / math.sqrt(len(values))
