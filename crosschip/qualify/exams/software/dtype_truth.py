"""The truth about dtypes: does a device allocate, copy, cast, calculate, compare, reduce and multiply in each of them?

And does it do so in that dtype: each number here needs the precision or the range of its dtype, and every result
is exact in it, so a computation in a narrower one shows. Needs torch only: reproducers hold these functions' source.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["DTYPES", "STEPS", "dtype_step", "steps_of"]

STEPS = ("allocate", "copy", "cast", "calculate", "compare", "reduce", "multiply matrices")

# For each floating-point dtype the bits of its significand, a step above 1 that the next narrower dtype does not hold,
# and a power of two that is out of a narrower range.
_FLOATS = {
    "float64": (53, 2.0**-40, 2.0**1000),
    "float32": (24, 2.0**-20, 2.0**120),
    "bfloat16": (8, 2.0**-5, 2.0**120),
    "float16": (11, 2.0**-8, 2.0**14),
    "float8_e4m3fn": (4, 2.0**-3, 448.0),
    "float8_e5m2": (3, 2.0**-2, 57344.0),
}
# For each integer dtype a number that neither a narrower dtype nor a float of the same width holds.
_INTEGERS = {"int64": 2**62 + 1, "int32": 2**30 + 1, "int16": 2**14 + 1, "int8": 101, "uint8": 201}

DTYPES = (*_FLOATS, *_INTEGERS, "bool")

# A result may be off by 1.5 spacings of its dtype: twice the error of correct rounding, and some.
_SPACINGS = 1.5

Row = tuple[str, list[Any], torch.Tensor]  # what was computed, what it must be, what the device gave


def steps_of(dtype: str) -> tuple[str, ...]:
    """The steps that make sense for a dtype: fp8 is for storing, and few chips multiply integer matrices."""
    if dtype.startswith("float8"):
        return STEPS[:3]
    return STEPS if dtype in _FLOATS else STEPS[:-1]


def dtype_step(device: str, dtype: str, step: str) -> tuple[bool, str, str]:
    """One step in one dtype; the first result that is not what it must be, in value or dtype, is told."""
    rows = {
        "allocate": _allocate,
        "copy": _copy,
        "cast": _cast,
        "calculate": _calculate,
        "compare": _compare,
        "reduce": _reduce,
        "multiply matrices": _multiply_matrices,
    }[step](device, dtype)
    for what, expected, result in rows:
        got = result.cpu().to(torch.float64).tolist() if result.dtype.is_floating_point else result.cpu().tolist()
        wanted = torch.bool if type(expected[0]) is bool else getattr(torch, dtype)
        if result.dtype != wanted and step != "cast":
            return True, f"{what} in {wanted}", f"{result.dtype}"
        if not _equal(got, expected, dtype):
            return True, f"{what} = {expected}", f"{got}"
    return False, f"{step} in {dtype}", f"{len(rows)} results, all right"


def _equal(got: list[Any], expected: list[Any], dtype: str) -> bool:
    if dtype not in _FLOATS or type(expected[0]) is bool:
        return got == expected
    spacing = 2.0 ** (1 - _FLOATS[dtype][0])
    return len(got) == len(expected) and all(
        abs(a - b) <= _SPACINGS * spacing * abs(b) for a, b in zip(got, expected, strict=True)
    )


def _on(device: str, dtype: str, *values: Any) -> torch.Tensor:
    wide = torch.float64 if dtype in _FLOATS else torch.int64
    return torch.tensor(values, dtype=wide).to(getattr(torch, dtype)).to(device)


def _allocate(device: str, dtype: str) -> list[Row]:
    made = getattr(torch, dtype)
    if dtype == "bool":
        return [("zeros", [False] * 3, torch.zeros(3, dtype=made, device=device))]
    number = 0.0 if dtype in _FLOATS else 0
    rows = [("zeros", [number] * 3, torch.zeros(3, dtype=made, device=device))]
    if not dtype.startswith("float8"):
        rows.append(("full of 3", [number + 3] * 3, torch.full((3,), 3, dtype=made, device=device)))
    return rows


def _copy(device: str, dtype: str) -> list[Row]:
    """Any bytes there and back; shown as the bytes."""
    generator = torch.Generator().manual_seed(0)
    top = 2 if dtype == "bool" else 256
    data = torch.randint(0, top, (4096,), dtype=torch.uint8, generator=generator).view(getattr(torch, dtype))
    back = data.to(device).cpu()
    right = back.dtype == data.dtype and torch.equal(back.view(torch.uint8), data.view(torch.uint8))
    return [("the same bytes after a copy there and back", [True], torch.tensor([right]))]


def _cast(device: str, dtype: str) -> list[Row]:
    made = getattr(torch, dtype)
    if dtype == "bool":
        return [("0, 3, -1 as bool", [False, True, True], _on(device, "int64", 0, 3, -1).to(made))]
    if dtype == "float64":  # only integers can bring that many digits, and only they can show them
        large = 2**40 + 1
        wide = _on(device, "int64", large).to(made)
        return [(f"{large} as float64", [float(large)], wide), ("and back as int64", [large], wide.to(torch.int64))]
    if dtype in _FLOATS:
        _, step, large_number = _FLOATS[dtype]
        values = [1.0 + step, -1.0, large_number]
        cast = _on(device, "float32", *values).to(made)
        return [(f"{values} as {dtype}", values, cast), ("and back as float32", values, cast.to(torch.float32))]
    number = _INTEGERS[dtype]
    cast = _on(device, "int64", number, 7).to(made)
    return [(f"{number}, 7 as {dtype}", [number, 7], cast), ("and back as int64", [number, 7], cast.to(torch.int64))]


def _calculate(device: str, dtype: str) -> list[Row]:
    if dtype == "bool":
        some, other = _on(device, dtype, 0, 1, 1), _on(device, dtype, 1, 1, 0)
        return [("and", [False, True, False], some & other), ("not", [True, False, False], ~some)]
    if dtype in _INTEGERS:
        number = _INTEGERS[dtype]
        made, unit = _on(device, dtype, number), _on(device, dtype, 1)
        return [(f"{number} - 1", [number - 1], made - unit), (f"{number} * 1", [number], made * unit)]
    _, step, large = _FLOATS[dtype]
    one, small, greatest = _on(device, dtype, 1.0), _on(device, dtype, step), _on(device, dtype, large)
    return [
        (f"1 + {step}", [1.0 + step], one + small),
        (f"(1 + {step}) * 2", [2.0 + 2.0 * step], _on(device, dtype, 1.0 + step) * 2.0),
        (f"{large} * 0.5", [large * 0.5], greatest * 0.5),
        (f"1 / {large}", [1.0 / large], one / greatest),
    ]


def _compare(device: str, dtype: str) -> list[Row]:
    if dtype == "bool":
        return [("True == True", [True], _on(device, dtype, 1) == _on(device, dtype, 1))]
    if dtype in _INTEGERS:
        number = _INTEGERS[dtype]
        return [(f"{number} > {number - 1}", [True], _on(device, dtype, number) > _on(device, dtype, number - 1))]
    above = 1.0 + _FLOATS[dtype][1]
    return [(f"{above} > 1", [True], _on(device, dtype, above) > _on(device, dtype, 1.0))]


def _reduce(device: str, dtype: str) -> list[Row]:
    if dtype == "bool":
        return [("any of 0, 1", [True], _on(device, dtype, 0, 1).any().reshape(1))]
    if dtype in _INTEGERS:
        number = _INTEGERS[dtype]
        made = _on(device, dtype, 1, number - 1)
        summed = made.sum(dtype=getattr(torch, dtype)).reshape(1)
        return [
            (f"the sum of 1, {number - 1}", [number], summed),
            ("the greatest", [number - 1], made.max().reshape(1)),
        ]
    step = _FLOATS[dtype][1]
    made = _on(device, dtype, 1.0, step)
    return [
        (f"the sum of 1, {step}", [1.0 + step], made.sum().reshape(1)),
        (f"the mean of 1, {1 + 2 * step}", [1.0 + step], _on(device, dtype, 1.0, 1.0 + 2.0 * step).mean().reshape(1)),
        (f"the greatest of 1, {1 + step}", [1.0 + step], _on(device, dtype, 1.0, 1.0 + step).max().reshape(1)),
    ]


def _multiply_matrices(device: str, dtype: str) -> list[Row]:
    _, step, large = _FLOATS[dtype]
    left = _on(device, dtype, 1.0, step, 1.0 + step, 0.0, large, 0.0).view(3, 2)
    right = _on(device, dtype, 1.0, 1.0).view(2, 1)
    what = f"[[1, {step}], [{1 + step}, 0], [{large}, 0]] times [[1], [1]]"
    return [(what, [1.0 + step, 1.0 + step, large], (left @ right).reshape(3))]
