"""Qualification reports by hand, through the same documents that `qualify` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crosschip.qualify.finding import Coverage, ExamRecord, Finding
from crosschip.qualify.report_document import ReportHead, report_document
from crosschip.report.thoroughness import LONGER_EXAMS, SMOKE_EXAMS

SIZES = [2**power for power in range(10, 24)]
STEPS = list(range(12))
LOSSES = [6.0 - 0.2 * step for step in STEPS]


def ratio(operator: str, value: float, verdict: str = "pass", **more: Any) -> dict[str, Any]:
    return {
        "operator": operator, "call": f"{operator} float32[8,8]", "verdict": verdict, "ratio": value,
        "lower": 0.9 * value, "upper": 1.1 * value, **more,
    }  # fmt: skip


def attention(keys: int, value: float, form: str = "") -> dict[str, Any]:
    case = f"dtype=float32 batch=2 heads=1 queries=4 keys={keys} head_size=48 {form} values=normal"
    return {"operator": "scaled_dot_product_attention", "case": case, "ratio": value, "lower": value, "upper": value}


MEASURED: dict[str, list[dict[str, Any]]] = {
    "operators": [ratio("aten.mm.default", 0.97), ratio("aten.mm.default", 6.1, "fail"), ratio("aten.exp.default", 1)],
    "attention": [attention(128, 0.9), attention(1024, 3.7), attention(128, 0.8, "mask_kind=boolean")],
    "rehearsal": [
        {"kind": "loss curve", "seed": 0, "steps": STEPS, "chip": LOSSES, "reference": LOSSES, "control": LOSSES},
        {"kind": "gradient norm ratio", "seed": 0, "steps": STEPS, "chip": [1.0] * 12},
        {"kind": "equivalence", "mean": 0.001, "lower": 0.0, "upper": 0.002, "margin": 0.005},
    ],
    "links": [
        {
            "plot": "bandwidth", "collective": "all_reduce", "num_ranks": 2, "sizes_bytes": SIZES,
            "seconds": [4e-5 + size / 2e9 for size in SIZES], "latency_s": 4e-5, "bandwidth_gb_s": 2.0,
        }
    ],
    "stability": [
        {
            "plot": "series", "title": "Memory in use", "unit": "MB", "x_unit": "s", "x": [0, 60, 120],
            "y": [800.0, 801.0, 803.0], "slope": 0.025, "limit": 900.0,
        }
    ],
    "software": [{"what": "speed", "proportion": 1.1, "launch_s": 4e-6}, {"never": "seen", "nested": {"a": [1, 2]}}],
}  # fmt: skip
NUM_DRAWN = 6


def finding(verdict: Any, subject: str = "aten.mm.default", **more: Any) -> Finding:
    return Finding(
        "operators",
        "numerics",
        verdict,
        subject,
        "error_ratio",
        f"{subject} is off",
        6.1,
        2.5,
        "the honest ones",
        **more,
    )


def qualification(
    *findings: Finding,
    chip: str = "npu:0",
    model_name: str | None = "Ascend910B2",
    role: Any = "train",
    tier: Any = "smoke",
    subject: str = "first",
    complete: bool = True,
    measured: dict[str, list[dict[str, Any]]] | None = None,
    dtype: str | None = "bfloat16",
    began_at: float = 1.8e9,
    exams: tuple[str, ...] | None = None,
) -> dict[str, Any]:
    """A report with these findings (of the exam `operators`) and everything measured that is given."""
    measured = {} if measured is None else measured
    taken = exams or (SMOKE_EXAMS if tier == "smoke" else LONGER_EXAMS)
    records = [
        ExamRecord(
            exam,
            list(findings) if exam == "operators" else [],
            {"a check": 7},
            measured.get(exam, []),
            [f"{exam}: something else"],
            {"cases": Coverage(8, 10, 0.5)},
        )
        for exam in dict.fromkeys([*taken, *measured])
    ]
    known = {
        "name": chip,
        "model_name": model_name,
        "vendor": "?",
        "memory_bytes": 64 * 10**9,
        "dtypes": {"bfloat16": "computes"},
    }
    head = ReportHead(
        chip=chip,
        role=role,
        tier=tier,
        subject=subject,
        origin="recipes/first.toml",
        report=Path("out/report.json"),
        began_at=began_at,
        compute_dtype=dtype,
        fingerprint={"chip": known, "host": {"name": "lab-3"}} if model_name else None,
        trace={"calls": [{"count": 3, "operator": "aten.mm.default"}]},
    )
    return report_document(head, records, 101.3, complete)


def speed(value: float, half_width: float, what: str = "decoding", unit: str = "tokens/s") -> dict[str, Any]:
    return {
        "kind": "speed", "what": what, "value": value, "lower": value - half_width, "upper": value + half_width,
        "unit": unit,
    }  # fmt: skip
