"""The rule, operator by operator; the whole document; and the rule's one step beyond composite kernels, for real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from crosschip.errors import QualifyError
from crosschip.qualify.offline import check_offline
from crosschip.qualify.offline.classify import classify, qualified_name
from crosschip.qualify.offline.registered import RegisteredOperator, registered_operators
from crosschip.qualify.tracing.trace import Trace, TracedCall
from crosschip.report.offline_table import print_offline_check
from tests.qualify.offline.lists_made import (
    CODEGEN,
    CORE,
    MLU,
    NPU_CODEGEN,
    NPU_CORE,
    OP_PLUGIN,
    OP_PLUGIN_FILE,
    make_source,
    make_wheel,
)

LISTED = {"aten::mm", "aten::mul.out", "aten::_fused_adam_"}


NOT_FUNCTIONAL = ("CompositeExplicitAutogradNonFunctional",)


@pytest.mark.parametrize(
    ("operator", "composites", "siblings", "kind"),
    [
        ("aten::mm", (), (), "native"),
        ("aten::mm", ("CompositeExplicitAutograd",), (), "native"),  # the list comes first
        ("aten::mm.dtype", (), ("aten::mm.dtype_out",), "likely CPU fallback"),  # another overload is another operator
        ("aten::t", ("CompositeExplicitAutograd",), (), "decomposes"),
        ("aten::linear", ("CompositeImplicitAutograd",), ("aten::mul.out",), "decomposes"),
        ("aten::mul.Tensor", (), ("aten::mul.out", "aten::mul_.Tensor"), "native"),
        ("aten::mul.Tensor", NOT_FUNCTIONAL, ("aten::mul.out",), "native"),
        ("aten::nextafter", NOT_FUNCTIONAL, ("aten::nextafter.out",), "likely CPU fallback"),
        ("aten::_fused_adam_", (), (), "unknown"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", (), (), "unknown"),
        ("profiler::_record_function_enter_new", (), (), "unknown"),
    ],
)
def test_the_rule(operator: str, composites: tuple[str, ...], siblings: tuple[str, ...], kind: str) -> None:
    found = classify(operator, LISTED, "torch_npu", RegisteredOperator(True, composites, siblings))
    assert (found.kind, bool(found.reason)) == (kind, True)


def test_an_operator_that_torch_does_not_have_is_unknown() -> None:
    assert classify("mine::op", LISTED, "torch_npu", RegisteredOperator(False)).kind == "unknown"


def test_names() -> None:
    assert qualified_name("aten.mm.default") == "aten::mm"
    assert qualified_name("aten.add_.Tensor") == "aten::add_.Tensor"


def test_what_torch_has_registered() -> None:
    asked = ["aten::t", "aten::mm", "aten::mul.Tensor", "aten::nextafter", "aten::topk", "aten::nothing.there"]
    found, version = registered_operators(asked)
    assert version[0].isdigit()
    assert "CompositeExplicitAutograd" in found["aten::t"].composites
    assert "CompositeImplicitAutograd" not in found["aten::mm"].composites
    assert found["aten::mul.Tensor"].siblings == ("aten::mul.out", "aten::mul_.Tensor")
    assert found["aten::topk"].siblings == ("aten::topk.values",)
    assert found["aten::nextafter"].composites == ("CompositeExplicitAutogradNonFunctional",)
    assert not found["aten::nothing.there"].exists


def trace_of(**times_s: float) -> dict[str, Any]:
    calls = [
        TracedCall(f"c{number:04}", operator.replace("__", "."), [], [], [], count=2, time_s=time_s)  # type: ignore[arg-type]
        for number, (operator, time_s) in enumerate(times_s.items())
    ]
    return Trace("first", "train", "float32", calls).document()


TRACE = trace_of(
    aten__mm__default=0.6,
    aten__mul__Tensor=0.2,
    aten__t__default=0.0,
    aten__cumsum__default=0.1,
    aten__exp__default=0.1,
)


def test_the_document_counts_and_weighs(tmp_path: Path) -> None:
    document = check_offline(TRACE, make_wheel(tmp_path / "w.whl"))
    assert (document["schema_version"], document["document"]) == (1, "offline check")
    kinds = {kind: [row["operator"] for row in rows] for kind, rows in document["operators"].items()}
    assert kinds == {
        "native": ["aten.mm.default", "aten.mul.Tensor"],
        "decomposes": ["aten.t.default"],
        "likely CPU fallback": ["aten.cumsum.default", "aten.exp.default"],
        "unknown": [],
    }
    assert document["coverage"]["native"]["time_share"] == pytest.approx(0.8)
    assert document["coverage"]["native"]["operator_share"] == pytest.approx(2 / 5)
    assert document["coverage"]["likely CPU fallback"]["num_calls"] == 4
    assert sum(each["operator_share"] for each in document["coverage"].values()) == pytest.approx(1.0)
    assert document["source"]["version"] == "2.13.0"


def test_a_list_of_another_torch_is_said(tmp_path: Path) -> None:
    (tmp_path / "mlu_functions.yaml").write_text(MLU)
    errors = check_offline(TRACE, tmp_path / "mlu_functions.yaml")["known_errors"]
    assert "does not say for which torch" in errors[0]


def first_error(directory: Path, members: dict[str, str]) -> str:
    return str(check_offline(TRACE, make_source(directory, members))["known_errors"][0])


def test_half_a_list_of_torch_npu_is_the_first_of_all_errors(tmp_path: Path) -> None:
    """The core alone calls everything of op-plugin a fallback; the built list, or both of the source, do not."""
    core = first_error(tmp_path / "core", {CORE: NPU_CORE})
    assert core.startswith("ONLY the core list of torch_npu (npu_native_functions.yaml) WAS FOUND")
    assert "look like CPU fallback; give the wheel" in core
    assert first_error(tmp_path / "plugin", {OP_PLUGIN_FILE: OP_PLUGIN}).startswith("ONLY the list of op-plugin")
    assert "ONLY" not in first_error(tmp_path / "both", {CORE: NPU_CORE, OP_PLUGIN_FILE: OP_PLUGIN})
    assert "ONLY" not in first_error(tmp_path / "built", {CODEGEN: NPU_CODEGEN})
    assert "ONLY" not in first_error(tmp_path / "mlu", {"mlu_functions.yaml": MLU})


def test_operators_of_op_plugin_are_no_fallback_where_its_list_is_read(tmp_path: Path) -> None:
    document = check_offline(TRACE, make_source(tmp_path, {CORE: NPU_CORE, OP_PLUGIN_FILE: OP_PLUGIN}))
    assert {"aten.exp.default", "aten.cumsum.default"} <= {row["operator"] for row in document["operators"]["native"]}


def test_the_table_says_that_it_is_an_estimate(tmp_path: Path) -> None:
    document = check_offline(TRACE, make_wheel(tmp_path / "[bold]w.whl"))
    console = Console(record=True, width=100, highlight=False, file=open("/dev/null", "w"))  # noqa: SIM115
    print_offline_check(document, console)
    text = console.export_text()
    assert text.startswith("coverage estimate, not a verdict: first, one train step in float32")
    assert "aten.cumsum.default, 2 calls" in text
    assert "no arithmetic is examined" in text
    assert "[bold]w.whl" in text


def test_one_source_is_needed() -> None:
    for kwargs in ({}, {"source": Path("a.whl"), "download": "torch-npu==2.13.0"}):
        with pytest.raises(QualifyError, match="an operator list is needed from one place"):
            check_offline(TRACE, **kwargs)
