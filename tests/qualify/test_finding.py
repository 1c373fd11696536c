"""The roll-up of findings into verdicts, and the order in which people see them."""

from __future__ import annotations

from typing import Any

import pytest

from crosschip.qualify.finding import EXIT_CODES, Coverage, ExamRecord, Finding, roll_up, worst_first


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


def test_documents_go_both_ways() -> None:
    one = finding("FAIL", critical=True)
    assert Finding.from_document(one.document()) == one
