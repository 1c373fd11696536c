"""A subject's trace in the terminal: its operators with counts, share of time, dtypes, values and phases.

Of each operator the largest kind of call is shown: shapes, whether strides are those of the shape, and scalars. The
document has all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["print_trace", "trace_rows"]

_WIDTH = 100
_OPERATOR_WIDTH = 19
_CALL_WIDTH = 14
_PHASES = {
    "forward": "fwd",
    "backward": "bwd",
    "optimizer": "opt",
    "prefill": "pre",
    "decode": "dec",
    "sampling": "smp",
}
_SHORT = {"float32": "f32", "float64": "f64", "bfloat16": "bf16", "float16": "f16", "int64": "i64", "int32": "i32"}


@dataclass
class _Row:
    """All calls of one operator."""

    operator: str
    num_calls: int = 0
    num_kinds: int = 0
    time_s: float = 0.0
    largest: str = ""
    largest_size: int = -1
    dtypes: list[str] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)
    ranges: dict[bool, tuple[float, float]] = field(default_factory=dict)  # of floating-point values, of integers


def print_trace(trace: dict[str, Any], console: Console | None = None) -> None:
    """Print a trace document, at most 100 columns wide, the operators that take longest first."""
    console = console or Console(highlight=False)
    width = min(_WIDTH, console.width)
    console.print(
        f"{escape(trace['subject'])}, one {'train' if trace['role'] == 'train' else 'serving'} step in "
        f"{trace['compute_dtype']}",
        width=width,
    )
    for note in trace.get("notes", []):
        console.print(f"note: {escape(note)}", width=width)
    rows = trace_rows(trace)
    total_s = sum(row.time_s for row in rows)
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    table.add_column("operator", no_wrap=True, max_width=_OPERATOR_WIDTH)
    for heading in ("calls", "kinds", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("largest call", min_width=_CALL_WIDTH)
    for heading in ("dtypes", "values", "phase"):
        table.add_column(heading, min_width=len(heading))
    for row in rows:
        table.add_row(*_cells(row, total_s))
    console.print(table, width=width)
    console.print(
        f"{len(rows)} operators, {sum(row.num_kinds for row in rows)} kinds of calls, "
        f"{sum(row.num_calls for row in rows)} calls, {total_s:.3g} s on the recording CPU; ~ has strides of its own",
        width=width,
    )


def trace_rows(trace: dict[str, Any]) -> list[_Row]:
    """The calls of a trace document by operator, the longest time first."""
    rows: dict[str, _Row] = {}
    for call in trace["calls"]:
        row = rows.setdefault(call["operator"], _Row(call["operator"]))
        row.num_calls += call["count"]
        row.num_kinds += 1
        row.time_s += call["time_s"]
        row.phases += [phase for phase in call["phases"] if phase not in row.phases]
        specs = list(_specs([call["args"], call["kwargs"]]))
        size = sum(math.prod(spec["shape"]) for spec in specs)
        if size > row.largest_size:
            row.largest_size, row.largest = size, " ".join([_shapes(specs), *_scalars(call)]).strip()
        for spec in specs or list(_specs(call["outputs"])):
            _take(row, spec)
    return sorted(rows.values(), key=lambda row: (-row.time_s, row.operator))


def _take(row: _Row, spec: dict[str, Any]) -> None:
    if spec["dtype"] not in row.dtypes:
        row.dtypes.append(spec["dtype"])
    values = spec.get("values", {})
    if not math.prod(spec["shape"]) or not {"quantiles", "low"} & set(values):
        return
    is_float = "quantiles" in values
    ends = [values["quantiles"][0], values["quantiles"][-1]] if is_float else [values["low"], values["high"]]
    if values.get("zero", 0.0) > 0.0:
        ends.append(0.0)
    ends += row.ranges.get(is_float, ())
    row.ranges[is_float] = min(ends), max(ends)


def _cells(row: _Row, total_s: float) -> list[str]:
    share = f"{100 * row.time_s / total_s:.1f} %" if row.time_s and total_s else "view" if not row.time_s else ""
    ends = row.ranges.get(True, row.ranges.get(False))
    values = f"{ends[0]:.2g} to {ends[1]:.2g}" if ends else ""
    phases = " ".join(_PHASES.get(phase, phase) for phase in row.phases)
    dtypes = " ".join(_SHORT.get(dtype, dtype) for dtype in row.dtypes)
    name = row.operator.removeprefix("aten.").removesuffix(".default")
    cells = [name, str(row.num_calls), str(row.num_kinds), share, row.largest, dtypes, values, phases]
    return [escape(cell) for cell in cells]


def _shapes(specs: list[dict[str, Any]]) -> str:
    shown = [_shape(spec) for spec in specs[:2]]
    return " ".join(shown) + (f" +{len(specs) - 2}" if len(specs) > 2 else "")


def _shape(spec: dict[str, Any]) -> str:
    """`4x8`, and `4x8~` where the strides do not follow from the shape."""
    usual, step = [], 1
    for size in reversed(spec["shape"]):
        usual.append(step)
        step *= max(size, 1)
    sizes = "x".join(map(str, spec["shape"])) or "1"
    strides = spec.get("stride")
    is_usual = strides is None or all(
        size <= 1 or stride == wanted
        for size, stride, wanted in zip(spec["shape"], strides, reversed(usual), strict=True)
    )
    return sizes if is_usual else f"{sizes}~"


def _scalars(call: dict[str, Any]) -> list[str]:
    """Numbers and flags among the arguments, as `-1`, `[0, 2]` and `eps=1e-06`."""
    positional = [str(each) for each in call["args"] if _is_scalar(each)]
    return positional + [f"{name}={each}" for name, each in call["kwargs"].items() if _is_scalar(each)]


def _is_scalar(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(_is_scalar(each) for each in value)
    return isinstance(value, bool | int | float)


def _specs(value: Any) -> Iterator[dict[str, Any]]:
    """The tensor specs inside an encoded value."""
    if isinstance(value, dict):
        if "tensor" in value:
            yield value["tensor"]
        else:
            for each in value.values():
                yield from _specs(each)
    elif isinstance(value, list):
        for each in value:
            yield from _specs(each)
