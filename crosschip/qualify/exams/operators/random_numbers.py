"""Operators that draw random numbers: two devices' numbers are never equal, but their distributions are."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crosschip.qualify.exams.operators.runs import Outcome, same

__all__ = ["ALPHA", "compare_distributions"]

# A sweep has few such operators and each has seven tests; at this level an honest chip fails one sweep in thousands.
ALPHA = 1e-6
_MIN_NUMBERS = 1 << 16
_MOST_CALLS = 512
_LEAST_CORRELATED = 1 << 10


def compare_distributions(chip: Callable[[], Outcome], cpu: Callable[[], Outcome]) -> tuple[str, dict[str, float]]:
    """What is wrong with the numbers that a chip draws, in words (empty when nothing is), and what was measured.

    `chip` and `cpu` make the same call; what they raise is passed on.

    They must be the same again under the same seed and others under another and in the next call; lie where the CPU's
    lie; have the CPU's distribution: Kolmogorov and Smirnov's test, and those of the mean and of the mean square; and
    follow each other as the CPU's do: correlations at some distances. Each test is at `ALPHA`.
    """
    torch.manual_seed(1)
    first = chip()
    torch.manual_seed(1)
    if not _equal(first, chip()):
        return "the same seed gives other numbers", {}
    size = max(1, max((each.numel() for _, each in first.outputs), default=1))
    num_calls = max(2, min(_MOST_CALLS, -(-_MIN_NUMBERS // size)))
    mine, honest = _drawn(chip, num_calls, seed=2), _drawn(cpu, num_calls, seed=3)
    measured: dict[str, float] = {"num_calls": float(num_calls)}
    for number, (got, expected) in enumerate(zip(mine, honest, strict=True)):
        problem = _compared(got, expected, measured) or _dependent(got, expected, num_calls, measured)
        if problem:
            return f"output {number}: {problem}", measured
    return "", measured


def _equal(a: Outcome, b: Outcome) -> bool:
    return all(same(x, y) for (_, x), (_, y) in zip(a.outputs, b.outputs, strict=True))


def _drawn(call: Callable[[], Outcome], num_calls: int, seed: int) -> list[NDArray[np.float64]]:
    torch.manual_seed(seed)
    outcomes = [[each for _, each in call().outputs] for _ in range(num_calls)]
    return [_numbers(torch.cat([each.reshape(-1) for each in column])) for column in zip(*outcomes, strict=True)]


def _numbers(tensor: Tensor) -> NDArray[np.float64]:
    made: NDArray[np.float64] = tensor.double().numpy()
    return made


def _compared(got: NDArray[np.float64], expected: NDArray[np.float64], measured: dict[str, float]) -> str:
    if not np.isfinite(got).all() and np.isfinite(expected).all():
        return "numbers that are not finite"
    spread = float(np.ptp(expected)) if len(expected) else 0.0
    if len(got) and spread == 0.0:
        return "" if np.array_equal(got, expected) else "the CPU has one constant number there"
    gap = _largest_gap(got, expected)
    limit = math.sqrt(-math.log(ALPHA / 2) / len(got))  # two samples of equal size: c(alpha) * sqrt(2 / n)
    measured.update(distribution_gap=gap, distribution_limit=limit)
    if gap > limit:
        return f"the distribution is {gap:.3g} away from the CPU's (limit {limit:.3g})"
    for name, power in (("mean", 1), ("mean square", 2)):
        a, b = got**power, expected**power
        error = math.sqrt((a.var() + b.var()) / len(a))
        z = (a.mean() - b.mean()) / error if error > 0 else 0.0
        measured[f"z_{name.replace(' ', '_')}"] = float(z)
        if math.erfc(abs(z) / math.sqrt(2)) < ALPHA:
            return f"the {name} is {a.mean():.6g} instead of {b.mean():.6g} (z = {z:.1f})"
    return ""


def _dependent(
    got: NDArray[np.float64], expected: NDArray[np.float64], num_calls: int, measured: dict[str, float]
) -> str:
    """How the numbers of calls in a row depend on each other otherwise than the CPU's; empty when they do not.

    What is correlated is whether numbers are above the CPU's median: large inputs of a dropout have no more weight.
    """
    if len(got) % num_calls or len(got) < _LEAST_CORRELATED:
        return ""
    mine, honest = (each.reshape(num_calls, -1) for each in (got, expected))
    if (mine == mine[0]).all() and not (honest == honest[0]).all():
        return "calls in a row give the same numbers"
    above = [each > np.median(expected) for each in (got, expected)]
    for lag in sorted({1, 2, mine.shape[1] // 2, mine.shape[1]} - {0}):
        a, b = (_correlation(each, lag) for each in above)
        z = (a - b) * math.sqrt((len(got) - lag) / 2)
        measured[f"z_lag_{lag}"] = z
        if math.erfc(abs(z) / math.sqrt(2)) < ALPHA:
            return f"numbers {lag} apart have a correlation of {a:.3f}, the CPU's of {b:.3f} (z = {z:.1f})"
    return ""


def _correlation(above: NDArray[np.bool_], lag: int) -> float:
    """Of truth values and those `lag` places on; 0 where all are alike."""
    first, second = above[:-lag].astype(np.float64), above[lag:].astype(np.float64)
    spread = first.std() * second.std()
    return float(((first - first.mean()) * (second - second.mean())).mean() / spread) if spread > 0 else 0.0


def _largest_gap(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """The largest distance of two samples' distribution functions."""
    a, b = np.sort(a), np.sort(b)
    places = np.concatenate([a, b])
    gaps = np.searchsorted(a, places, side="right") / len(a) - np.searchsorted(b, places, side="right") / len(b)
    return float(np.abs(gaps).max())
