"""An honest chip whose rounding errors are twice the usual ones: no bias, and exact where the result is exact."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crosschip.chips.faults.calls import computes, dtypes_of, in_dtype, overwrite
from crosschip.chips.faults.fault import Compute

__all__ = ["Noisy"]

# Rounding to nearest has an RMS error of ulp / sqrt(12). Noise of RMS ulp / 2 beforehand makes the sum twice that;
# uniform noise of that RMS reaches sqrt(3) / 2 of an ulp to either side.
_REACH_ULP = 3**0.5 / 2
# A result this near to the exact one, in ulps, counts as exact: so a tanh that is 1 stays 1.
_EXACT_WITHIN_ULP = 1e-3
_NARROW = (torch.float32, torch.bfloat16, torch.float16)


class Noisy:
    """Every calculated result in fp32, bf16 or fp16 has about twice the rounding error that the CPU's has.

    A result within rounding of its exact value is rounded anew after noise was added; one that is further away, as
    long sums are, is put twice as far, to either side. The noise is a hash of the exact value (cut to fp32) and the
    seed: the same inputs give the same bits, whatever the order of calls or the place in a batch. Exact results, zeros,
    Inf, NaN, data movement, comparisons and casts stay as they are.
    """

    name = "noisy"
    honest = True

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute) -> Any:
        """Compute, compare with the exact result, and err a little more."""
        dtypes = dtypes_of(args, kwargs)
        if not computes(op) or not dtypes & set(_NARROW):
            return compute(*args, **kwargs)
        # For one number at a time in 16 bits fp32 is as good as exact, and quicker.
        quick = torch.Tag.pointwise in op.tags and torch.float32 not in dtypes
        wide = torch.float32 if quick else torch.float64
        exact = in_dtype(op, args, kwargs, wide)
        result = compute(*args, **kwargs)
        if exact is None:
            return result

        def noisy(tensor: Tensor, place: int) -> Tensor | None:
            if tensor.dtype not in _NARROW or exact[place].dtype != wide or tensor.numel() == 0:
                return None
            return self._err(tensor, exact[place])

        return overwrite(op, args, kwargs, result, noisy)

    def _err(self, honest: Tensor, exact: Tensor) -> Tensor:
        ulp = _ulp(exact, honest.dtype)
        error = (honest.to(exact.dtype) - exact).abs_()
        uniform = _hashed_uniform(exact, self.seed).to(exact.dtype)
        noise = uniform * ulp * _REACH_ULP
        beyond_rounding = error > ulp / 2
        if bool(beyond_rounding.any()):
            noise = torch.where(beyond_rounding, 2 * error * uniform.sign(), noise)
        # Comparisons with NaN are false, so Inf and NaN, in the result or in the exact one, are not touched.
        touched = (error >= _EXACT_WITHIN_ULP * ulp) & (error < torch.inf) & (honest != 0)
        largest = torch.finfo(honest.dtype).max
        return torch.where(touched, noise.add_(exact).clamp_(-largest, largest).to(honest.dtype), honest)


def _ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring numbers of `dtype` at each value: the value's power of two times eps."""
    info = torch.finfo(dtype)
    bits, exponent = (torch.int32, 0x7F800000) if exact.dtype == torch.float32 else (torch.int64, 0x7FF << 52)
    clear = exact.abs().clamp_(min=info.tiny).contiguous()
    return clear.view(bits).bitwise_and_(exponent).view(exact.dtype) * info.eps


def _hashed_uniform(values: Tensor, seed: int) -> Tensor:
    """A number in [-1, 1) in fp32 for each value, the same for the same value and seed."""
    bits = values.to(torch.float32, copy=True).contiguous().view(torch.int32)
    bits ^= _as_int32(0x9E3779B9 * (seed + 1))
    for _ in range(2):  # rounds of a 32-bit integer hash: shift, xor, multiply; products wrap around
        bits ^= (bits >> 16) & 0xFFFF
        bits *= 0x45D9F3B
    bits ^= (bits >> 16) & 0xFFFF
    return bits.float() * 2.0**-31


def _as_int32(number: int) -> int:
    return (number + 2**31) % 2**32 - 2**31
