"""Faults of arithmetic: a bias, saturation instead of Inf and NaN, fp64 that is fp32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from crosschip.chips.faults.calls import computes, in_dtype, is_operator, overwrite, with_inputs, with_tensors
from crosschip.chips.faults.fault import Compute

__all__ = ["Bias", "Float64AsFloat32", "Saturation"]


class Bias:
    """The results of one operator are `factor` times what they should be, before they are rounded.

    0.2 % is about half a unit in the last place of bf16: what rounding does to a single number, but always in the same
    direction.
    """

    name = "N11"
    off_the_clock = True

    def __init__(self, factor: float = 1.002, operator: str = "mm") -> None:
        self.factor = factor
        self.biased_operator = operator

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute) -> Any:
        """Multiply before rounding."""
        if not is_operator(op, self.biased_operator):
            return compute(*args, **kwargs)
        wide = in_dtype(op, args, kwargs, torch.float64)
        result = compute(*args, **kwargs)

        def biased(tensor: Tensor, place: int) -> Tensor:
            exact = tensor if wide is None else wide[place]
            return exact.double() * self.factor

        return overwrite(op, args, kwargs, result, biased)


@dataclass
class Saturation:
    """Arithmetic saturates: overflow gives the dtype's largest number (65504 in fp16) and NaN gives 0."""

    name: ClassVar[str] = "N19"
    off_the_clock: ClassVar[bool] = True

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute) -> Any:
        """Compute, then hide what a program could have noticed."""
        result = compute(*args, **kwargs)
        if not computes(op):
            return result

        def saturated(tensor: Tensor, place: int) -> Tensor | None:
            return None if bool(tensor.isfinite().all()) else tensor.nan_to_num()

        return overwrite(op, args, kwargs, result, saturated)


@dataclass
class Float64AsFloat32:
    """float64 is silently computed as float32.

    `mode = "cut"`: results say float64 and hold float32's values. `mode = "dtype"`: results say float32, too, wherever
    the chip makes them; tensors that torch has made before the call keep their dtype.
    """

    name: ClassVar[str] = "N20"
    off_the_clock: ClassVar[bool] = True
    mode: Literal["cut", "dtype"] = "cut"

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute) -> Any:
        """Cut what goes in and what comes out."""
        if not computes(op):
            return compute(*args, **kwargs)
        new_args, new_kwargs = with_inputs(op, args, kwargs, _cut)
        result = compute(*new_args, **new_kwargs)
        overwrite(op, new_args, new_kwargs, result, lambda made, place: _cut(made))
        return with_tensors(result, _as_float32) if self.mode == "dtype" and not op._schema.is_mutable else result


def _cut(tensor: Tensor) -> Tensor:
    return tensor.float().double() if tensor.dtype == torch.float64 else tensor


def _as_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float64 else tensor
