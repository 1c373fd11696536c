from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from crosschip.chips.faults.catalogue import CATALOGUE
from crosschip.chips.faults.variants import VARIANTS
from crosschip.qualify.exams.determinism import composition
from crosschip.qualify.exams.determinism import exam as determinism
from crosschip.qualify.exams.determinism.batch_plan import batched_calls
from crosschip.qualify.exams.determinism.composition import compare_batches, compositions, make_row_wise
from crosschip.qualify.exams.determinism.fixed_work import bits_of, hash_of, same_bits
from crosschip.qualify.exams.determinism.repetition import repeat
from crosschip.qualify.finding import ExamRecord, Finding
from crosschip.qualify.tracing.trace import Trace, TracedCall
from tests.qualify.planted import On
from tests.qualify.unsteady import Unsteady, process_dependent

BATCH = "batch composition"


@pytest.fixture
def examine_here(examine_on: Callable[..., ExamRecord], monkeypatch: pytest.MonkeyPatch) -> Callable[..., ExamRecord]:
    """The exam without its fresh process, which takes as long as all the rest and knows nothing of planted objects."""
    monkeypatch.setattr(determinism, "_hashes_elsewhere", lambda context, budget_s: ({}, "not asked here"))
    return examine_on


def of_check(record: ExamRecord, check: str) -> list[Finding]:
    return [finding for finding in record.findings if finding.check == check]


def flipped(every: int) -> Callable[[Tensor, int], Tensor]:
    def change(result: Tensor, count: int) -> Tensor:
        if count % every or not result.numel():
            return result
        result = result.contiguous()
        result.view(torch.uint8).flatten()[0] ^= 1
        return result

    return change


@pytest.mark.parametrize(("every", "target"), [(20, "mm"), (50, "_log_softmax"), (50, "scaled_dot_product_attention")])
def test_a_bit_that_flips_now_and_then_is_named(
    examine_here: Callable[..., ExamRecord], every: int, target: str
) -> None:
    record = examine_here("determinism", Unsteady(flipped(every), (target,)), budget_s=20.0)
    found = of_check(record, "the same call again")
    assert [finding.verdict for finding in found] == ["FAIL"]
    assert found[0].subject.startswith(f"aten.{target}.")
    assert found[0].reproducer is not None
    assert not of_check(record, BATCH), "what comes and goes is not the batch's doing"


AGAIN, BATCHES_AGAIN = "the same call again", "the same batches again"


def raising_at(operator: str, number: int, error: Exception) -> On:
    def refuse(args: Any) -> Any:
        raise error

    return On(operator, before=refuse, when=lambda count: count == number)


@pytest.mark.parametrize("number", [1, 7])
def test_a_call_that_raises_once_is_named(examine_here: Callable[..., ExamRecord], number: int) -> None:
    record = examine_here("determinism", raising_at("gelu", number, RuntimeError("lost its way")))
    (found,) = [each for each in record.findings if each.verdict == "FAIL"]
    assert (found.check, found.kind) == (AGAIN, "software")
    assert found.subject.startswith("aten.gelu.")
    assert f"the first of them call {number}: RuntimeError: lost its way" in found.message
    assert found.reproducer is not None


def test_a_batch_that_raises_once_is_named(examine_here: Callable[..., ExamRecord]) -> None:
    record = examine_here("determinism", raising_at("native_layer_norm", 3, RuntimeError("lost its way")))
    (found,) = [each for each in record.findings if each.verdict == "FAIL"]
    assert (found.check, found.kind) == (BATCHES_AGAIN, "software")
    assert "native_layer_norm raises now and then" in found.message
    assert found.reproducer is not None


def test_bits_of_a_batch_that_change_once_are_named(examine_here: Callable[..., ExamRecord]) -> None:
    def once(result: Tensor, count: int) -> Tensor:
        return result * 1.01 if count == 3 else result

    record = examine_here("determinism", Unsteady(once, ("scaled_dot_product_attention",)))
    assert [(each.check, each.verdict) for each in record.findings] == [(BATCHES_AGAIN, "FAIL")]


@pytest.mark.parametrize("operator", ["gelu", "native_layer_norm"])
def test_a_host_without_memory_is_not_the_chips_failure(examine_here: Callable[..., ExamRecord], operator: str) -> None:
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    record = examine_here("determinism", raising_at(operator, 3, error))
    assert record.findings == []
    assert any(operator in each and "RuntimeError" in each for each in record.not_covered)


