"""The rates that the software exam measures, and that a plan reads out of its report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crosschip.plan.cluster import parse_cluster
from crosschip.plan.measured import with_report
from crosschip.qualify.exams.software.rates import Product, largest_products
from crosschip.qualify.finding import ExamRecord
from crosschip.qualify.programme import Request, named_exams
from crosschip.qualify.qualification import qualify
from crosschip.qualify.tracing.trace import Trace, TracedCall
from tests.qualify.broken_chip import Broken

Examine = Callable[..., ExamRecord]


pytestmark = pytest.mark.usefixtures("honest_afterwards")


def rates(record: ExamRecord, kind: str) -> list[dict[str, Any]]:
    return [each for each in record.measurements if each.get("kind") == kind]


def traced(operator: str, *shapes: list[int], dtype: str = "bfloat16") -> TracedCall:
    tensors = [{"tensor": {"shape": shape, "dtype": dtype}} for shape in shapes]
    return TracedCall("c", f"aten.{operator}.default", tensors, {}, [])


def test_the_largest_product_of_each_dtype_is_found() -> None:
    calls = [
        traced("mm", [4, 8], [8, 2]),
        traced("linear", [2, 3, 8], [5, 8], [5]),
        traced("addmm", [7], [6, 9], [9, 7], dtype="float32"),
        traced("bmm", [3, 2, 4], [3, 4, 5], dtype="float32"),
        traced("mm", [9, 9], [9, 9], dtype="int8"),
        traced("mm", [0, 9], [9, 9], dtype="float16"),
        traced("add", [99, 99], [99, 99]),
    ]
    found = largest_products(Trace("x", "train", "bfloat16", calls))
    assert found == {"bfloat16": Product(1, 6, 8, 5), "float32": Product(1, 6, 9, 7)}
    assert Product(3, 2, 4, 5).flop == 3 * 2 * (2 * 4 * 5)


@pytest.mark.parametrize("chip", ["cpu", "sim"])
def test_products_and_copies_have_rates_in_the_subjects_dtype(examine_on: Examine, chip: str) -> None:
    record = examine_on("software", chip_spec=chip)
    own, cube = rates(record, "product rate")
    assert (own["product"], own["of"]) == ("128x32x128", "the subject's largest")
    assert own["dtype"] == cube["dtype"] == "float32"
    assert own["flop_per_s"] > 0
    assert cube["flop_per_s"] > 0
    (copied,) = rates(record, "memory rate")
    assert copied["bytes_per_s"] > 0


def test_a_slow_product_is_a_low_rate_and_no_long_exam(examine_on: Examine) -> None:
    def slow(op: Any, args: Any, kwargs: Any, compute: Any) -> Any:
        time.sleep(0.5)
        return compute(*args, **kwargs)

    record = examine_on("software", Broken(slow, ("aten.mm.",)))
    _, cube = rates(record, "product rate")
    assert cube["flop_per_s"] <= 2 * 1024**3 / 0.5
    assert cube["product"] in ("512x512x512", "1024x1024x1024")


def test_a_rate_that_the_chip_refuses_is_said(examine_on: Examine) -> None:
    def refuses(op: Any, args: Any, kwargs: Any, compute: Any) -> Any:
        raise RuntimeError("no memory for that")

    record = examine_on("software", Broken(refuses, ("aten.mm.",)))
    assert rates(record, "product rate") == []
    assert any("product rate in float32: RuntimeError: no memory" in each for each in record.not_covered)
    assert len(rates(record, "memory rate")) == 1


def test_a_plan_reads_the_rates_of_a_real_report(tmp_path: Path) -> None:
    subject, path = tmp_path / "model", tmp_path / "report.json"
    subject.mkdir()
    config = {
        "model_type": "llama", "dtype": "bfloat16", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64,
    }  # fmt: skip
    (subject / "config.json").write_text(json.dumps(config))
    qualify(Request(str(subject), "sim", "serve", "smoke", path, exams=named_exams(["software"]), time_s=600.0))
    entries = [each for exam in json.loads(path.read_text())["exams"] for each in exam["measurements"]]
    fastest = max(each["flop_per_s"] for each in entries if each.get("kind") == "product rate")
    cluster = replace(parse_cluster({"name": "x", "chip": "H200", "num_chips": 8}, "x.toml"), matches=("^sim",))
    found, notes = with_report(cluster, path)
    assert found.figures["product_share"].value == pytest.approx(fastest / cluster.hardware.bf16_flops)
    assert found.figures["memory_gb_s"].origin == "measured"
    assert not any("product rate" in each or "memory rate" in each for each in notes)
