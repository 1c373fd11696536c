from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from crosschip.chips.faults.catalogue import CATALOGUE
from crosschip.chips.faults.variants import VARIANTS
from crosschip.qualify.exams.attention.case import (
    AttentionCase,
    attend_on,
    attention_inputs,
    attention_is_wrong,
    compare,
    golden,
    kept_keys,
)
from crosschip.qualify.exams.attention.gradient import compare_gradients, gradient_inputs, gradients_on
from crosschip.qualify.exams.attention.plan import battery, geometries, gradient_battery
from crosschip.qualify.finding import ExamRecord, Finding
from crosschip.qualify.tracing.trace import Trace, TracedCall
from tests.qualify.broken_attention import BrokenAttention

ROOT = Path(__file__).parent.parent.parent.parent
FUSED = "scaled_dot_product_attention float32"

# A fault, and what the finding must say of it.
NAMED = {
    "mask ignored past 64": "from number of keys 65 on (64 is right) where mask is given",
    "mask of rank 2 ignored": "number of mask dimensions is 2",
    "mask of rank 3 ignored": "number of mask dimensions is 3",
    "mask of the first batch for all": "mask",
    "causal off by one": "mask is causal flag",
    "causal aligned at the end": "mask is causal flag and lengths is not equal",
    "uniform": "in nearly every case",
    "values cropped to the keys' size": "head sizes is unequal",
    "scale ignored": "scale is given",
    "wrong group": "key and value heads is fewer, in groups",
    "strides of keys ignored": "layout",
    "every 20th call flips a bit": "now and then",
}


def wrong(record: ExamRecord) -> list[Finding]:
    return [finding for finding in record.findings if finding.verdict == "FAIL"]


@pytest.mark.parametrize("which", NAMED)
def test_a_broken_kernel_is_named_with_its_condition(examine_on: Callable[..., ExamRecord], which: str) -> None:
    record = examine_on("attention", BrokenAttention(which), role="serve", budget_s=30.0)
    found = wrong(record)
    assert len(found) == 1, [finding.message for finding in found]
    assert found[0].subject == FUSED
    assert found[0].kind == "numerics"
    assert found[0].critical
    assert NAMED[which] in found[0].message
    assert found[0].reproducer is not None or which.startswith("every 20th")


@pytest.mark.parametrize("which", ["gradient without mask", "gradient of values halved"])
def test_a_broken_gradient_is_named(examine_on: Callable[..., ExamRecord], which: str) -> None:
    found = wrong(examine_on("attention", BrokenAttention(which)))
    assert [finding.subject for finding in found] == [f"gradients of {FUSED}"]
    assert found[0].reproducer is not None


def test_a_factor_that_no_single_case_shows_is_found_by_the_error_ratio(
    examine_on: Callable[..., ExamRecord],
) -> None:
    record = examine_on("attention", BrokenAttention("three per cent more"), role="serve", dtype=torch.bfloat16)
    assert "scaled_dot_product_attention bfloat16" in {finding.subject for finding in wrong(record)}


@pytest.mark.parametrize("fault", ["N1", "N2", "N4", "V2"])
def test_the_catalogues_faults_are_named(examine_on: Callable[..., ExamRecord], fault: str) -> None:
    found = wrong(examine_on("attention", CATALOGUE[fault].make()))
    assert FUSED in {finding.subject for finding in found}


def test_a_refusal_fails_only_what_the_subject_needs(examine_on: Callable[..., ExamRecord]) -> None:
    needless = examine_on("attention", BrokenAttention("odd head sizes refused"), role="serve")
    assert needless.verdict == "PASS WITH LIMITS"
    assert "largest power of two in the head size at most 4" in needless.findings[0].message
    assert needless.findings[0].kind == "software"
    needed = examine_on("attention", BrokenAttention("all refused"), role="serve")
    assert [(finding.kind, finding.verdict) for finding in needed.findings] == [("software", "FAIL")]
    assert "no such kernel" in needed.findings[0].message


def test_unequal_head_sizes_are_refused_by_name(examine_on: Callable[..., ExamRecord]) -> None:
    record = examine_on("attention", CATALOGUE["W13"].make(), role="serve")
    assert record.verdict == "PASS WITH LIMITS"
    assert "head sizes is unequal" in record.findings[0].message


