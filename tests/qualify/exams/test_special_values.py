from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from crosschip.chips.faults import faults_from
from crosschip.chips.simulated import plant
from crosschip.qualify.exams.special_values.non_finite_watch import (
    WATCHES,
    subnormals_are_kept,
    watch_sees,
    zeros_keep_their_sign,
)
from crosschip.qualify.exams.special_values.special_case import lies_of, single_cases, special_case
from crosschip.qualify.exams.special_values.special_table import FAMILIES, special_parameters
from crosschip.qualify.finding import ExamRecord, Finding
from tests.qualify.broken_chip import Broken

Examine = Callable[..., ExamRecord]
DTYPES = ["float32", "bfloat16", "float16", "float64"]


pytestmark = pytest.mark.usefixtures("honest_afterwards")


def failures(record: ExamRecord) -> list[Finding]:
    return [each for each in record.findings if each.verdict == "FAIL"]


def on_floats(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    """A fault's `change` that hands each floating-point result through a function."""

    def changed(made: Any) -> Any:
        if isinstance(made, torch.Tensor):
            return change(made) if made.is_floating_point() else made
        return type(made)(changed(each) for each in made) if isinstance(made, tuple | list) else made

    return lambda op, args, kwargs, compute: changed(compute(*args, **kwargs))


def saturated(made: torch.Tensor) -> torch.Tensor:
    return made.nan_to_num(0.0)


@pytest.mark.parametrize("role", ["train", "serve"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_honest_chip_passes(examine_on: Examine, role: str, dtype: torch.dtype) -> None:
    record = examine_on("special_values", role=role, dtype=dtype)
    assert (record.verdict, record.findings, record.not_covered) == ("PASS", [], [])
    assert set(FAMILIES) < set(record.num_checks)


def test_the_cpu_passes(examine_on: Examine) -> None:
    assert examine_on("special_values", chip_spec="cpu").verdict == "PASS"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["fp32", "reordered", "naive", "noisy", "flush"])
def test_honest_variants_do_not_fail(examine_on: Examine, variant: str, dtype: torch.dtype) -> None:
    record = examine_on("special_values", faults_from(f"sim:{variant}"), dtype=dtype)
    assert failures(record) == []
    limits = [each.subject for each in record.findings]
    assert all(each.startswith("subnormal numbers") for each in limits)
    assert bool(limits) == (variant == "flush")


@pytest.mark.parametrize("device", ["cpu", "sim:0"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_table_is_right_on_honest_devices(dtype: str, device: str) -> None:
    for family in FAMILIES:
        for parameters in special_parameters(family, dtype):
            assert lies_of(device, **parameters) == [], parameters["function"]


def test_saturation_everywhere_is_told_in_a_few_findings(examine_on: Examine) -> None:
    record = examine_on("special_values", Broken(on_floats(saturated)))
    assert record.verdict == "FAIL"
    kinds = {each.check for each in failures(record)}
    assert {"NaN hidden", "overflow hidden", "watches"} <= kinds
    assert len(record.findings) <= 16
    assert any("blind" in each.message for each in failures(record))


def test_the_catalogues_saturation_fails(examine_on: Examine) -> None:
    record = examine_on("special_values", faults_from("sim:N19"))
    assert {"NaN hidden", "overflow hidden"} <= {each.check for each in failures(record)}


def test_saturation_in_one_dtype_only_is_named_with_it(examine_on: Examine) -> None:
    def in_bf16(made: torch.Tensor) -> torch.Tensor:
        return saturated(made) if made.dtype == torch.bfloat16 else made

    fault = Broken(on_floats(in_bf16), ("aten.mm.", "aten.addmm."))
    assert failures(examine_on("special_values", fault, dtype=torch.float32)) == []
    found = failures(examine_on("special_values", fault, dtype=torch.bfloat16))
    assert found
    assert all("bfloat16" in each.subject or "more operators" in each.subject for each in found)


@pytest.mark.parametrize(
    ("operator", "change", "kind"),
    [
        ("aten.mul.", lambda made: torch.where(made == math.inf, torch.finfo(made.dtype).max, made), "overflow hidden"),
        ("aten.add.", lambda made: made.masked_fill(made.isnan(), 0.0), "NaN hidden"),
        ("aten.clamp.", lambda made: made.masked_fill(made.isnan(), 1.0), "NaN hidden"),
        ("aten._log_softmax.", lambda made: made.nan_to_num(0.0), "NaN hidden"),
        ("aten.gelu.", lambda made: made.masked_fill(made.abs() > 500.0, math.nan), "NaN or infinity invented"),
        ("aten.sum.", lambda made: made.masked_fill(made.isinf(), 0.0), "overflow hidden"),
        ("aten.mm.", lambda made: made + made.sum() * 0.0, "NaN or infinity invented"),
        ("aten.nll_loss_forward.", lambda made: made.nan_to_num(0.0), "NaN hidden"),
        ("aten._fused_adamw_.", None, "NaN hidden"),
    ],
)
def test_one_operator_that_lies_is_named(
    examine_on: Examine, operator: str, change: Callable[[torch.Tensor], torch.Tensor] | None, kind: str
) -> None:
    def forgets_parameters(op: Any, args: Any, kwargs: Any, compute: Any) -> Any:
        made = compute(*args, **kwargs)
        for parameter in args[0]:
            parameter.nan_to_num_(0.0)
        return made

    fault = Broken(on_floats(change) if change else forgets_parameters, (operator,))
    found = failures(examine_on("special_values", fault))
    assert kind in {each.check for each in found}
    assert any(each.reproducer for each in found)
    assert len(found) <= 6


def test_an_operator_that_the_subject_does_not_use_is_a_limit(examine_on: Examine) -> None:
    record = examine_on("special_values", Broken(on_floats(saturated), ("aten.log1p.",)))
    assert record.verdict == "PASS WITH LIMITS"
    assert {each.subject.split()[0] for each in record.findings} == {"torch.log1p"}


def test_softmax_of_minus_infinity_that_gives_zeros_is_seen() -> None:
    plant([Broken(on_floats(lambda made: made.masked_fill(made.isnan(), 0.0)), ("aten._softmax.",))])
    (row,) = [each for each in special_parameters("reductions", "float32") if each["function"] == "torch.softmax"]
    found = lies_of("sim:0", **row)
    all_minus_infinity = [number for number, values in enumerate(row["inputs"][0]) if set(values) == {-math.inf}]
    assert (all_minus_infinity[0], 0) in [place for _, place, _, _ in found]


@pytest.mark.parametrize("function", ["torch.sum", "torch.amax", "torch.mm"])
def test_subnormal_numbers_that_become_nan_are_seen_in_reductions_and_products(function: str) -> None:
    def traps(op: Any, args: Any, kwargs: Any, compute: Any) -> Any:
        given = args[0]
        size = given.abs()
        trapped = torch.where((size > 0.0) & (size < torch.finfo(given.dtype).tiny), torch.nan, given)
        return compute(trapped, *args[1:], **kwargs)

    plant([Broken(traps, ("aten.sum.", "aten.amax.", "aten.mm."))])
    found = [lies_of("sim:0", **row) for family in ("reductions", "matrix products")
             for row in special_parameters(family, "float32") if row["function"] == function]  # fmt: skip
    assert any(lie[0] == "NaN or infinity invented" for lies in found for lie in lies)


def test_a_case_is_cut_to_the_element_or_row_that_shows_it() -> None:
    parameters = {"function": "torch.exp", "dtype": "float32", "inputs": [[0.0, 1000.0]], "options": {}, "kind": "k"}
    assert [each["inputs"] for each in single_cases(parameters)] == [[[0.0]], [[1000.0]]]
    product = {"inputs": [[[1.0, 2.0]], [[1.0], [2.0]]]}
    assert list(single_cases(product)) == []


def test_what_is_told_names_the_numbers() -> None:
    plant([Broken(on_floats(saturated), ("aten.exp.",))])
    wrong, expected, got = special_case("sim:0", "torch.exp", "float32", [[1000.0]], {}, "overflow hidden")
    assert wrong
    assert expected == "torch.exp(1000.0) in float32 = inf"
    assert got.startswith("3.4028234663852886e+38")


@pytest.mark.parametrize("watch", WATCHES["train"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_watch_sees_on_honest_devices(watch: str, value: float) -> None:
    for device in ("cpu", "sim:0"):
        assert not watch_sees(device, "float32", watch, value)[0]


def test_a_blind_norm_is_found(examine_on: Examine) -> None:
    record = examine_on("special_values", Broken(on_floats(saturated), ("norm",)))
    (watch,) = [each for each in failures(record) if each.check == "watches"]
    assert "clipping (nan)" in watch.message
    assert watch.critical


@pytest.mark.parametrize("dtype", DTYPES)
def test_honest_devices_keep_small_numbers_and_signs(dtype: str) -> None:
    for device in ("cpu", "sim:0"):
        assert not subnormals_are_kept(device, dtype)[0]
        assert not zeros_keep_their_sign(device, dtype)[0]


def test_lost_signs_of_zero_are_a_limit(examine_on: Examine) -> None:
    record = examine_on("special_values", Broken(on_floats(lambda made: made + 0.0), ("aten.mul.", "aten.neg.")))
    assert record.verdict == "PASS WITH LIMITS"
    assert [each.subject for each in record.findings] == ["the sign of zero in float32"]
