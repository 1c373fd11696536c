"""The report in the terminal: the verdict first, then the three worst findings, then exams and what is missing."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from crosschip.qualify.finding import ExamRecord, Finding, worst_first
from crosschip.report.qualify_table import print_qualification


def finding(verdict: Any, subject: str, severity: float = 1.0, **more: Any) -> Finding:
    return Finding("operators", "numerics", verdict, subject, "error_ratio", f"{subject} is off", 4.0, 2.5, **more)


def report(*findings: Finding, complete: bool = True) -> dict[str, Any]:
    exam = ExamRecord("operators", list(findings), {"error_ratio": 7}, not_covered=["aten.cat: no time"])
    return {
        "verdict": exam.verdict,
        "chip": "sim:N11",
        "role": "train",
        "subject": "first",
        "compute_dtype": "bfloat16",
        "tier": "smoke",
        "time_s": 12.3,
        "complete": complete,
        "exams": [exam.document()],
        "findings": [each.document() for each in worst_first(findings)],
    }


def printed(document: dict[str, Any]) -> str:
    console = Console(record=True, width=120, highlight=False, file=open("/dev/null", "w"))  # noqa: SIM115
    print_qualification(document, console)
    return console.export_text()


def test_the_three_worst_stand_first_and_the_others_in_a_table() -> None:
    findings = [
        finding("PASS WITH LIMITS", "limited"),
        finding("FAIL", "bad [bold]name[/]", reproducer="bad.py"),
        finding("INCONCLUSIVE", "open"),
        finding("FAIL", "critical one", critical=True),
    ]
    text = printed(report(*findings))
    assert text.startswith("FAIL: sim:N11 to train first in bfloat16 (smoke tier, 12 s)")
    places = [text.index(words) for words in ("1. FAIL", "critical one", "2. FAIL", "bad [bold]name[/]", "3. INCONCL")]
    assert places == sorted(places)
    assert "for the vendor: bad.py" in text
    assert text.index("1 more") < text.index("limited")
    assert "measured 4, limit 2.5" in text


def test_what_was_not_covered_and_an_interruption_are_said() -> None:
    text = printed(report(complete=False))
    assert "operators: aten.cat: no time" in text
    assert "interrupted" in text
    assert "interrupted" not in printed(report())


def test_a_long_line_of_what_was_not_covered_is_cut() -> None:
    document = report()
    document["exams"][0]["not_covered"] = ["calls that were cut: " + "aten.add.Tensor (1), " * 40]
    text = printed(document)
    assert text.count("aten.add.Tensor") < 20
    assert "all of it is in the report" in text
