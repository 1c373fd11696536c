"""The report of a qualification as one JSON document. Documents only: no torch."""

from __future__ import annotations

import math
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crosschip import __version__
from crosschip.qualify.finding import ExamRecord, Finding, Role, Tier, roll_up, worst_first

__all__ = ["ReportHead", "report_document", "reproducers_of"]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ReportHead:
    """What a report is about. `began_at` is in seconds since the epoch.

    `again` is a command that takes one exam again, whose name follows it; empty where there is none.
    """

    chip: str
    role: Role
    tier: Tier
    subject: str
    origin: str
    report: Path
    began_at: float
    seed: int = 0
    compute_dtype: str | None = None
    fingerprint: dict[str, Any] | None = None
    trace: dict[str, Any] = field(default_factory=dict)
    again: Sequence[str] = ()


def report_document(
    head: ReportHead, records: Sequence[ExamRecord], time_s: float, complete: bool = True
) -> dict[str, Any]:
    """The report; before all exams are done it says so, and its verdict is at best inconclusive.

    NaN and infinities, which JSON does not have, are words in it: "nan", "inf", "-inf".
    """
    findings = [finding for record in records for finding in record.findings]
    verdict = roll_up(findings, records)
    if not complete and verdict != "FAIL":
        verdict = "INCONCLUSIVE"
    document = {
        "schema_version": SCHEMA_VERSION,
        "document": "qualification",
        "crosschip": __version__,
        "verdict": verdict,
        "role": head.role,
        "chip": head.chip,
        "tier": head.tier,
        "complete": complete,
        "subject": head.subject,
        "origin": head.origin,
        "compute_dtype": head.compute_dtype,
        "seed": head.seed,
        "began": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(head.began_at)),
        "time_s": round(time_s, 1),
        "exams": [record.document() for record in records],
        "findings": [_in_report(finding, head) for finding in worst_first(findings)],
        "trace": _trace_summary(head.trace),
        "fingerprint": head.fingerprint,
    }
    return {key: _in_words(value) for key, value in document.items()}


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a chip's own words may hold a terminal's commands


def _in_words(value: Any) -> Any:
    """The value with words for what JSON does not have (numbers that are not finite, halves of surrogate pairs) and for
    what no terminal should be given.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str):
        shown = value.encode("utf-8", "backslashreplace").decode()
        return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", shown)
    if isinstance(value, dict):
        return {key: _in_words(each) for key, each in value.items()}
    return [_in_words(each) for each in value] if isinstance(value, list | tuple) else value


def reproducers_of(report: Path) -> Path:
    """Where the reproducers of a report lie."""
    return report.resolve().parent / "reproducers" / report.stem


def _in_report(finding: Finding, head: ReportHead) -> dict[str, Any]:
    """A finding with the whole path of its reproducer and the time since the beginning.

    A failure that no file shows has the command that looks for it again among its details.
    """
    document = finding.document()
    found_at = document.pop("found_at")
    document["found_after_s"] = None if found_at is None else round(found_at - head.began_at, 1)
    if finding.reproducer:
        document["reproducer"] = str(reproducers_of(head.report) / finding.reproducer)
    elif head.again and finding.verdict == "FAIL":
        document["details"] = {"again": shlex.join([*head.again, finding.exam]), **finding.details}
    return document


def _trace_summary(trace: dict[str, Any]) -> dict[str, Any] | None:
    if not trace:
        return None
    calls = trace["calls"]
    return {
        "num_calls": sum(call["count"] for call in calls),
        "num_distinct_calls": len(calls),
        "operators": sorted({call["operator"] for call in calls}),
        "notes": trace.get("notes", []),
    }