@pytest.mark.parametrize(("role", "dtype"), [("train", torch.bfloat16), ("serve", torch.float32)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_honest_chips_pass(examine_on: Callable[..., ExamRecord], variant: str, role: str, dtype: torch.dtype) -> None:
    record = examine_on("attention", VARIANTS[variant](), role=role, dtype=dtype, seed=3)
    assert record.verdict == "PASS", [finding.message for finding in record.findings]
    assert sum(record.num_checks.values()) > 300


def test_the_cpu_passes(examine_on: Callable[..., ExamRecord]) -> None:
    assert examine_on("attention", chip_spec="cpu").verdict == "PASS"


def test_a_reproducer_needs_torch_only(examine_on: Callable[..., ExamRecord], tmp_path: Path) -> None:
    record = examine_on("attention", BrokenAttention("mask ignored past 64"), role="serve")
    name = wrong(record)[0].reproducer
    assert name is not None
    path = tmp_path / "reproducers" / name
    assert "'keys': 65" in path.read_text()
    environment = {
        **os.environ,
        "CROSSCHIP_SIM": "sim:tests.qualify.exams.test_attention:past_64",
        "OMP_NUM_THREADS": "1",
    }
    for device, code in (("sim", 1), ("cpu", 0)):
        command = [sys.executable, str(path), "--device", device]
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == code, ended.stdout + ended.stderr


def past_64() -> BrokenAttention:
    return BrokenAttention("mask ignored past 64")


def plain_case(**changes: Any) -> AttentionCase:
    return replace(AttentionCase("fused", "float32", batch=2, heads=4, kv_heads=4, queries=20, keys=30), **changes)


def test_the_golden_answer_is_that_without_the_hidden_positions() -> None:
    case = plain_case(mask_shape="S", mask_kind="boolean")
    inputs = attention_inputs(case)
    assert inputs.mask is not None
    kept = inputs.mask.nonzero().flatten()
    assert 0 < len(kept) < case.keys
    assert float(inputs.value[:, :, ~inputs.mask].abs().min()) == 1e4
    key, value = (each[:, :, kept].double() for each in (inputs.key, inputs.value))
    without = torch.nn.functional.scaled_dot_product_attention(inputs.query.double(), key, value)
    assert torch.allclose(golden(case, inputs)[0], without, rtol=1e-12, atol=1e-12)


def test_torchs_causal_flag_aligns_the_first_query_with_the_first_key() -> None:
    kept = kept_keys(plain_case(queries=2, keys=4, causal=True), None)
    assert kept[0, 0].tolist() == [[True, False, False, False], [True, True, False, False]]
    case = plain_case(queries=1, keys=5, causal=True)
    inputs = attention_inputs(case)
    assert torch.allclose(attend_on("cpu", case, inputs), inputs.value[:, :, :1])


@pytest.mark.parametrize("mask_kind", ["boolean", "-inf", "large negative"])
@pytest.mark.parametrize("pattern", ["random", "padding", "causal", "sliding"])
def test_a_hidden_key_would_win(mask_kind: str, pattern: str) -> None:
    case = plain_case(mask_shape="11TS", mask_kind=mask_kind, pattern=pattern)
    inputs = attention_inputs(case)
    assert compare(case, inputs, attend_on("cpu", case, inputs)).ratio < 0.5
    leaking = replace(inputs, mask=None)
    assert compare(case, inputs, attend_on("cpu", case, leaking)).ratio > 10


def test_a_row_that_sees_nothing_may_be_zero_or_nan_and_nothing_else() -> None:
    case = plain_case(mask_shape="BHTS", mask_kind="boolean", pattern="some rows empty")
    inputs = attention_inputs(case)
    answer = attend_on("cpu", case, inputs)
    empty = ~kept_keys(case, inputs.mask).any(-1)
    assert empty.any()
    for allowed in (0.0, torch.nan):
        answer[empty] = allowed
        assert compare(case, inputs, answer).ratio < 1
    answer[empty] = inputs.value.mean()
    wrong = compare(case, inputs, answer)
    assert wrong.ratio > 1
    assert wrong.is_nobodys
    answer[~empty] += 1e6
    assert not compare(case, inputs, answer).is_nobodys


class _MeanWithoutKeys:
    """cuDNN's attention, as an H100 has it: where no key may be seen, some number."""

    name = "mean without keys"

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Callable[..., Any]) -> Any:
        made = compute(*args, **kwargs)
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        if not op._schema.name.endswith("scaled_dot_product_attention") or mask is None or mask.dtype != torch.bool:
            return made
        empty = (~mask.any(-1, keepdim=True)).expand(*made.shape[:-1], 1)
        return torch.where(empty, args[2].mean().to(made.dtype), made)


def test_a_number_where_no_key_may_be_seen_is_a_limit(examine_on: Callable[..., ExamRecord]) -> None:
    record = examine_on("attention", _MeanWithoutKeys(), role="serve")
    assert [each.verdict for each in record.findings] == ["PASS WITH LIMITS"]
    assert "some rows empty" in record.findings[0].message


def test_a_key_that_nobody_sees_gets_no_gradient_at_all() -> None:
    case = plain_case(mask_shape="1S", mask_kind="boolean")
    inputs, grad = gradient_inputs(case)
    found = gradients_on("cpu", case, inputs, grad)
    assert compare_gradients(case, inputs, grad, found).ratio < 0.5
    assert inputs.mask is not None
    found[1][:, :, ~inputs.mask[0]] += 1e-30
    assert compare_gradients(case, inputs, grad, found).ratio == float("inf")


def test_every_case_of_the_battery_can_be_wrong() -> None:
    """Zeros are not right (for large scores: what no value reaches), nor are gradients of zeros or without mask."""
    for geometry in geometries(mixed_trace()):
        for case in battery(geometry, 1024, "smoke"):
            inputs = attention_inputs(case)
            shape = case.batch, case.heads, case.queries, case.value_size
            level = 100.0 if case.values == "large" else 0.0
            assert compare(case, inputs, torch.full(shape, level, dtype=inputs.query.dtype)).ratio > 1, case
        for case in gradient_battery(geometry, 1024, "smoke"):
            inputs, grad = gradient_inputs(case)
            zero = [torch.zeros_like(each) for each in (inputs.query, inputs.key, inputs.value)]
            assert compare_gradients(case, inputs, grad, zero).ratio > 1, case
            unmasked = gradients_on("cpu", replace(case, causal=False), replace(inputs, mask=None), grad)
            masked = case.causal or case.mask_shape != "none"
            assert not masked or compare_gradients(case, inputs, grad, unmasked).ratio > 1, case


def spec(*shape: int, dtype: str = "bfloat16") -> dict[str, Any]:
    return {"tensor": {"shape": list(shape), "stride": [1] * len(shape), "dtype": dtype, "values": {}}}


def mixed_trace() -> Trace:
    fused = [spec(2, 8, 64, 48), spec(2, 2, 64, 48), spec(2, 2, 64, 32), spec(2, 1, 64, 64, dtype="bool"), 0.0, False]
    calls = [
        TracedCall("a", "aten.scaled_dot_product_attention.default", fused, {"scale": 0.5, "enable_gqa": True}, []),
        TracedCall("b", "aten.bmm.default", [spec(7, 4, 80), spec(7, 80, 129)], {}, []),
        TracedCall("c", "aten._softmax.default", [spec(7, 4, 129, dtype="float32"), -1, False], {}, []),
        TracedCall("d", "aten.bmm.default", [spec(7, 4, 129), spec(7, 129, 64)], {}, []),
        TracedCall("e", "aten._softmax.default", [spec(4, 512, dtype="float32"), -1, False], {}, []),
    ]
    return Trace("mixed", "serve", "bfloat16", calls)


def test_the_traces_attention_is_found_fused_and_in_pieces() -> None:
    fused, plain = geometries(mixed_trace())
    assert (fused.way, fused.heads, fused.kv_heads, fused.head_size, fused.value_size) == ("fused", 8, 2, 48, 32)
    assert (fused.mask_shape, fused.mask_kind, fused.scale) == ("B1TS", "boolean", 0.5)
    assert (plain.way, plain.heads, plain.queries, plain.keys) == ("plain", 7, 4, 129)
    assert (plain.head_size, plain.value_size) == (80, 64)


def test_a_check_is_right_on_the_cpu() -> None:
    assert not attention_is_wrong("cpu", way="plain", dtype="bfloat16", mask_shape="S", mask_kind="-inf")[0]