def test_results_that_change_from_call_to_call_are_named(examine_here: Callable[..., ExamRecord]) -> None:
    found = of_check(examine_here("determinism", CATALOGUE["V13"].make(), budget_s=20.0), "the same call again")
    assert [finding.verdict for finding in found] == ["FAIL"]
    assert found[0].subject.startswith("aten.mm.")


def test_what_torch_documents_as_open_is_a_limit(examine_here: Callable[..., ExamRecord]) -> None:
    def reordered(result: Tensor, count: int) -> Tensor:
        return result * (1 + 2.0**-22) if count % 2 else result

    record = examine_here("determinism", Unsteady(reordered, ("embedding_dense_backward",)))
    assert record.findings
    assert {finding.verdict for finding in record.findings} == {"PASS WITH LIMITS"}
    assert "deterministic_algorithms" in of_check(record, "the same call again")[0].message

    def lost(result: Tensor, count: int) -> Tensor:
        return result * 0.99 if count % 2 else result

    record = examine_here("determinism", Unsteady(lost, ("embedding_dense_backward",)))
    assert of_check(record, "the same call again")[0].verdict == "FAIL"


def test_a_fresh_process_that_differs_is_named(examine_on: Callable[..., ExamRecord]) -> None:
    chip = "sim:tests.qualify.unsteady:process_dependent"
    record = examine_on("determinism", process_dependent(), chip_spec=chip, role="serve")
    assert [(finding.check, finding.verdict) for finding in record.findings] == [("fresh process", "FAIL")]


def odd_rows(result: Tensor, count: int) -> Tensor:
    result = result.clone()
    result[1::2] *= 1.01
    return result


def large_batches(result: Tensor, count: int) -> Tensor:
    return result * 1.01 if result.shape[0] >= 64 else result


@pytest.mark.parametrize("change", [odd_rows, large_batches])
@pytest.mark.parametrize("target", ["mm", "scaled_dot_product_attention"])
def test_a_row_that_changes_with_its_batch_fails(
    examine_here: Callable[..., ExamRecord], change: Callable[[Tensor, int], Tensor], target: str
) -> None:
    if change is large_batches and target != "mm":
        pytest.skip("the subject's attention has a batch of four")
    targets = ("mm", "addmm") if target == "mm" else (target,)
    found = of_check(examine_here("determinism", Unsteady(change, targets)), BATCH)
    assert found
    assert {finding.verdict for finding in found} == {"FAIL"}
    assert all(any(f"aten.{each}." in finding.subject for each in targets) for finding in found)
    assert found[0].reproducer is not None


