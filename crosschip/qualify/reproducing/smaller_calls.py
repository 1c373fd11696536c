"""Smaller operator calls of the same kind, for finding the smallest that still fails. Documents only: no torch.

A size that occurs in several shapes is taken for one dimension, such as the batch or the width, and made smaller
wherever it occurs. Whether what comes out is a valid call is for the CPU to say.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from crosschip.qualify.tracing.trace import tensor_specs

__all__ = ["smaller_calls"]

# Smaller numbers among scalar arguments are rarely sizes: dimensions, flags, exponents.
_LEAST_SCALAR_SIZE = 5


def smaller_calls(parameters: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Parameters with `args` and `kwargs` (encoded as in a trace) in which one size is smaller, boldest first.

    For each size n: 1, then n/2, 3n/4, 7n/8, ... n - 1, so that a search by repeated choice of the first that fails
    ends in few steps at the smallest size. Other parameters are kept as they are.
    """
    call = [parameters["args"], parameters["kwargs"]]
    sizes = sorted({size for spec in tensor_specs(call) for size in spec["shape"]}, reverse=True)
    for size in sizes:
        for smaller in _smaller_sizes(size):
            in_shapes, everywhere = (_with_size(call, size, smaller, scalars) for scalars in (False, True))
            for args, kwargs in [in_shapes] if everywhere == in_shapes else [in_shapes, everywhere]:
                yield {**parameters, "args": args, "kwargs": kwargs}


def _with_size(encoded: Any, size: int, smaller: int, with_scalars: bool = False) -> Any:
    """An encoded value with `smaller` instead of `size`: in shapes, lists of integers and, if asked, among scalars.

    Strides keep their order and their gaps; integers that were indices below `size` stay below `smaller`.
    """
    if isinstance(encoded, dict):
        if "tensor" in encoded:
            return {**encoded, "tensor": _smaller_tensor(encoded["tensor"], size, smaller)}
        return {name: _with_size(value, size, smaller, with_scalars) for name, value in encoded.items()}
    if isinstance(encoded, list):
        if encoded and all(type(value) is int for value in encoded):
            return [smaller if value == size else value for value in encoded]
        return [_with_size(value, size, smaller, with_scalars) for value in encoded]
    if with_scalars and type(encoded) is int and encoded == size >= _LEAST_SCALAR_SIZE:
        return smaller
    return encoded


def _smaller_sizes(size: int) -> list[int]:
    steps = [1]
    gap = size - size // 2
    while gap > 0:
        steps.append(size - gap)
        gap //= 2
    return [each for each in dict.fromkeys(steps) if 1 <= each < size]


def _smaller_tensor(spec: dict[str, Any], size: int, smaller: int) -> dict[str, Any]:
    values = spec.get("values")
    shape = [smaller if each == size else each for each in spec["shape"]]
    made = {**spec, "shape": shape}
    if spec.get("stride") is not None:
        made["stride"] = _strides(spec["shape"], spec["stride"], shape)
    if isinstance(values, dict) and "high" in values and values["high"] < size:
        high = min(values["high"], smaller - 1)
        made["values"] = {**values, "high": high, "low": min(values["low"], high)}
    return made


def _strides(old_shape: list[int], old_strides: list[int], shape: list[int]) -> list[int]:
    """Strides for the new shape: dimensions in the old order, with the old gaps; repeated ones stay repeated."""
    strides = list(old_strides)
    old_extent = extent = 1
    for place in sorted(range(len(shape)), key=lambda place: (old_strides[place], old_shape[place])):
        if old_strides[place] == 0:
            continue
        strides[place] = extent + max(0, old_strides[place] - old_extent)
        extent = strides[place] * shape[place]
        old_extent = old_strides[place] * old_shape[place]
    return strides
