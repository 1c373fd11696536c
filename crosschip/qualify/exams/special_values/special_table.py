"""The table of special values: which functions are called on which of them. No torch.

Each entry is the parameters of `special_case`. A number that means another thing in each dtype, such as its largest, is
worked out here from the dtype's exponents.
"""

from __future__ import annotations

import itertools
from math import inf, nan
from typing import Any

__all__ = ["FAMILIES", "special_parameters"]

FAMILIES = ("one number", "two numbers", "casts", "reductions", "matrix products")

# For each dtype its largest number and its smallest normal one.
_RANGES = {
    "float64": (2.0**1023 * (2.0 - 2.0**-52), 2.0**-1022),
    "float32": (2.0**127 * (2.0 - 2.0**-23), 2.0**-126),
    "bfloat16": (2.0**127 * (2.0 - 2.0**-7), 2.0**-126),
    "float16": (65504.0, 2.0**-14),
}

_UNARY = (
    *("exp", "expm1", "log", "log1p", "log2", "sqrt", "rsqrt", "reciprocal", "neg", "abs", "square", "erf", "sigmoid"),
    *("tanh", "isnan", "isinf", "isfinite", "sign"),
)
_ACTIVATIONS = ("relu", "silu", "gelu", "softplus", "logsigmoid", "leaky_relu")
_BINARY = ("add", "sub", "mul", "div", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge")

_ROW = 70  # more than a vector of any width, and no multiple of one

Parameters = dict[str, Any]


def special_parameters(family: str, dtype: str) -> list[Parameters]:
    """The entries of one family in one dtype, each with `function`, `dtype`, `inputs` and `options`."""
    made = {
        "one number": _one_number,
        "two numbers": _two_numbers,
        "casts": _casts,
        "reductions": _reductions,
        "matrix products": _matrix_products,
    }[family](dtype)
    return [{"function": name, "dtype": dtype, "inputs": inputs, "options": options} for name, inputs, options in made]


_Entry = tuple[str, list[Any], dict[str, Any]]


def _one_number(dtype: str) -> list[_Entry]:
    largest, smallest = _RANGES[dtype]
    sizes = [0.0, smallest / 4, smallest, 2.0**-10, 0.5, 1.0, 3.0, 30.0, 100.0, 1000.0, largest / 4, largest, inf]
    values = [*sizes, *(-size for size in sizes), nan]
    entries: list[_Entry] = [(f"torch.{name}", [values], {}) for name in _UNARY]
    entries += [(f"torch.nn.functional.{name}", [values], {}) for name in _ACTIVATIONS]
    entries += [
        ("torch.nn.functional.gelu", [values], {"approximate": "tanh"}),
        ("torch.clamp", [values], {"min": -1.0, "max": 1.0}),
        ("torch.clamp", [values], {"max": 0.0}),
        ("torch.nan_to_num", [values], {"nan": 7.0, "posinf": 8.0, "neginf": -8.0}),
        ("torch.sin", [[0.5, inf, -inf, nan]], {}),
        ("torch.cos", [[0.5, inf, -inf, nan]], {}),
        ("torch.pow", [[largest, -largest, 2.0, inf, nan]], {"exponent": 2}),
    ]
    return entries


def _two_numbers(dtype: str) -> list[_Entry]:
    largest, smallest = _RANGES[dtype]
    values = [0.0, 1.0, -2.0, 0.5, smallest, largest, -largest, inf, -inf, nan]
    pairs = list(itertools.product([*values, -0.0], values))
    left, right = [list(each) for each in zip(*pairs, strict=True)]
    # A chip may divide by multiplying with the reciprocal, which for the largest numbers is subnormal.
    divided = [(a, b) for a, b in pairs if abs(b) != largest]
    entries: list[_Entry] = [(f"torch.{name}", [left, right], {}) for name in _BINARY if name != "div"]
    entries += [
        ("torch.div", [list(each) for each in zip(*divided, strict=True)], {}),
        ("where", [left, right, left], {}),
        # Powers whose result every way of computing them shares.
        ("torch.pow", [[2.0, 2.0, 0.0, -1.0, nan, inf, inf, -8.0], [1e4, -1e4, -1.0, 0.5, 2.0, 2.0, -1.0, 0.5]], {}),
        ("torch.addcmul", [[1.0, 1.0, nan, 1.0], [largest, inf, 1.0, nan], [largest, 0.0, 1.0, 1.0]], {"value": 1.0}),
        ("torch.addcdiv", [[1.0, 1.0, nan, 1.0], [1.0, 0.0, 1.0, -1.0], [0.0, 0.0, 1.0, 0.0]], {"value": 1.0}),
        ("torch.lerp", [[nan, 0.0, inf], [1.0, inf, inf]], {"weight": 0.5}),
    ]
    return entries


def _casts(dtype: str) -> list[_Entry]:
    largest, smallest = _RANGES[dtype]
    values = [0.0, 1.0, smallest, 2.0**-20, 1e5, -1e5, largest / 4, -largest, inf, -inf, nan]
    others = [other for other in _RANGES if other != dtype and "float64" not in (other, dtype)]
    return [("cast", [values], {"to": other}) for other in others]


def _row(value: float, *specials: tuple[int, float]) -> list[float]:
    """A row of ascending small numbers, or of one value, with specials in some places."""
    made = [value] * _ROW if value == -inf else [value + place / 64 for place in range(_ROW)]
    for place, special in specials:
        made[place] = special
    return made


def _reductions(dtype: str) -> list[_Entry]:
    largest, smallest = _RANGES[dtype]
    last = _ROW - 1
    even = [[each] * _ROW for each in (smallest / 4, -smallest / 4, -0.0)]
    rows = [_row(0.5), *(_row(0.5, (place, special)) for place in (0, 33, last) for special in (nan, inf, -inf))]
    rows += [_row(-inf), _row(0.5, (3, inf), (66, -inf)), _row(-inf, (40, 1.0)), _row(0.5, (3, nan), (66, inf))]
    overflowing = [_row(0.5, (2, largest), (last, largest)), _row(-0.5, (2, -largest), (last, -largest))]
    dim = {"dim": -1}
    entries: list[_Entry] = [
        (f"torch.{name}", [[*rows, *overflowing, *even]], dim)
        for name in ("sum", "mean", "amax", "amin", "cumsum", "softmax")
    ]
    entries += [
        (f"torch.{name}", [[*rows, *even]], dim)
        for name in ("max", "min", "logsumexp", "log_softmax", "linalg.vector_norm", "prod")
    ]
    entries += [
        ("torch.argmax", [[row for row in rows if nan not in row]], dim),
        ("torch.var", [rows], dim),
        ("torch.nn.functional.layer_norm", [[*rows, *even]], {"normalized_shape": [_ROW]}),
        ("torch.nn.functional.rms_norm", [[*rows, *even]], {"normalized_shape": [_ROW]}),
        ("torch.sum", [rows[0]], {}),
        ("torch.sum", [_row(0.5, (33, nan))], {}),
        ("torch.max", [_row(0.5, (33, nan))], {}),
        ("torch.mean", [_row(0.5, (33, inf))], {}),
    ]
    return entries


def _matrix_products(dtype: str) -> list[_Entry]:
    """Each row of the left factor is a case; the right one is all ones but for a zero that meets the infinities."""
    largest, smallest = _RANGES[dtype]
    left = [
        _row(0.5),
        _row(0.5, (20, nan)),
        _row(0.5, (20, inf)),
        _row(0.5, (21, -inf)),
        _row(0.5, (20, inf), (40, -inf)),
        _row(0.5, (2, largest), (60, largest)),
        _row(-0.5, (2, -largest), (60, -largest)),
        *([each] * _ROW for each in (smallest / 4, -smallest / 4, -0.0)),
    ]
    ones = [[1.0] * 5 for _ in range(_ROW)]
    with_zero = [[0.0 if (row, column) == (20, 3) else 1.0 for column in range(5)] for row in range(_ROW)]
    with_nan = [[nan if (row, column) == (50, 1) else 1.0 for column in range(5)] for row in range(_ROW)]
    across = [list(column) for column in zip(*with_zero, strict=True)]
    return [
        ("torch.mm", [left, with_zero], {}),
        ("torch.mm", [left, with_nan], {}),
        ("torch.mm", [ones, [[largest] * 3] * 5], {}),
        ("torch.bmm", [[left, left], [with_zero, with_nan]], {}),
        ("torch.addmm", [[0.0, inf, nan, 1.0, -1.0], left[:4], ones], {}),
        ("torch.nn.functional.linear", [left, across], {}),
        ("torch.mv", [left, [1.0] * _ROW], {}),
    ]
