"""Which of an operator's calls the exam of the operators reaches: dtypes, the last places, the little time there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from crosschip.qualify.exams.operators import case
from crosschip.qualify.exams.operators.index_range import to_the_last_place
from crosschip.qualify.finding import ExamRecord
from crosschip.qualify.tracing.inputs import make_arguments, operator_named
from crosschip.qualify.tracing.trace import Trace, TracedCall
from tests.qualify.exams.operator_faults import BF16, indices, tensor
from tests.qualify.planted import On

Examine = Callable[..., ExamRecord]

LAST_OF_41 = {"low": 0, "high": 34, "unique": True}  # as recorded, of 41 places
TABLE = tensor(41, 16)

INDEXED: dict[str, list[Any]] = {
    "aten.index_select.default": [TABLE, 0, tensor(35, dtype="int64", **LAST_OF_41)],
    "aten.embedding.default": [TABLE, indices(6, 10, high=30)],
    "aten.gather.default": [tensor(5, 41), 1, indices(5, 3, high=30)],
    "aten.index.Tensor": [TABLE, [None, indices(9, high=11)]],
    "aten.index_put_.default": [TABLE, [indices(1, high=3)], tensor(16)],
    "aten.index_copy_.default": [TABLE, 0, tensor(35, dtype="int64", **LAST_OF_41), tensor(35, 16)],
    "aten.scatter_add.default": [tensor(5, 41), 1, indices(5, 3, high=30), tensor(5, 3)],
    "aten.embedding_dense_backward.default": [tensor(6, 10, 16), indices(6, 10, high=30), 41, -1, False],
}


def trace_of(*calls: tuple[str, list[Any]]) -> Trace:
    traced = [
        TracedCall(f"c{n}", name, args, {}, [], 1, 0.01 / (n + 1), ["forward"]) for n, (name, args) in enumerate(calls)
    ]
    return Trace("made by hand", "train", "float32", traced)


def failures(record: ExamRecord) -> list[str]:
    return [finding.check for finding in record.findings if finding.verdict == "FAIL"]


class RefusesTheLastPlace:
    """An index beyond what is allowed by one place is read as the first one."""

    name = "the last place is read as the first"

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Callable[..., Any]) -> Any:
        if op._schema.name != "aten::index_select":
            return compute(*args, **kwargs)
        table, dim, index = args
        return compute(table, dim, torch.where(index == table.shape[dim] - 1, 0, index))


def test_an_index_reaches_the_last_place_that_the_subject_has_not_used(examine_on: Examine) -> None:
    trace = trace_of(("aten.index_select.default", INDEXED["aten.index_select.default"]))
    assert examine_on("operators", trace=trace).verdict == "PASS"
    assert failures(examine_on("operators", RefusesTheLastPlace(), trace=trace)) == ["exact results"]


@pytest.mark.parametrize("name", INDEXED)
def test_calls_with_indices_up_to_the_last_place(name: str) -> None:
    def highest(args: Any) -> int:
        made, _ = make_arguments(args, {}, 0, "cpu")
        operator_named(name)(*made)  # it is a valid call
        flat = [each for value in made for each in (value if isinstance(value, list) else [value])]
        return max(int(each.max()) for each in flat if isinstance(each, torch.Tensor) and each.dtype == torch.int64)

    size = 16 if name == "aten.index.Tensor" else 41
    assert highest(INDEXED[name]) < size - 1
    reaching = to_the_last_place(name, (INDEXED[name], {}))
    assert reaching is not None
    assert highest(reaching[0]) == size - 1


def test_there_are_none_without_an_index() -> None:
    assert to_the_last_place("aten.mul.Tensor", ([TABLE, TABLE], {})) is None
    assert to_the_last_place("aten.index.Tensor", ([TABLE, [tensor(41, dtype="bool", true=0.5)]], {})) is None


def test_another_dtype_of_an_operator_is_examined_as_thoroughly(examine_on: Examine) -> None:
    """Seldom wrong, and in fp32 alone: only repetitions show it, which an operator's further calls do not get."""

    def now_and_then(result: torch.Tensor) -> torch.Tensor:
        if result.dtype != torch.float32 or fault.count % 2:
            return result
        return torch.nextafter(result, torch.tensor(torch.inf))

    fault = On("silu", change=now_and_then)
    calls = [("aten.silu.default", [tensor(30, 20, **BF16)]), ("aten.silu.default", [tensor(30, 20)])]
    assert failures(examine_on("operators", fault, trace=trace_of(*calls))) == ["repetition"]


def test_a_call_that_takes_long_as_it_is_gets_a_few_smaller_ones(
    examine_on: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(case, "_LONGEST_S", {"smoke": 0.0})
    trace = trace_of(("aten.mm.default", [tensor(50, 256), tensor(256, 40)]))
    fault = On("mm", change=lambda result: result * 1.01)
    assert failures(examine_on("operators", fault, trace=trace)) == ["outliers"]
