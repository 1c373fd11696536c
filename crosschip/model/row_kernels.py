"""What a decode step does between its matrix products, compiled for the CPU by numba; fp32, a row at a time.

A step of one token a row is some 400 small operators, and to call one costs more than it computes. Here a stretch of
them is one call. Whatever a row gives depends on that row alone.

M rows, D hidden size, H heads, N = qk_nope_head_dim, R = qk_rope_head_dim, V = v_head_dim, L = kv_lora_rank, X = L + R,
E experts, K experts per token, F inner size of a feed-forward network, P rows of the cache, which slot s has in the
blocks tables_SW[s], each of `block` rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

__all__ = [
    "add_and_normalise",
    "attend",
    "choose_experts",
    "feed_forward",
    "gate",
    "keep_and_turn",
    "multiply",
    "normalise",
]

Array = NDArray[Any]
_P = ParamSpec("_P")
_R = TypeVar("_R")

_ONE, _ZERO = np.float32(1), np.float32(0)


def _kernel(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Compiled at its first call, or read from the cache: beside this file or, where that cannot be written, in the
    user's. The cache knows this file's changes alone, so kernels get what other files define as arguments."""
    # Sums in any order, so that they fill vectors; infinities and NaN are what they are.
    options: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}
    try:
        compiled: Any = njit(cache=True, **options)(function)
    except RuntimeError:  # there is no place for a cache
        compiled = njit(**options)(function)
    return compiled


