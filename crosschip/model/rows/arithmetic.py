"""What is done to a row, whatever it is a row of; fp32."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from crosschip.model.rows.intrinsics import float_of_bits, less_product
from crosschip.model.rows.numbers import Array, kernel

__all__ = ["dot", "exp", "write_gated", "write_softmax", "write_turned", "write_unit_rms"]

# exp(x) = 2^n * exp(r) with |r| <= ln(2) / 2; r in two steps, since n ln(2) in one loses what r needs.
_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_LOWEST, _HIGHEST, _INFINITE = np.float32(-87.0), np.float32(88.0), np.float32(np.inf)
_BIAS = 127  # of a float32's exponent
_MANTISSA_BITS = 23
_TAYLOR = tuple(np.float32(1 / math.factorial(power)) for power in range(8))


def _exp(x: Any) -> Any:
    """e^x with an error of some 1e-7 of it; at least 1.6e-38, and infinite from e^88 on; NaN stays NaN. Without a
    branch, so that a loop of it fills vectors."""
    inside = min(max(x, _LOWEST), _HIGHEST)
    n = np.int32(inside * _LOG2_E + np.float32(_BIAS) + np.float32(0.5)) - np.int32(_BIAS)
    r = less_product(less_product(inside, np.float32(n), _LN2_HIGH), np.float32(n), _LN2_LOW)
    series = _TAYLOR[7]
    for power in range(6, -1, -1):
        series = series * r + _TAYLOR[power]
    power_of_2 = float_of_bits((n + np.int32(_BIAS)) << np.int32(_MANTISSA_BITS))
    found = series * power_of_2 if x == x else x
    return found if not x > _HIGHEST else _INFINITE


exp: Any = njit(inline="always")(_exp)


@kernel
def dot(x: Array, y: Array) -> Any:
    """The sum of the products."""
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * y[i]
    return total


@kernel
def write_unit_rms(x_D: Array, eps: Any, out_D: Array) -> None:
    """x over the root of its mean square."""
    scale = np.float32(1) / np.sqrt(dot(x_D, x_D) / np.float32(len(x_D)) + eps)
    for i in range(len(x_D)):
        out_D[i] = x_D[i] * scale


@kernel
def write_turned(x_R: Array, cos_r: Array, sin_r: Array, out_R: Array) -> None:
    """Rotate a vector whose pairs are laid out as halves."""
    half = len(cos_r)
    for i in range(half):
        first, second = x_R[i], x_R[half + i]
        out_R[i] = first * cos_r[i] - second * sin_r[i]
        out_R[half + i] = second * cos_r[i] + first * sin_r[i]


@kernel
def write_softmax(scores: Array) -> None:
    """In place."""
    greatest, total = scores[0], np.float32(0)
    for i in range(len(scores)):
        greatest = max(greatest, scores[i])
    for i in range(len(scores)):
        scores[i] = exp(scores[i] - greatest)
        total += scores[i]
    scale = np.float32(1) / total
    for i in range(len(scores)):
        scores[i] *= scale


@kernel
def write_gated(gate: Array, up: Array, share: Any, out: Array) -> None:
    """SwiGLU, weighted."""
    for i in range(len(out)):
        out[i] = gate[i] / (np.float32(1) + exp(-gate[i])) * up[i] * share
