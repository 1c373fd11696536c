"""One operator on special values: overflow, infinities, NaN, subnormal numbers. Is each result of the right kind?

A result is NaN, an infinity, or finite. Right is what the CPU gives in fp64, in fp32, or in the dtype itself, rounded:
honest chips differ where an intermediate result overflows. It is also right to take subnormal numbers for zero, and -0
for 0. Needs torch only: reproducers hold these functions' source.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["Lie", "lies_of", "single_cases", "special_case"]

Lie = tuple[str, tuple[int, ...], str, str]  # the kind, the place in the result, what was expected, what came out

# Functions whose limit at -inf is finite: to compute it as such is right, and so is what the formula gives, NaN.
_LIMIT_AT_NEGATIVE_INFINITY = ("torch.nn.functional.silu", "torch.nn.functional.gelu")

# Where all inputs are of moderate size or special, a finite result must be about right, too.
_MODERATE = (2.0**-12, 2.0**12)
_FEW = 6
_ABOUT = (0.25, 2.0**-6)  # relative and absolute: coarse, for how exact it is is another question


def special_case(
    device: str, function: str, dtype: str, inputs: list[Any], options: dict[str, Any], kind: str
) -> tuple[bool, str, str]:
    """Call a function on the device and look for results that are wrong in one way, such as `overflow hidden`."""
    lies = [lie for lie in lies_of(device, function, dtype, inputs, options) if lie[0] == kind]
    if not lies:
        return False, "results of the right kinds", "the right kinds"
    _, place, expected, got = lies[0]
    given = [values[place[0]] if place and len(values) > place[0] else values for values in inputs]
    words = f"{function}({', '.join(map(_briefly, given))}{', ' + str(options) if options else ''}) in {dtype}"
    more = f", and so in {len(lies) - 1} more places" if len(lies) > 1 else ""
    return True, f"{words} = {expected}{f' at {list(place[1:])}' if place[1:] else ''}", f"{got}{more}"


def _briefly(values: Any) -> str:
    """A number, or the first few of many."""
    if not isinstance(values, list) or len(values) <= _FEW:
        return str(values)
    return f"[{', '.join(map(str, values[:_FEW]))}, ... {len(values)} in all]"


def lies_of(device: str, function: str, dtype: str, inputs: list[Any], options: dict[str, Any]) -> list[Lie]:
    """The results of a wrong kind: `overflow hidden`, `NaN hidden`, `NaN or infinity invented`, `wrong`."""
    made = [torch.tensor(values, dtype=torch.float64).to(getattr(torch, dtype)) for values in inputs]
    got = _called(function, [each.to(device) for each in made], options).cpu()
    narrow = _called(function, made, options)
    if narrow.dtype.is_floating_point:
        return _wrong_kinds(function, made, options, got, narrow)
    answers = torch.stack([_called(function, variant, options) for variant in _variants(made)])
    places = (got != answers).all(0).nonzero().tolist()
    return [("wrong", (*place,), str(narrow[(*place,)].item()), str(got[(*place,)].item())) for place in places]


def _wrong_kinds(
    function: str, made: list[torch.Tensor], options: dict[str, Any], got: torch.Tensor, narrow: torch.Tensor
) -> list[Lie]:
    wides = [_called_in_fp64(function, variant, options) for variant in _variants(made)]
    right = torch.zeros_like(got, dtype=torch.bool)
    for variant, wide in zip(_variants(made), wides, strict=True):
        right |= _kinds(got) == _kinds(wide.to(narrow.dtype))
        for dtype in (narrow.dtype, torch.float32):
            as_on_cpu = _called(
                function, variant if function == "cast" else [each.to(dtype) for each in variant], options
            )
            right |= _kinds(got) == _kinds(as_on_cpu.to(narrow.dtype))
    if function in _LIMIT_AT_NEGATIVE_INFINITY:
        right |= (made[0] == -math.inf) & got.isfinite()
    right |= _near_the_largest(wides[0], narrow.dtype)
    if got.shape == made[0].shape:
        right &= ~_far_off(got, made, wides[0])
    return [_lie((*place,), got, wides[0].to(narrow.dtype)) for place in (~right).nonzero().tolist()]


def _called(function: str, tensors: list[torch.Tensor], options: dict[str, Any]) -> torch.Tensor:
    if function == "cast":
        return tensors[0].to(getattr(torch, options["to"]))
    if function == "where":
        return torch.where(tensors[0] > 0.0, tensors[1], tensors[2])
    found: Any = torch
    for part in function.split(".")[1:]:
        found = getattr(found, part)
    result = found(*tensors, **options)
    return result if isinstance(result, torch.Tensor) else result[0]


def _called_in_fp64(function: str, tensors: list[torch.Tensor], options: dict[str, Any]) -> torch.Tensor:
    wide = [each.double() for each in tensors]
    return wide[0] if function == "cast" else _called(function, wide, options)


def _variants(tensors: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The inputs as they are, with subnormal numbers as zeros, and with -0 as 0."""
    flushed = [torch.where(each.abs() < torch.finfo(each.dtype).tiny, each * 0.0, each) for each in tensors]
    yield tensors
    yield flushed
    yield [torch.where(each == 0.0, 0.0, each) for each in tensors]
    yield [torch.where(each == 0.0, 0.0, each) for each in flushed]


def _kinds(values: torch.Tensor) -> torch.Tensor:
    """0 for finite, 1 for NaN, 2 and 3 for the infinities."""
    return values.isnan() * 1 + (values == math.inf) * 2 + (values == -math.inf) * 3


def _near_the_largest(wide: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Where rounding decides whether a result overflows."""
    share = wide.abs() / torch.finfo(dtype).max
    return (share > 0.875) & (share < 1.125)


def _far_off(got: torch.Tensor, made: list[torch.Tensor], wide: torch.Tensor) -> torch.Tensor:
    """Where a finite result of moderate or special inputs is not even about right."""
    moderate = torch.ones_like(got, dtype=torch.bool)
    for each in made:
        size = each.double().abs()
        moderate &= (size == 0.0) | ~size.isfinite() | ((size > _MODERATE[0]) & (size < _MODERATE[1]))
    relative, absolute = _ABOUT
    off = (got.double() - wide).abs() > relative * wide.abs() + absolute
    return moderate & got.isfinite() & wide.isfinite() & off


def _lie(place: tuple[int, ...], got: torch.Tensor, expected: torch.Tensor) -> Lie:
    wanted, found = float(expected[place]), float(got[place])
    if math.isnan(wanted) and math.isfinite(found):
        kind = "NaN hidden"
    elif math.isinf(wanted) and math.isfinite(found):
        kind = "overflow hidden"
    elif math.isfinite(wanted) and not math.isfinite(found):
        kind = "NaN or infinity invented"
    else:
        kind = "wrong"
    return kind, place, str(wanted), str(found)


def single_cases(parameters: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Parameters with one element, or one row, of all inputs; what has inputs of several lengths is kept whole."""
    inputs = parameters["inputs"]
    if len({len(values) for values in inputs}) == 1 and len(inputs[0]) > 1:
        for place in range(len(inputs[0])):
            yield {**parameters, "inputs": [values[place : place + 1] for values in inputs]}
