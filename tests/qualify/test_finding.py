"""The roll-up of findings into verdicts, and the order in which people see them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crosschip.qualify.finding import EXIT_CODES, Coverage, ExamRecord, Finding, roll_up, worst_first
from crosschip.qualify.report_document import ReportHead, report_document


def finding(verdict: Any, critical: bool = False, severity: float = 1.0, subject: str = "aten.mm") -> Finding:
    return Finding("operators", "numerics", verdict, subject, "check", "words", critical=critical, severity=severity)


@pytest.mark.parametrize(
    ("findings", "verdict"),
    [
        ([], "PASS"),
        ([finding("PASS WITH LIMITS")], "PASS WITH LIMITS"),
        ([finding("INCONCLUSIVE")], "PASS WITH LIMITS"),
        ([finding("INCONCLUSIVE", critical=True)], "INCONCLUSIVE"),
        ([finding("INCONCLUSIVE", critical=True), finding("FAIL")], "FAIL"),
    ],
)
def test_roll_up(findings: list[Finding], verdict: str) -> None:
    assert roll_up(findings) == verdict


def test_an_exam_that_checked_nothing_or_did_not_end_is_inconclusive_unless_it_failed() -> None:
    assert ExamRecord("operators").verdict == "INCONCLUSIVE"
    assert ExamRecord("operators", num_checks={"gate": 3}).verdict == "PASS"
    assert ExamRecord("operators", num_checks={"gate": 3}, ended="hang").verdict == "INCONCLUSIVE"
    assert ExamRecord("operators", [finding("FAIL")], ended="hang").verdict == "FAIL"
    assert roll_up([], [ExamRecord("operators", num_checks={"gate": 1}), ExamRecord("attention")]) == "INCONCLUSIVE"


@pytest.mark.parametrize(("made", "verdict"), [(49, "INCONCLUSIVE"), (50, "PASS"), (100, "PASS")])
def test_an_exam_that_reached_too_little_of_its_plan_is_inconclusive_and_says_so(made: int, verdict: str) -> None:
    record = ExamRecord("attention", num_checks={"case": made}, coverage={"cases": Coverage(made, 100, 0.5)})
    assert record.verdict == verdict
    told = record.document()["not_covered"]
    assert told == ([] if made == 100 else told)
    assert ("a verdict needs 50%" in " ".join(told)) == (verdict == "INCONCLUSIVE")


def test_exit_codes_are_those_that_scripts_rely_on() -> None:
    assert EXIT_CODES == {"PASS": 0, "PASS WITH LIMITS": 0, "FAIL": 1, "INCONCLUSIVE": 3}


def test_order() -> None:
    ordered = worst_first(
        [
            finding("PASS WITH LIMITS", subject="fourth"),
            finding("FAIL", severity=2.0, subject="third"),
            finding("FAIL", severity=9.0, subject="second"),
            finding("FAIL", critical=True, subject="first"),
        ]
    )
    assert [each.subject for each in ordered] == ["first", "second", "third", "fourth"]


def test_a_severity_that_is_no_number_comes_first_and_parts_no_order() -> None:
    severities = [1.0, float("nan"), 3.0, 2.0]
    ordered = worst_first([finding("FAIL", severity=each, subject=str(each)) for each in severities])
    assert [each.subject for each in ordered] == ["nan", "3.0", "2.0", "1.0"]


def test_a_report_is_json_whatever_was_measured() -> None:
    nan, infinity = float("nan"), float("inf")
    record = ExamRecord("operators", [replace(finding("FAIL", severity=infinity), measured=nan)], {"made": 1})
    record.measurements.append({"series": [[0.0, -infinity], (1.0, 2.0)]})
    head = ReportHead("sim", "train", "smoke", "tiny", "tiny", Path("report.json"), 0.0)
    report = json.loads(json.dumps(report_document(head, [record], 1.0), allow_nan=False))
    assert (report["findings"][0]["measured"], report["findings"][0]["severity"]) == ("nan", "inf")
    assert report["exams"][0]["measurements"] == [{"series": [[0.0, "-inf"], [1.0, 2.0]]}]


def test_a_failure_without_a_reproducer_has_the_command_that_looks_again() -> None:
    again = ["crosschip", "qualify", "--model", "my models/a.toml", "--exams"]
    head = ReportHead("sim", "train", "smoke", "tiny", "tiny", Path("report.json"), 0.0, again=again)
    findings = [finding("FAIL"), replace(finding("FAIL"), reproducer="file.py"), finding("PASS WITH LIMITS")]
    found = report_document(head, [ExamRecord("operators", findings, {"made": 1})], 1.0)["findings"]
    shown = {each["details"].get("again") for each in found if each["verdict"] == "FAIL" and not each["reproducer"]}
    assert shown == {"crosschip qualify --model 'my models/a.toml' --exams operators"}
    assert sum("again" in each["details"] for each in found) == 1


def test_documents_go_both_ways() -> None:
    one = finding("FAIL", critical=True)
    assert Finding.from_document(one.document()) == one
