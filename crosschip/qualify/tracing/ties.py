"""Operators that choose among equal values as they like. Needs torch only: reproducers hold this file's text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["CHOOSING", "chooses_as_well"]

_AMONG_ALL = ("topk", "sort", "argsort", "argmax", "argmin", "max", "min", "kthvalue", "median", "mode")
_AMONG_EARLIER = ("cummax", "cummin")
# By the number of dimensions of their windows; indices count through the window's dimensions as one.
_POOLING = {
    "max_pool2d_with_indices": 2,
    "max_pool3d_with_indices": 3,
    "adaptive_max_pool2d": 2,
    "adaptive_max_pool3d": 3,
}
CHOOSING = (*_AMONG_ALL, *_AMONG_EARLIER, *_POOLING)


def chooses_as_well(
    op: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any], got: torch.Tensor, expected: torch.Tensor
) -> bool:
    """Whether indices differ from the CPU's only among ties: they point at equal values, and at no other places than
    those from which the operator may choose. The arguments are those of the CPU.
    """
    name = op._schema.name.split("::")[1]
    if got.dtype != torch.int64 or got.shape != expected.shape:
        return False
    named: dict[str, Any] = {each.name: each.default_value for each in op._schema.arguments}
    named.update(zip(named, args, strict=False))
    named.update(kwargs)
    if name in _POOLING:
        return _pools_as_well(named, _POOLING[name], got, expected)
    if name not in (*_AMONG_ALL, *_AMONG_EARLIER) or "dim" not in named or named.get("stable"):
        return False
    x, dim = named["self"], named["dim"]
    if dim is None or x.dim() == 0:
        x, got, expected, dim = x.reshape(-1), got.reshape(-1), expected.reshape(-1), 0
    if got.dim() < x.dim():
        got, expected = got.unsqueeze(dim), expected.unsqueeze(dim)
    if got.numel() == 0 or int(got.min()) < 0 or int(got.max()) >= x.shape[dim]:
        return got.numel() == 0
    chosen, wanted = x.gather(dim, got), x.gather(dim, expected)
    if named.get("sorted") is False:
        chosen, wanted = chosen.sort(dim).values, wanted.sort(dim).values
    if name in _AMONG_EARLIER:
        last = torch.arange(x.shape[dim]).view([-1 if each == dim % x.dim() else 1 for each in range(x.dim())])
        return bool((got <= last).all()) and _equal_values(chosen, wanted)
    once = bool((got.sort(dim).values.diff(dim=dim) != 0).all())
    return once and _equal_values(chosen, wanted)


def _pools_as_well(named: dict[str, Any], num_dims: int, got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether each index lies in its window and points at a value equal to the expected one."""
    x = named["self"]
    sizes = x.shape[-num_dims:]
    if got.numel() == 0 or int(got.min()) < 0 or int(got.max()) >= math.prod(sizes):
        return got.numel() == 0
    for dim, place in enumerate(torch.unravel_index(got, sizes)):
        position = torch.arange(got.shape[dim - num_dims]).view([-1, *[1] * (num_dims - dim - 1)])
        if not bool(_lies_in_window(named, dim, position, place, x.shape[dim - num_dims]).all()):
            return False
    planes, flat = x.flatten(-num_dims), got.flatten(-num_dims)
    return _equal_values(planes.gather(-1, flat), planes.gather(-1, expected.flatten(-num_dims)))


def _lies_in_window(
    named: dict[str, Any], dim: int, position: torch.Tensor, place: torch.Tensor, size: int
) -> torch.Tensor:
    """Whether an input's place belongs to the window of an output's position, along one dimension."""
    if "output_size" in named:
        number = _along(named["output_size"], dim)
        return (place >= position * size // number) & (place < -(-(position + 1) * size // number))
    kernel, dilation = _along(named["kernel_size"], dim), _along(named["dilation"], dim)
    offset = place - position * _along(named["stride"] or named["kernel_size"], dim) + _along(named["padding"], dim)
    return (offset >= 0) & (offset < kernel * dilation) & (offset % dilation == 0)


def _along(values: Any, dim: int) -> int:
    """The value for one dimension; one value counts for all."""
    given = [values] if isinstance(values, int) else list(values)
    return int(given[dim if len(given) > 1 else 0])


def _equal_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(((one == other) | ((one != one) & (other != other))).all())