def _bits_as_float(context: Any, bits: Any) -> Any:
    """An int32 read as the float32 of the same bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


_float_of_bits: Any = intrinsic(_bits_as_float)

# exp(x) = 2^n * exp(r) with |r| <= ln(2) / 2; r in two steps, since n ln(2) in one loses what r needs.
_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_LOWEST, _HIGHEST, _INFINITE = np.float32(-87.0), np.float32(88.0), np.float32(np.inf)
_BIAS = 127  # of a float32's exponent
_MANTISSA_BITS = 23
_TAYLOR = tuple(np.float32(1 / math.factorial(power)) for power in range(8))


@njit(inline="always")
def _exp(x: Any) -> Any:
    """e^x with an error of some 1e-7 of it; at least 1.6e-38, and infinite from e^88 on; NaN stays NaN. Without a
    branch, so that a loop of it fills vectors; its own operations are done in the order that stands here."""
    inside = min(max(x, _LOWEST), _HIGHEST)
    n = np.int32(inside * _LOG2_E + np.float32(_BIAS) + np.float32(0.5)) - np.int32(_BIAS)
    r = (inside - np.float32(n) * _LN2_HIGH) - np.float32(n) * _LN2_LOW
    series = _TAYLOR[7]
    for power in range(6, -1, -1):
        series = series * r + _TAYLOR[power]
    power_of_2 = _float_of_bits((n + np.int32(_BIAS)) << np.int32(_MANTISSA_BITS))
    found = series * power_of_2 if x == x else x
    return found if not x > _HIGHEST else _INFINITE


@_kernel
def _dot(x: Array, y: Array) -> Any:
    total = _ZERO
    for i in range(len(x)):
        total += x[i] * y[i]
    return total


@_kernel
def _write_unit_rms(x_D: Array, eps: float, out_D: Array) -> None:
    scale = _ONE / np.sqrt(_dot(x_D, x_D) / np.float32(len(x_D)) + np.float32(eps))
    for i in range(len(x_D)):
        out_D[i] = x_D[i] * scale


@_kernel
def normalise(x_MD: Array, eps: float, out_MD: Array) -> None:
    """`unit_rms` of each row."""
    for m in range(len(x_MD)):
        _write_unit_rms(x_MD[m], eps, out_MD[m])


@_kernel
def add_and_normalise(x_MD: Array, y_MD: Array, eps: float, out_MD: Array) -> None:
    """Add y to x, in place, and take `unit_rms` of it."""
    for m in range(len(x_MD)):
        for i in range(x_MD.shape[1]):
            x_MD[m, i] += y_MD[m, i]
        _write_unit_rms(x_MD[m], eps, out_MD[m])


@_kernel
def multiply(x_MD: Array, weight_OD: Array, bias_O: Array, out_MO: Array) -> None:
    """A product of few rows, on one core; a bias of length 0 is none."""
    for o in range(len(weight_OD)):
        bias = bias_O[o] if len(bias_O) else _ZERO
        for m in range(len(x_MD)):
            out_MO[m, o] = _dot(x_MD[m], weight_OD[o]) + bias


@_kernel
def _turn(x_R: Array, cos_r: Array, sin_r: Array) -> None:
    """Rotate, in place, a vector whose pairs are laid out as halves."""
    half = len(cos_r)
    for i in range(half):
        first, second = x_R[i], x_R[half + i]
        x_R[i] = first * cos_r[i] - second * sin_r[i]
        x_R[half + i] = second * cos_r[i] + first * sin_r[i]


@_kernel
def keep_and_turn(
    q_MQ: Array,
    heads: int,
    first_turning: int,
    kv_MK: Array,
    rope_P2r: Array,
    start_M: Array,
    slots_M: Array,
    tables_SW: Array,
    block: int,
    eps: float,
    rows_PX: Array,
    written_M: Array,
) -> None:
    """Rotate queries, in place, and write each row's latent and rotated key to the cache.

    `q_MQ` has, from column `first_turning` on, the rotary parts of all heads; the last X columns of `kv_MK` are the key
    before its rotation, then the latent before its norm. `written_M` gets the rows of the cache that were written.
    """
    rotary, width = 2 * rope_P2r.shape[2], rows_PX.shape[1]
    latent, columns = width - rotary, kv_MK.shape[1]
    for m in range(len(start_M)):
        position = start_M[m]
        cos_r, sin_r = rope_P2r[position, 0], rope_P2r[position, 1]
        place = tables_SW[slots_M[m], position // block] * block + position % block
        written_M[m] = place
        _write_unit_rms(kv_MK[m, columns - latent :], eps, rows_PX[place, :latent])
        rows_PX[place, latent:] = kv_MK[m, columns - width : columns - latent]
        _turn(rows_PX[place, latent:], cos_r, sin_r)
        for h in range(heads):
            first = first_turning + h * rotary
            _turn(q_MQ[m, first : first + rotary], cos_r, sin_r)


@_kernel
def _write_softmax(scores: Array) -> None:
    """In place."""
    greatest, total = scores[0], _ZERO
    for i in range(len(scores)):
        greatest = max(greatest, scores[i])
    for i in range(len(scores)):
        scores[i] = _exp(scores[i] - greatest)
        total += scores[i]
    scale = _ONE / total
    for i in range(len(scores)):
        scores[i] *= scale


@_kernel
def _add_scaled(out: Array, x: Array, factor: Any) -> None:
    for i in range(len(out)):
        out[i] += x[i] * factor


@_kernel
def attend(
    q_MQ: Array,
    first_turned: int,
    key_up_HNL: Array,
    value_up_HVL: Array,
    rows_PX: Array,
    start_M: Array,
    slots_M: Array,
    tables_SW: Array,
    block: int,
    out_MO: Array,
) -> None:
    """Each row's heads over the cached positions up to its own, in the latent space; `out_MO` is [M, H * V]."""
    heads, plain, latent = key_up_HNL.shape
    values, width = value_up_HVL.shape[1], rows_PX.shape[1]
    rotary = width - latent
    query_HX = np.empty((heads, width), np.float32)
    mixed_HL = np.empty((heads, latent), np.float32)
    scores_HS = np.empty((heads, np.max(start_M) + 1), np.float32)
    for m in range(len(start_M)):
        length, table_W = start_M[m] + 1, tables_SW[slots_M[m]]
        query_HX[:, :latent] = _ZERO
        mixed_HL[:] = _ZERO
        for h in range(heads):
            for n in range(plain):
                _add_scaled(query_HX[h, :latent], key_up_HNL[h, n], q_MQ[m, h * plain + n])
            first = first_turned + h * rotary
            query_HX[h, latent:] = q_MQ[m, first : first + rotary]
        for first_s in range(0, length, block):
            place = table_W[first_s // block] * block - first_s
            for s in range(first_s, min(first_s + block, length)):
                for h in range(heads):
                    scores_HS[h, s] = _dot(query_HX[h], rows_PX[place + s])
        for h in range(heads):
            _write_softmax(scores_HS[h, :length])
        for first_s in range(0, length, block):
            place = table_W[first_s // block] * block - first_s
            for s in range(first_s, min(first_s + block, length)):
                for h in range(heads):
                    _add_scaled(mixed_HL[h], rows_PX[place + s, :latent], scores_HS[h, s])
        for h in range(heads):
            for v in range(values):
                out_MO[m, h * values + v] = _dot(mixed_HL[h], value_up_HVL[h, v])


@_kernel
def choose_experts(
    x_MD: Array, weight_ED: Array, bias_E: Array, normalises: bool, factor: Any, ids_MK: Array, share_ME: Array
) -> None:
    """The router without groups: ids of the chosen experts, and the share of every expert (0: not chosen)."""
    scores_E = np.empty(len(bias_E), np.float32)
    for m in range(len(x_MD)):
        for e in range(len(bias_E)):
            scores_E[e] = _ONE / (_ONE + _exp(-_dot(x_MD[m], weight_ED[e])))
            share_ME[m, e] = _ZERO
        total = _ZERO
        for k in range(ids_MK.shape[1]):
            best = -1
            for e in range(len(bias_E)):
                is_free = True
                for earlier in range(k):
                    is_free = is_free and ids_MK[m, earlier] != e
                if is_free and (best < 0 or scores_E[e] + bias_E[e] > scores_E[best] + bias_E[best]):
                    best = e
            ids_MK[m, k] = best
            total += scores_E[best]
        scale = np.float32(factor) / (total + np.float32(1e-20)) if normalises else np.float32(factor)
        for k in range(ids_MK.shape[1]):
            share_ME[m, ids_MK[m, k]] = scores_E[ids_MK[m, k]] * scale


@_kernel
def _write_gated(gate: Array, up: Array, share: Any, out: Array) -> None:
    for i in range(len(out)):
        out[i] = gate[i] / (_ONE + _exp(-gate[i])) * up[i] * share


@_kernel
def gate(gate_up_MF: Array, share_ME: Array, expert_size: int, out_MF: Array) -> None:
    """SwiGLU of rows whose first half is the gate: each expert's columns weighted by its share, what is behind all
    experts by 1. An expert without a share is not looked at."""
    size, shared = out_MF.shape[1], share_ME.shape[1] * expert_size
    for m in range(len(out_MF)):
        gate_F, up_F = gate_up_MF[m, :size], gate_up_MF[m, size:]
        for e in range(share_ME.shape[1]):
            own = slice(e * expert_size, (e + 1) * expert_size)
            if share_ME[m, e] == _ZERO:
                out_MF[m, own] = _ZERO
            else:
                _write_gated(gate_F[own], up_F[own], share_ME[m, e], out_MF[m, own])
        _write_gated(gate_F[shared:], up_F[shared:], _ONE, out_MF[m, shared:])


@_kernel
def feed_forward(
    x_MD: Array, gate_up_FD: Array, down_FD: Array, share_ME: Array, expert_size: int, out_MD: Array
) -> None:
    """The networks that `gate` is the middle of, for few rows, on one core: of what has no share no weight is read.

    `gate_up_FD` has all gates, then all ups; `down_FD` is the transposed matrix.
    """
    size, experts = len(down_FD), share_ME.shape[1]
    for m in range(len(x_MD)):
        out_MD[m] = _ZERO
        for part in range(experts + 1):
            share = share_ME[m, part] if part < experts else _ONE
            if share == _ZERO:
                continue
            for f in range(part * expert_size, (part + 1) * expert_size if part < experts else size):
                gated, up = _dot(x_MD[m], gate_up_FD[f]), _dot(x_MD[m], gate_up_FD[size + f])
                _add_scaled(out_MD[m], down_FD[f], gated / (_ONE + _exp(-gated)) * up * share)
