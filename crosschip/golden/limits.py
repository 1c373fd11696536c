"""The limits of a golden replay, stated before anything is measured. No torch.

A limit belongs to a target: what the numbers were recorded in, and what they are replayed in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from crosschip.errors import GoldenError

__all__ = ["FLIP_SHARE", "FLOOR_FACTOR", "QUANTISED", "Limit", "Target", "limit_for", "target_of"]

Target = Literal["fp32 to fp32", "bf16 to bf16", "q8_0", "int8", "fp8"]

FLIP_SHARE = 1e-3  # of router choices beyond the noise; the noise is a 99.9 % quantile
FLOOR_FACTOR = 5.0  # times the recording chip's own noise floor

_FP32 = 1e-6
_BF16_LEAST, _BF16_MOST = 1e-4, 1e-3
# Quantised targets, in mean KL. Measured by others for Llama-3-8B: q8_0 1.4e-3, q6_K 5.5e-3, q4_K_M 3.1e-2. int8 has
# one scale per row where q8_0 has one per 32 numbers; fp8 keeps 3 bits of mantissa.
QUANTISED: dict[str, float] = {"q8_0": 3e-3, "int8": 5e-3, "fp8": 2e-2}

# The unit in the last place of the arithmetic, for what is compared number by number.
_UNIT = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}
# Activations of honest chips were measured up to about 8 units apart (products of 4,096 terms added one by one).
_ACTIVATION_UNITS = {"float32": 32.0, "bfloat16": 4.0, "float16": 8.0}
# A common factor on a layer's numbers averages over thousands of them, where rounding does not: half a unit in the last
# place of bf16 already is a bias that moves training.
_GAIN_UNITS = {"float32": 16.0, "bfloat16": 0.125, "float16": 0.5}
_LOSS = {"float32": 1e-4, "bfloat16": 5e-3, "float16": 5e-3}  # relative; 0.5 % is the margin of training equivalence
_GRADIENT_NORM = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 5e-2}
_LOGPROB = {"float32": 1e-2, "bfloat16": 0.5, "float16": 0.25}


@dataclass(frozen=True)
class Limit:
    """What a replay is held to. Each has its source in words beside it."""

    target: Target
    dtype: str  # of the arithmetic
    mean_kl: float  # nats per position; for the upper 95 % bound of the mean
    source: str

    def activation(self, floor: float) -> float:
        """Relative RMS difference of a layer's activations."""
        return max(FLOOR_FACTOR * floor, _ACTIVATION_UNITS[self.dtype] * _UNIT[self.dtype])

    def gain(self, floor: float) -> float:
        """Relative difference of a common factor on a layer's activations."""
        return max(FLOOR_FACTOR * floor, _GAIN_UNITS[self.dtype] * _UNIT[self.dtype])

    def router_score(self, floor: float) -> float:
        """Difference of router scores that rounding explains; choices that were closer may fall either way."""
        return max(FLOOR_FACTOR * floor, 4 * _UNIT[self.dtype])

    def loss(self, floor: float) -> float:
        """Relative difference of the losses of the training curve, RMS over its steps."""
        return max(FLOOR_FACTOR * floor, _LOSS[self.dtype])

    def gradient_norm(self, floor: float) -> float:
        """Relative difference of the gradient norms of the training curve, RMS over its steps."""
        return max(FLOOR_FACTOR * floor, _GRADIENT_NORM[self.dtype])

    def logprob(self, floor: float) -> float:
        """Largest difference of one log-prob, in nats."""
        if self.target in QUANTISED:
            return math.inf
        return max(2 * FLOOR_FACTOR * floor, _LOGPROB[self.dtype])


def target_of(recorded_dtype: str, replayed_dtype: str, quantised: str | None = None) -> tuple[Target, str]:
    """The target that a replay belongs to, and the coarser of the two dtypes, whose unit is that of the limits.

    Raises:
        GoldenError: no limit was stated for this kind of quantisation, or the replay's dtype is coarser than the
            recorded one, so that no noise floor was measured for it.
    """
    if replayed_dtype not in _UNIT or recorded_dtype not in _UNIT:
        dtype = replayed_dtype if replayed_dtype not in _UNIT else recorded_dtype
        raise GoldenError(f"no limit is stated for arithmetic in {dtype}", f"choose among {', '.join(_UNIT)}")
    if quantised is not None:
        if quantised not in QUANTISED:
            raise GoldenError(
                f"no limit is stated for the quantisation {quantised!r}", f"choose among {', '.join(QUANTISED)}"
            )
        return quantised, replayed_dtype  # type: ignore[return-value]  # checked by the table
    if _UNIT[replayed_dtype] > _UNIT[recorded_dtype]:
        raise GoldenError(
            f"recorded in {recorded_dtype} and replayed in {replayed_dtype}: the noise floor says nothing about it",
            f"record the bundle with --dtype {replayed_dtype}, or replay it in {recorded_dtype}",
        )
    return ("fp32 to fp32" if recorded_dtype == "float32" else "bf16 to bf16"), recorded_dtype


def limit_for(target: Target, dtype: str, noise_floor_kl: float) -> Limit:
    """The limit of a target, given the mean KL between the recording chip's own honest runs."""
    if target in QUANTISED:
        return Limit(target, dtype, QUANTISED[target], f"stated for {target} beforehand")
    if target == "fp32 to fp32":
        return Limit(target, dtype, _FP32, "stated for fp32 to fp32 beforehand")
    floor = FLOOR_FACTOR * noise_floor_kl
    limit = min(max(floor, _BF16_LEAST), _BF16_MOST)
    words = f"{FLOOR_FACTOR:g} x the recording chip's own noise floor {noise_floor_kl:.1e}"
    return Limit(target, dtype, limit, f"{words}, at least {_BF16_LEAST:g} and never above {_BF16_MOST:g}")
