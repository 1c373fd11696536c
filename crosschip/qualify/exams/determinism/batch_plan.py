"""Which of the subject's calls have rows that must not depend on their batch, and in which form they are examined."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from crosschip.qualify.finding import Tier
from crosschip.qualify.tracing.trace import Trace, TracedCall, tensor_specs

__all__ = ["BatchedCall", "batched_calls"]

# The plain form, the arguments that hold the batch in their first dimension, and how many arguments the form takes.
_OPERATORS: dict[str, tuple[str, tuple[int, ...], int]] = {
    "mm": ("aten.mm.default", (0,), 2),
    "addmm": ("aten.addmm.default", (1,), 3),
    "bmm": ("aten.bmm.default", (0, 1), 2),
    "linear": ("aten.linear.default", (0,), 3),
    "scaled_dot_product_attention": ("aten.scaled_dot_product_attention.default", (0, 1, 2), 6),
    "_softmax": ("aten._softmax.default", (0,), 3),
    "_log_softmax": ("aten._log_softmax.default", (0,), 3),
    "_fused_rms_norm": ("aten._fused_rms_norm.default", (0,), 4),
    "native_layer_norm": ("aten.native_layer_norm.default", (0,), 5),
    "mean": ("aten.mean.dim", (0,), 3),
    "sum": ("aten.sum.dim_IntList", (0,), 3),
    "linalg_vector_norm": ("aten.linalg_vector_norm.default", (0,), 4),
}
_REDUCED_AT = {"_softmax": 1, "_log_softmax": 1, "mean": 1, "sum": 1, "linalg_vector_norm": 2}
_MOST_ROWS = {"smoke": 256, "standard": 4096, "soak": 4096}
_CALLS_EACH = {"smoke": 2, "standard": 6, "soak": 6}
_MOST_ELEMENTS = 1 << 20
_PHASES = ("backward", "optimizer")


@dataclass(frozen=True)
class BatchedCall:
    """A traced call in its plain form; `sliced` names the arguments whose first dimension is the batch."""

    title: str
    name: str
    operator: str
    args: list[Any]
    kwargs: dict[str, Any]
    sliced: tuple[int, ...]


def batched_calls(trace: Trace, tier: Tier) -> Iterator[BatchedCall]:
    """For each operator the calls of the forward pass with the largest share of time, of different inner sizes."""
    found: dict[str, dict[Any, BatchedCall]] = {}
    for call in sorted(trace.calls, key=lambda call: -call.time_s):
        if call.phases and set(call.phases) <= set(_PHASES):
            continue
        batched = _batched(call, _MOST_ROWS[tier])
        if batched is not None:
            inner = str([spec["shape"][1:] for spec in tensor_specs(batched.args)])
            kept = found.setdefault(batched.name, {})
            if len(kept) < _CALLS_EACH[tier]:
                kept.setdefault(inner, batched)
    for place in range(_CALLS_EACH[tier]):
        for kept in found.values():
            yield from list(kept.values())[place : place + 1]


def _batched(call: TracedCall, most_rows: int) -> BatchedCall | None:
    name = call.operator.split(".")[1]
    if not call.operator.startswith("aten.") or name not in _OPERATORS:
        return None
    operator, sliced, most_args = _OPERATORS[name]
    args = list(call.args[:most_args])
    kwargs = {key: value for key, value in call.kwargs.items() if key != "out"}
    if not all(place < len(args) and isinstance(args[place], dict) and "tensor" in args[place] for place in sliced):
        return None
    sizes = {args[place]["tensor"]["shape"][0] for place in sliced if args[place]["tensor"]["shape"]}
    if len(sizes) != 1 or (rows := sizes.pop()) < 2 or _reduces_rows(name, args):
        return None
    if name == "scaled_dot_product_attention" and len(args) > 3 and args[3] is not None:
        return None  # a mask may hold the batch or not; attention's own exam has masks
    each_row = math.prod(args[sliced[0]]["tensor"]["shape"][1:])
    rows = max(2, min(rows, most_rows, _MOST_ELEMENTS // max(1, each_row)))
    args = [_with_rows(value, rows) if place in sliced else value for place, value in enumerate(args)]
    return BatchedCall(call.title, name, operator, args, kwargs, sliced)


def _reduces_rows(name: str, args: list[Any]) -> bool:
    """Whether the call reduces over its first dimension, so that rows are not independent."""
    place = _REDUCED_AT.get(name)
    if place is None:
        return False
    num_dims = len(args[0]["tensor"]["shape"])
    dims = args[place] if place < len(args) else None
    if dims is None or dims == []:
        return True
    return 0 in [dim % num_dims for dim in (dims if isinstance(dims, list) else [dims])]


def _with_rows(value: dict[str, Any], rows: int) -> dict[str, Any]:
    """The tensor cut to its first rows; its strides stay."""
    spec = value["tensor"]
    values = {key: each for key, each in spec["values"].items() if key != "literal"}
    return {**value, "tensor": {**spec, "shape": [rows, *spec["shape"][1:]], "values": values}}
