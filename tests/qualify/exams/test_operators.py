"""The exam of the operators, with one fault or one honest peculiarity planted at a time."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crosschip.chips.faults.variants import VARIANTS
from crosschip.qualify.finding import ExamRecord
from crosschip.qualify.tracing.trace import Trace, TracedCall
from tests.qualify.exams.operator_faults import (
    BF16_CALLS,
    BF16_FAULTS,
    CALLS,
    FAULTS,
    failures,
    indices,
    tensor,
    trace_of,
)
from tests.qualify.planted import On

Examine = Callable[..., ExamRecord]


def found(examine_on: Examine, operator: str, fault: On, calls: Any) -> ExamRecord:
    fault.count = 0
    record = examine_on("operators", fault, trace=trace_of(operator, calls), budget_s=60.0)
    assert fault.count, "the fault was never reached"
    return record


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_the_operator_named(examine_on: Examine, name: str) -> None:
    operator, fault = FAULTS[name]
    record = found(examine_on, operator, fault, CALLS)
    assert len(failures(record)) == 1, record.findings
    assert failures(record)[0].startswith(operator)


def test_wrong_rows_of_a_table_are_found_though_it_is_too_large_to_be_judged(examine_on: Examine) -> None:
    def other_far_rows(args: Any) -> Tensor:
        table, ids = args[:2]
        return table[ids.clamp(max=1 << 16)]

    operator = "aten.embedding.default"
    calls = {operator: ([tensor(70_000, 64), indices(64, 16, high=69_999)], {})}
    record = found(examine_on, operator, On("embedding", before=other_far_rows), calls)
    assert len(failures(record)) == 1, record.findings
    assert failures(examine_on("operators", trace=trace_of(operator, calls), budget_s=60.0)) == []


@pytest.mark.parametrize("name", BF16_FAULTS)
def test_a_fault_is_found_in_bf16(examine_on: Examine, name: str) -> None:
    operator, fault = BF16_FAULTS[name]
    record = found(examine_on, operator, fault, BF16_CALLS)
    assert len(failures(record)) == 1, record.findings
    assert failures(record)[0].startswith(operator)


def trace_of_all() -> Trace:
    calls = [
        TracedCall(f"c{number}", operator, args, kwargs, [], 1, 0.01, ["forward"])
        for number, (operator, (args, kwargs)) in enumerate([*CALLS.items(), *BF16_CALLS.items()])
    ]
    return Trace("made by hand", "train", "float32", calls)


@pytest.mark.parametrize("variant", [None, *VARIANTS])
def test_no_honest_chip_fails(examine_on: Examine, variant: str | None) -> None:
    planted = None if variant is None else VARIANTS[variant]()
    record = examine_on("operators", planted, trace=trace_of_all(), budget_s=120.0)
    assert [each for each in record.findings if each.verdict in ("FAIL", "INCONCLUSIVE")] == []
    judged = [each["operator"] for each in record.measurements if each.get("verdict") == "pass"]
    assert len(judged) >= 12, "the exam has judged too little to say anything"


def test_the_cpu_passes(examine_on: Examine) -> None:
    record = examine_on("operators", trace=trace_of_all(), chip_spec="cpu", budget_s=120.0)
    assert failures(record) == []


def test_a_wrong_gradient_is_found_through_autograd(examine_on: Examine) -> None:
    x = {**tensor(30, 20), "gradient": True}
    call = TracedCall("c0", "aten.gelu.default", [x], {}, [tensor(30, 20)], 1, 0.01, ["forward"])
    trace = Trace("made by hand", "train", "float32", [call])
    honest = examine_on("operators", trace=trace)
    assert [each["operator"] for each in honest.measurements] == [call.operator, f"gradient of {call.operator}"]
    assert honest.findings == []
    record = examine_on("operators", On("gelu_backward", change=lambda result: result * 1.001), trace=trace)
    (finding,) = record.findings
    assert finding.verdict == "FAIL"
    assert finding.subject.startswith("gradient of aten.gelu.default")
    assert finding.reproducer is not None


def test_ties_may_be_broken_in_another_way(examine_on: Examine) -> None:
    def last_of_equals(args: Any) -> Any:
        x, k = args[0], args[1]
        values, places = x.flip(-1).topk(k)
        return values, x.shape[-1] - 1 - places

    operator = "aten.topk.default"
    record = found(examine_on, operator, On("topk", before=last_of_equals), CALLS)
    assert failures(record) == []


def test_other_strides_of_a_dense_result_are_a_limit(examine_on: Examine) -> None:
    def transposed(result: Tensor) -> Tensor:
        return result.t().contiguous().t() if result.dim() == 2 else result

    record = found(examine_on, "aten.silu.default", On("silu", change=transposed), CALLS)
    assert [finding.verdict for finding in record.findings] == ["PASS WITH LIMITS"]


def test_an_argument_that_is_overwritten_is_found(examine_on: Examine) -> None:
    def overwriting(args: Any) -> Tensor:
        made = torch.nn.functional.silu(args[0])
        args[0].zero_()
        return made

    record = found(examine_on, "aten.silu.default", On("silu", before=overwriting), CALLS)
    assert failures(record)[0].endswith("structure")


def test_a_call_that_raises_is_a_finding_and_the_exam_goes_on(examine_on: Examine) -> None:
    def refuse(args: Any) -> Any:
        raise RuntimeError("no such kernel")

    record = examine_on("operators", On("gelu", before=refuse), trace=trace_of_all(), budget_s=120.0)
    (finding,) = [each for each in record.findings if each.verdict == "FAIL"]
    assert (finding.kind, finding.check) == ("software", "runs")
    assert "no such kernel" in finding.message
    assert len(record.measurements) >= 12


def test_what_the_budget_cut_is_named(examine_on: Examine) -> None:
    record = examine_on("operators", trace=trace_of_all(), budget_s=1.5)
    assert any("budget" in each for each in record.not_covered)
    assert record.verdict == "INCONCLUSIVE"
    assert not record.coverage["critical operators and their gradients, one call each"].is_enough


def test_a_failed_operator_has_a_reproducer_that_fails_on_the_chip_only(examine_on: Examine, tmp_path: Path) -> None:
    operator, fault = FAULTS["a dropped tile"]
    record = found(examine_on, operator, fault, CALLS)
    (finding,) = [each for each in record.findings if each.verdict == "FAIL"]
    assert finding.reproducer is not None
    file = tmp_path / "reproducers" / finding.reproducer
    ast.parse(file.read_text(encoding="utf-8"))
    done = subprocess.run(
        [sys.executable, str(file), "--device", "cpu"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verdict:  right" in done.stdout


def test_numbers_are_kept_for_pages(examine_on: Examine) -> None:
    record = examine_on("operators", trace=trace_of("aten.mm.default", BF16_CALLS), budget_s=60.0)
    (measured,) = record.measurements
    assert measured["verdict"] == "pass"
    assert measured["num_draws"] >= 30
    assert measured["num_outputs"] >= 4096
    assert measured["lower"] <= measured["ratio"] <= measured["upper"] < 2.5
    assert set(measured["offsets_effect_and_z"]) == {"bias", "shift", "gain"}
    assert measured["slope"] is not None


def permutation(size: int) -> dict[str, Any]:
    return tensor(size, dtype="int64", low=0, high=size - 1, unique=True)


def last_first(args: Any) -> Any:
    """`index_put_` of a chip on which, of values for one place, the first stays."""
    into, (index,), values = args
    return into.index_put_([index.flip(0)], values.flip(0))


def test_which_of_two_values_for_one_place_stays_is_no_fault(examine_on: Examine) -> None:
    twice = indices(300, high=60)
    values = tensor(300, dtype="int64", low=0, high=9999)
    calls = [
        TracedCall(
            "c0001", "aten.index_put_.default", [tensor(80, dtype="int64", low=0, high=9), [twice], values], {}, []
        )
    ]
    trace = Trace("some", "train", "float32", calls)
    record = examine_on("operators", On("index_put_", before=last_first), trace=trace)
    assert record.findings == []
    assert any("left to chance" in each for each in record.not_covered)


def test_a_permutation_of_any_length_is_one(examine_on: Examine) -> None:
    values = tensor(256, dtype="int64", low=0, high=255, unique=True)
    into = tensor(256, dtype="int64", low=0, high=0)
    call = TracedCall("c0001", "aten.index_put_.default", [into, [permutation(256)], values], {}, [])
    trace = Trace("some", "train", "float32", [call])
    assert examine_on("operators", On("index_put_", before=last_first), trace=trace).findings == []

    def loses_the_last(args: Any) -> Any:
        into, (index,), values = args
        return into.index_put_([index[:256]], values[:256])

    (found,) = examine_on("operators", On("index_put_", before=loses_the_last), trace=trace).findings
    assert (found.verdict, found.check) == ("FAIL", "exact results")


_SOME_ROWS = (17, 33, 127)


def refuses_some_rows(args: Any) -> Any:
    if args[0].shape[0] in _SOME_ROWS:
        raise RuntimeError("so many rows")
    return torch.ops.aten.silu.default(*args)


def wrong_in_some_rows(args: Any) -> Any:
    return torch.ops.aten.silu.default(*args) * (1.5 if args[0].shape[0] in _SOME_ROWS else 1.0)


@pytest.mark.parametrize(
    ("rows", "before", "verdict"),
    [
        ((30, 30), refuses_some_rows, "PASS WITH LIMITS"),
        ((30, 16), refuses_some_rows, "FAIL"),
        ((30, 30), wrong_in_some_rows, "FAIL"),
    ],
)
def test_sizes_that_the_subject_never_has_may_be_refused_and_not_be_wrong(
    examine_on: Examine, rows: tuple[int, int], before: Any, verdict: str
) -> None:
    calls = [
        TracedCall(f"c{number:04d}", "aten.silu.default", [tensor(count, 20)], {}, [])
        for number, count in enumerate(rows, start=1)
    ]
    record = examine_on("operators", On("silu", before=before), trace=Trace("some", "train", "float32", calls))
    assert {each.verdict for each in record.findings} == {verdict}


def refuses_empty(args: Any) -> Any:
    if args[0].numel() == 0:
        raise RuntimeError("an empty tensor")
    return torch.ops.aten.silu.default(*args)


@pytest.mark.parametrize(("rows", "verdict"), [((30, 30), "PASS WITH LIMITS"), ((30, 17), "FAIL")])
def test_what_is_never_empty_for_the_subject_is_a_limit(
    examine_on: Examine, rows: tuple[int, int], verdict: str
) -> None:
    """Rows that experts get differ from call to call, and may be none; a batch that is always 30 is never empty."""
    calls = [
        TracedCall(f"c{number:04d}", "aten.silu.default", [tensor(count, 20)], {}, [])
        for number, count in enumerate(rows, start=1)
    ]
    trace = Trace("some", "train", "float32", calls)
    (found,) = examine_on("operators", On("silu", before=refuses_empty), trace=trace).findings
    assert (found.verdict, found.check) == (verdict, "runs")


@pytest.mark.parametrize("first", [1, 3])
def test_a_refused_operator_that_draws_numbers_is_a_finding_and_the_exam_goes_on(
    examine_on: Examine, first: int
) -> None:
    def refuse(result: Any) -> Any:
        raise ValueError("no kernel for it")

    calls = [
        TracedCall(f"c{number}", operator, *CALLS[operator], [], 1, 0.01, ["forward"])
        for number, operator in enumerate(("aten.normal_.default", "aten.silu.default"))
    ]
    fault = On("normal_", refuse, when=lambda count: count >= first)
    record = examine_on("operators", fault, trace=Trace("made by hand", "train", "float32", calls), budget_s=60.0)
    (failure,) = failures(record)
    assert failure.startswith("aten.normal_.default")
    assert failure.endswith(": runs")
    assert record.num_checks["structure"] >= 1
