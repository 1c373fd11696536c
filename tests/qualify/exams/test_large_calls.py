"""Calls too large to be compared whole: faults that only a large size shows, and honest chips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from crosschip.chips.faults.variants import VARIANTS
from crosschip.qualify.exams.operators.large_calls import LARGEST_WHOLE
from crosschip.qualify.finding import ExamRecord
from crosschip.qualify.tracing.trace import Trace, TracedCall
from tests.qualify.exams.operator_faults import BF16, NORMAL, failures, tensor
from tests.qualify.planted import On

Examine = Callable[..., ExamRecord]

FAR = 1 << 17  # beyond all sizes that are compared whole, and of the lists' tensors beyond two
ROWS = LARGEST_WHOLE // 512 + 1


def adamw() -> tuple[list[Any], dict[str, Any]]:
    shapes = [(64,), (1100, 1000), (40, 30), (300,)]
    small = {"quantiles": [each * 1e-3 for each in NORMAL]}
    squares = {"quantiles": [1e-9 * (n + 1) for n in range(33)]}
    lists = [[tensor(*shape, **values) for shape in shapes] for values in ({}, small, small, squares)]
    steps = [{**tensor(constant=7.0), "host": True} for _ in shapes]
    settings = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-8, "amsgrad": False}
    return [*lists, [], steps], {**settings, "maximize": False}


CALLS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "aten.silu.default": ([tensor(ROWS, 512)], {}),
    "aten.mul.Tensor": ([tensor(ROWS, 512, **BF16), tensor(512, **BF16)], {}),
    "aten._log_softmax.default": ([tensor(512, ROWS), 0, False], {}),
    "aten._fused_adamw_.default": adamw(),
}


def trace_of(*operators: str) -> Trace:
    calls = [TracedCall(f"c{n}", each, *CALLS[each], [], 1, 0.01, ["forward"]) for n, each in enumerate(operators)]
    return Trace("made by hand", "train", "float32", calls)


def wrong_far_out(result: Tensor) -> Tensor:
    result.view(-1)[FAR:].mul_(0.99)
    return result


class FarParameters:
    """The optimizer loses a hundredth of each parameter beyond a place."""

    name = "far parameters"

    def operator(self, op: Any, args: Any, kwargs: Any, compute: Callable[..., Any]) -> Any:
        result = compute(*args, **kwargs)
        for each in args[0] if "_fused_adamw" in str(op) else ():
            wrong_far_out(each)
        return result


@pytest.mark.parametrize(
    ("operator", "fault"),
    [
        ("aten.silu.default", On("silu", wrong_far_out)),
        ("aten.mul.Tensor", On("mul", wrong_far_out)),
        ("aten._log_softmax.default", On("_log_softmax", wrong_far_out)),
        ("aten._fused_adamw_.default", FarParameters()),
    ],
)
def test_what_is_wrong_far_out_only_is_found(examine_on: Examine, operator: str, fault: Any) -> None:
    record = examine_on("operators", fault, trace=trace_of(operator))
    (failure,) = failures(record)
    assert failure.startswith(operator)
    (finding,) = [each for each in record.findings if each.verdict == "FAIL"]
    assert finding.details["inputs"] == "as recorded"
    assert finding.reproducer is not None


def test_a_single_number_far_out_is_found(examine_on: Examine) -> None:
    def one_wrong(result: Tensor) -> Tensor:
        if result.numel() > LARGEST_WHOLE:
            result.view(-1)[LARGEST_WHOLE - 12345] += 0.01
        return result

    assert failures(examine_on("operators", On("silu", one_wrong), trace=trace_of("aten.silu.default")))


@pytest.mark.parametrize("variant", [None, *VARIANTS])
def test_no_honest_chip_fails(examine_on: Examine, variant: str | None) -> None:
    planted = None if variant is None else VARIANTS[variant]()
    record = examine_on("operators", planted, trace=trace_of(*CALLS), budget_s=120.0)
    assert failures(record) == []
    assert [each for each in record.not_covered if "too large" in each] == []


def test_what_cannot_be_judged_in_parts_is_said(examine_on: Examine) -> None:
    call = TracedCall("c0", "aten.sum.default", [tensor(LARGEST_WHOLE + 1)], {}, [], 1, 0.01, ["forward"])
    one_off = On("sum", lambda result: torch.nextafter(result, result * 2) if result.dim() == 0 else result)
    record = examine_on("operators", one_off, trace=Trace("made by hand", "train", "float32", [call]))
    assert any("too large to be judged whole" in each for each in record.not_covered)
