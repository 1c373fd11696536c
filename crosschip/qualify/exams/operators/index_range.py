"""Calls that read or write places by an index, with indices up to the last place. No torch.

A subject may never have called its last row while it was recorded, and one that is cut to fewer rows has indices that
are out of range.
"""

from __future__ import annotations

import math
from typing import Any

from crosschip.qualify.exams.operators.shapes import GRADIENT_OF, Encoded, base_name

__all__ = ["to_the_last_place"]

_ALONG_DIM = (
    *("index_select", "gather", "scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill"),
)


def to_the_last_place(operator: str, encoded: Encoded) -> Encoded | None:
    """The call with indices from the first to the last place that there is; None where it has no index."""
    args, kwargs = encoded
    first = 1 if operator.startswith(GRADIENT_OF) else 0  # a gradient's first argument is that of the output
    changed = _changed(base_name(operator), args[first:])
    return None if changed is None else ([*args[:first], *changed], kwargs)


def _changed(base: str, args: list[Any]) -> list[Any] | None:
    if base in _ALONG_DIM and len(args) > 2 and isinstance(args[1], int) and _is_index(args[2]):
        shape = args[0]["tensor"]["shape"]
        return [*args[:2], _over(args[2], shape[args[1]]), *args[3:]] if shape else None
    if base == "embedding" and len(args) > 1 and _is_index(args[1]):
        return [args[0], _over(args[1], args[0]["tensor"]["shape"][0]), *args[2:]]
    if base == "embedding_dense_backward" and len(args) > 2 and _is_index(args[1]):
        return [args[0], _over(args[1], args[2]), *args[2:]]
    if base in ("index", "index_put") and all(each is None or _is_index(each) for each in args[1]):
        sizes = args[0]["tensor"]["shape"]
        indices = [each and _over(each, size) for each, size in zip(args[1], sizes, strict=False)]
        return [args[0], indices, *args[2:]]
    return None


def _is_index(value: Any) -> bool:
    return isinstance(value, dict) and value.get("tensor", {}).get("dtype") in ("int64", "int32")


def _over(index: dict[str, Any], size: int) -> dict[str, Any]:
    """Indices below `size`, the last one among them; different ones stay different as far as there are so many."""
    spec = index["tensor"]
    count, last = math.prod(spec["shape"]), max(0, size - 1)
    is_unique = bool(spec["values"].get("unique")) and count <= size
    low = size - count if is_unique else last if count == 1 else 0
    values = {
        "low": max(0, low),
        "high": last,
        "unique": is_unique,
        "ascending": spec["values"].get("ascending", False),
    }
    return {**index, "tensor": {**spec, "values": values}}
