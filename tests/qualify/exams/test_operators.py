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
from tests.qualify.planted import On

Examine = Callable[..., ExamRecord]

NORMAL = [-4.0 + n / 4 for n in range(33)]


def tensor(*shape: int, dtype: str = "float32", stride: list[int] | None = None, **values: Any) -> dict[str, Any]:
    dense = list(torch.empty(shape).stride())
    return {
        "tensor": {
            "shape": list(shape),
            "stride": stride or dense,
            "dtype": dtype,
            "values": values or {"quantiles": NORMAL},
        }
    }


def indices(*shape: int, high: int) -> dict[str, Any]:
    return tensor(*shape, dtype="int64", low=0, high=high)


POSITIVE = {"quantiles": [0.01 * (n + 1) for n in range(33)]}
BF16 = {"dtype": "bfloat16", "quantiles": NORMAL}

CALLS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "aten.mm.default": ([tensor(50, 256), tensor(256, 40)], {}),
    "aten.addmm.default": ([tensor(40), tensor(30, 64), tensor(64, 40)], {}),
    "aten.embedding.default": ([tensor(40, 16), indices(6, 10, high=39)], {}),
    "aten._softmax.default": ([tensor(20, 33), -1, False], {}),
    "aten.silu.default": ([tensor(30, 20)], {}),
    "aten.sum.dim_IntList": ([tensor(20, 100), [1]], {}),
    "aten.addcdiv.default": ([tensor(20, 20), tensor(20, 20), tensor(20, 20, **POSITIVE)], {"value": -0.5}),
    "aten.add_.Tensor": ([tensor(20, 20), tensor(20, 20)], {}),
    "aten.index_add.default": ([tensor(8, 16), 0, indices(40, high=7), tensor(40, 16)], {}),
    "aten.cat.default": ([[tensor(4, 6), tensor(4, 5), tensor(4, 3)], 1], {}),
    "aten.clone.default": ([tensor(12, 10, stride=[1, 12])], {}),
    "aten.topk.default": ([tensor(20, 8, quantiles=[float(n // 8) for n in range(33)]), 3], {}),
    "aten.cumsum.default": ([tensor(10, 50), 1], {}),
    "aten.rsqrt.default": ([tensor(30, 30, **POSITIVE)], {}),
    "aten._to_copy.default": ([tensor(40, 40)], {"dtype": {"dtype": "bfloat16"}}),
    "aten.native_dropout.default": ([tensor(50, 50), 0.1, True], {}),
    "aten.normal_.default": ([tensor(100, 20), 0.0, 1.0], {}),
    "aten.native_layer_norm.default": ([tensor(20, 32), [32], tensor(32), tensor(32), 1e-5], {}),
    "aten.gelu.default": ([tensor(30, 20)], {}),
    "aten.scatter_add.default": ([tensor(10, 8), 1, indices(10, 4, high=7), tensor(10, 4)], {}),
    "aten.mul.Tensor": ([tensor(30, 20), tensor(30, 20)], {}),
}
BF16_CALLS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "aten.mm.default": ([tensor(50, 256, **BF16), tensor(256, 40, **BF16)], {}),
    "aten.mul.Tensor": ([tensor(30, 20, **BF16), tensor(30, 20, **BF16)], {}),
}


def trace_of(operator: str, calls: dict[str, tuple[list[Any], dict[str, Any]]]) -> Trace:
    args, kwargs = calls[operator]
    return Trace(
        "made by hand", "train", "float32", [TracedCall("c0", operator, args, kwargs, [], 1, 0.01, ["forward"])]
    )


def failures(record: ExamRecord) -> list[str]:
    return [f"{finding.subject}: {finding.check}" for finding in record.findings if finding.verdict == "FAIL"]


# ---- faults: none of them is in the catalogue


def other_row(result: Tensor) -> Tensor:
    result = result.clone()
    result[..., 3, :] = result[..., 2, :]
    return result


def without_last_tile(result: Tensor) -> Tensor:
    rest = result.shape[0] % 16
    if rest and result.shape[0] > 16:
        result = result.clone()
        result[-rest:] = 0
    return result


def without_last_column(args: Any) -> Tensor:
    x = args[0]
    made = torch.zeros_like(x)
    if x.shape[-1] > 1:
        made[..., :-1] = x[..., :-1].softmax(-1)
    return made


def without_tail(args: Any) -> Tensor:
    x, dims = args[0], args[1]
    return x[:, : x.shape[1] // 8 * 8].sum(dims)


def coarse(args: Any) -> Tensor:
    a, b = args
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.bfloat16)
    for k in range(0, a.shape[1], 32):
        total = (total.float() + a[:, k : k + 32].float() @ b[k : k + 32].float()).bfloat16()
    return total.to(a.dtype)


def ten_bits(x: Tensor) -> Tensor:
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def truncated(args: Any) -> Tensor:
    return (args[0].contiguous().view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()


def without_duplicates(args: Any) -> Tensor:
    x, _, index, source = args[:4]
    made = x.clone()
    made[index] = x[index] + source
    return made


def in_another_order(args: Any) -> Tensor:
    parts, dim = list(args[0]), args[1]
    return torch.cat(parts[:1] + parts[:0:-1], dim)


def as_if_dense(args: Any) -> Tensor:
    x = args[0]
    return x.as_strided((x.numel(),), (1,)).reshape(x.shape) if x.dim() == 2 and x.stride(0) == 1 else x.clone()


def of_the_second(result: Any) -> Any:
    values, places = result
    if values.shape[-1] > 1:
        values = values.clone()
        values[..., -1] = values[..., -2]
    return values, places


def one_more_from_the_fifth(result: Tensor) -> Tensor:
    result = result.clone()
    result[:, 5:] += 0.01
    return result


def kept_too_often(args: Any) -> Any:
    return torch.native_dropout(args[0], 0.08, True)


def a_wider_normal(args: Any) -> Tensor:
    return args[0].normal_(0.0, 1.03)


def with_one_number_wrong(result: Tensor) -> Tensor:
    result = result.clone()
    if result.numel():
        result.view(-1)[result.numel() // 2] += 1
    return result


def biased_layer_norm(args: Any) -> Any:
    x, shape, weight, bias, _ = args
    return torch.native_layer_norm(x, shape, weight, bias, 1e-3)


FAULTS: dict[str, tuple[str, On]] = {
    "a wrong row": ("aten.embedding.default", On("embedding", change=other_row)),
    "a dropped tile": ("aten.mm.default", On("mm", change=without_last_tile)),
    "inputs cut to ten bits": ("aten.mm.default", On("mm", before=lambda a: ten_bits(a[0]) @ ten_bits(a[1]))),
    "no last column": ("aten._softmax.default", On("_softmax", before=without_last_column)),
    "a thousandth": ("aten.silu.default", On("silu", change=lambda result: result * 1.001)),
    "no tail": ("aten.sum.dim_IntList", On("sum", before=without_tail)),
    "no factor": ("aten.addcdiv.default", On("addcdiv", before=lambda a: a[0] - 0.501 * a[1] / a[2])),
    "nothing written": ("aten.add_.Tensor", On("add_", before=lambda a: a[0])),
    "duplicates lost": ("aten.index_add.default", On("index_add", before=without_duplicates)),
    "misplaced": ("aten.cat.default", On("cat", before=in_another_order)),
    "strides ignored": ("aten.clone.default", On("clone", before=as_if_dense)),
    "a wrong value": ("aten.topk.default", On("topk", change=of_the_second)),
    "an offset": ("aten.cumsum.default", On("cumsum", change=one_more_from_the_fifth)),
    "low precision": ("aten.rsqrt.default", On("rsqrt", change=lambda result: result.bfloat16().float())),
    "truncation": ("aten._to_copy.default", On("copy_", before=lambda a: a[0].copy_(truncated(a[1:])))),
    "kept too often": ("aten.native_dropout.default", On("native_dropout", before=kept_too_often)),
    "a wider normal": ("aten.normal_.default", On("normal_", before=a_wider_normal)),
    "another eps": ("aten.native_layer_norm.default", On("native_layer_norm", before=biased_layer_norm)),
    "every 50th call": (
        "aten.mul.Tensor",
        On("mul", change=with_one_number_wrong, when=lambda count: count % 50 == 0),
    ),
}
BF16_FAULTS: dict[str, tuple[str, On]] = {
    "a coarse accumulator": ("aten.mm.default", On("mm", before=coarse)),
    "two thousandths": (
        "aten.mm.default",
        On("mm", before=lambda a: (a[0].double() @ a[1].double() * 1.002).bfloat16()),
    ),
    "fifteen ten-thousandths": (
        "aten.mul.Tensor",
        On("mul", before=lambda a: (a[0].double() * a[1].double() * 1.0015).bfloat16()),
    ),
}


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