@pytest.mark.parametrize("settings", [{}, {"on": "position"}, {"partials": "result"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_order_that_depends_on_the_batch_is_a_limit(
    examine_here: Callable[..., ExamRecord], settings: dict[str, Any], dtype: torch.dtype
) -> None:
    found = of_check(examine_here("determinism", CATALOGUE["N22"].make(**settings), dtype=dtype), BATCH)
    assert {finding.verdict for finding in found} == {"PASS WITH LIMITS"}
    assert any("mm" in finding.subject for finding in found)
    assert ("position" in found[0].message) == (settings == {"on": "position"})


@pytest.mark.parametrize("variant", VARIANTS)
def test_honest_chips_do_not_fail(examine_on: Callable[..., ExamRecord], variant: str) -> None:
    for role in ("train", "serve"):
        record = examine_on("determinism", VARIANTS[variant](), chip_spec=f"sim:{variant}", role=role, budget_s=20.0)
        assert record.verdict in ("PASS", "PASS WITH LIMITS"), [finding.message for finding in record.findings]
        assert record.num_checks["fresh process"] > 5


@pytest.mark.parametrize("chip", ["cpu", "sim"])
def test_the_cpu_and_the_honest_chip_pass(examine_on: Callable[..., ExamRecord], chip: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        record = examine_on("determinism", chip_spec=chip, role="serve", dtype=dtype)
        assert record.verdict == "PASS", [finding.message for finding in record.findings]
        assert {BATCH, "the same call again", "the same step again", "fresh process"} <= set(record.num_checks)


def test_the_served_rows_of_the_recipe(
    examine_here: Callable[..., ExamRecord], first_trace: Callable[[str], Any]
) -> None:
    trace = first_trace("serve")
    settings: dict[str, Any] = {"role": "serve", "trace": trace, "dtype": torch.bfloat16, "origin": FIRST}
    assert examine_here("determinism", **settings).verdict == "PASS"

    def odd_prompts(result: Tensor, count: int) -> Tensor:
        result = result.clone()
        result[1::2] *= 1.5
        return result

    record = examine_here("determinism", Unsteady(odd_prompts, ("scaled_dot_product_attention",)), **settings)
    assert [finding.verdict for finding in of_check(record, "rows of the served model")] == ["FAIL"]


FIRST = "recipes/first.toml"


def product(rows: int, terms: int, columns: int, dtype: str) -> tuple[list[Any], dict[str, Any]]:
    def spec(*shape: int) -> dict[str, Any]:
        stride = list(torch.empty(shape, device="meta").stride())
        return {"tensor": {"shape": list(shape), "stride": stride, "dtype": dtype, "values": {"normal": [0.0, 1.0]}}}

    return [spec(rows, terms), spec(terms, columns)], {}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_integer_products_are_exact_in_the_dtype(dtype: str) -> None:
    call = make_row_wise("aten.mm.default", *product(64, 2048, 128, dtype), [0], "integers", 0)
    left, right = call.args
    exact = left.double() @ right.double()
    assert float((left.double().abs() @ right.double().abs()).max()) <= 256
    assert float(exact.abs().max()) > 4
    assert torch.equal(call.on("cpu", list(range(64)))[0].double(), exact)


def test_cancelling_terms_show_the_order_in_bf16() -> None:
    call = make_row_wise("aten.mm.default", *product(64, 128, 128, "bfloat16"), [0], "cancelling", 0)
    left, right = (each.float() for each in call.args)
    halves = (left[:, :64] @ right[:64] + left[:, 64:] @ right[64:]).bfloat16()
    whole = (left @ right).bfloat16()
    assert float((halves != whole).float().mean()) > 0.01


def test_every_row_is_compared_in_its_own_place() -> None:
    ways = compositions(40)
    assert {"each row alone", "batches of 8", "rows in reverse", "rows moved by one place"} <= set(ways)
    assert all(0 <= row < 40 for batches in ways.values() for batch in batches for row in batch)
    call = make_row_wise("aten.mm.default", *product(40, 8, 4, "float32"), [0], "integers", 0)
    assert all(compared.share == 0 for compared in compare_batches(call, "cpu"))


def test_batched_calls_are_those_of_the_forward_pass() -> None:
    def call(phase: str, rows: int, terms: int, time_s: float) -> TracedCall:
        args, kwargs = product(rows, terms, 8, "float32")
        return TracedCall(f"{phase}{rows}", "aten.mm.default", args, kwargs, [], 1, time_s, [phase])

    calls = [call("forward", 4096, 64, 1.0), call("backward", 64, 4096, 9.0), call("forward", 1024, 32, 2.0)]
    reduced = TracedCall("r", "aten.mean.dim", [calls[0].args[0], [0], False], {}, [], 1, 1.0, ["forward"])
    found = list(batched_calls(Trace("made", "train", "float32", [*calls, reduced]), "smoke"))
    shapes = [each.args[0]["tensor"]["shape"] for each in found]
    assert shapes == [[256, 32], [256, 64]], "those of the forward pass, the longest first, with few rows"


def test_bits_tell_zeros_and_nans_apart() -> None:
    assert same_bits(bits_of([torch.tensor([torch.nan])]), bits_of([torch.tensor([torch.nan])]))
    assert not same_bits(bits_of([torch.tensor(0.0)]), bits_of([torch.tensor(-0.0)]))
    assert hash_of(bits_of([torch.ones(3)])) != hash_of(bits_of([torch.ones(4)]))


def test_a_call_that_writes_into_its_arguments_is_made_anew_each_time() -> None:
    args, kwargs = product(4, 4, 4, "float32")
    found = repeat("aten.add_.Tensor", args, kwargs, 0, "cpu", 20, 5.0)
    assert (found.number, found.different) == (20, 0)


@pytest.mark.parametrize("operator", ["aten.mm.default", "aten.addmm.default", "aten.linear.default"])
def test_what_is_added_to_a_product_is_no_error_of_honest_orders(operator: str) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(8, 64, generator=generator), torch.randn(64, 16, generator=generator)
    bias = 100.0 + torch.randn(16, generator=generator)
    kwargs: dict[str, Any] = {}
    if operator == "aten.addmm.default":
        args, sliced, kwargs = (bias, left, right), (1,), {"beta": 0.5, "alpha": 2.0}
    elif operator == "aten.linear.default":
        args, sliced = (left, right.T.contiguous(), bias), (0,)
    else:
        args, sliced = (left, right), (0,)
    call = composition.RowWise(operator, args, kwargs, sliced)
    rows = torch.tensor([5, 2])
    exact = call.in_fp64().on("cpu", rows.tolist())
    assert 0.0 < composition._sequential_error(call, rows, exact) < 1e-6 * float(exact[0].abs().max())
