"""The trace in the terminal, from a document alone."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from rich.console import Console

from crosschip.report.trace_table import print_trace, trace_rows


def tensor(shape: list[int], dtype: str = "float32", **values: Any) -> dict[str, Any]:
    stride = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
    spec: dict[str, Any] = {"shape": shape, "stride": stride, "dtype": dtype}
    return {"tensor": {**spec, "values": values} if values else spec}


def quantiles(least: float, greatest: float, **shares: float) -> dict[str, Any]:
    return {"quantiles": [least, *[0.0] * 31, greatest], **shares}


def call(operator: str, args: list[Any], count: int, time_s: float, phases: list[str]) -> dict[str, Any]:
    outputs = [tensor([2, 2])]
    return {
        "id": "c",
        "operator": operator,
        "args": args,
        "kwargs": {},
        "outputs": outputs,
        "count": count,
        "time_s": time_s,
        "phases": phases,
    }


TRACE = {
    "schema_version": 1,
    "subject": "first",
    "role": "train",
    "compute_dtype": "bfloat16",
    "notes": ["a train step has 2 x 4 tokens instead of 32 x 4"],
    "calls": [
        call("aten.view.default", [tensor([8])], 9, 0.0, ["forward"]),
        call(
            "aten.mm.default",
            [tensor([8, 4], "bfloat16", **quantiles(-2.0, 3.0)), tensor([4, 2], "bfloat16", **quantiles(-1.0, 1.0))],
            3,
            0.06,
            ["forward"],
        ),
        call("aten.mm.default", [tensor([2, 2], **quantiles(0.5, 7.0, zero=0.1))], 2, 0.02, ["forward", "backward"]),
        call("aten.embedding.default", [tensor([5], "int64", low=0, high=511, unique=False)], 1, 0.02, ["forward"]),
        call("aten._softmax_backward_data_of_a_very_long_name_indeed.default", [[tensor([64] * 4)] * 9], 1, 1e-9, []),
    ],
}


def printed(width: int = 100) -> str:
    output = io.StringIO()
    print_trace(TRACE, Console(file=output, width=width, highlight=False))
    return output.getvalue()


def test_calls_of_an_operator_are_one_row_with_the_longest_time_first() -> None:
    rows = trace_rows(TRACE)
    assert [row.operator for row in rows][:2] == ["aten.mm.default", "aten.embedding.default"]
    product = rows[0]
    assert (product.num_calls, product.num_kinds, product.phases) == (5, 2, ["forward", "backward"])
    assert product.dtypes == ["bfloat16", "float32"]
    assert product.ranges == {True: (-2.0, 7.0)}
    assert rows[1].ranges == {False: (0, 511)}


def test_the_table_tells_counts_shares_shapes_values_and_totals() -> None:
    text = printed()
    line = next(line for line in text.splitlines() if line.startswith("mm "))
    assert line.split() == ["mm", "5", "2", "80.0", "%", "8x4", "4x2", "bf16", "f32", "-2", "to", "7", "fwd", "bwd"]
    assert next(line for line in text.splitlines() if line.startswith("view ")).split()[3] == "view"
    assert "first, one train step in bfloat16" in text
    assert "note: a train step has 2 x 4 tokens instead of 32 x 4" in text
    assert (
        text.splitlines()[-1]
        == "4 operators, 5 kinds of calls, 16 calls, 0.1 s on the recording CPU; ~ has strides of its own"
    )


def test_the_largest_call_is_shown_with_strides_of_its_own_and_scalars() -> None:
    transposed = {"tensor": {"shape": [8, 4], "stride": [1, 8], "dtype": "float32"}}
    one = call("aten.sum.dim_IntList", [transposed, [-1], True], 1, 1.0, [])
    (row,) = trace_rows({**TRACE, "calls": [one | {"kwargs": {"eps": 1e-6, "dtype": "torch.float32"}}]})
    assert row.largest == "8x4~ [-1] True eps=1e-06"


@pytest.mark.parametrize("width", [80, 100])
def test_all_columns_fit_a_usual_terminal(width: int) -> None:
    line = next(line for line in printed(width).splitlines() if line.startswith("operator"))
    assert line.split() == ["operator", "calls", "kinds", "time", "largest", "call", "dtypes", "values", "phase"]


def test_it_fits_a_hundred_columns_however_wide_the_terminal_is() -> None:
    for width in (100, 240):
        assert max(len(line.rstrip()) for line in printed(width).splitlines()) <= 100


def test_a_trace_without_calls_is_printed_as_well() -> None:
    output = io.StringIO()
    print_trace({**TRACE, "calls": [], "notes": []}, Console(file=output, width=100))
    assert "0 operators" in output.getvalue()
