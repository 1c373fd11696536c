"""Questions for which there is no time count as asked in vain: a few answers say nothing of the model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from crosschip.qualify.serving.answers import Answer
from crosschip.qualify.serving.ending import examine_reasoning
from tests.qualify.serving.sitting_made import sitting

QUESTIONS = ("a?", "b?", "c?", "d?", "e?")


@pytest.mark.parametrize("num_answered", [1, 2, 3, 5])
def test_most_of_all_questions_must_end_badly_for_a_failure(tmp_path: Path, num_answered: int) -> None:
    asked: list[str] = []

    def cut_off(body: dict[str, Any], path: str) -> Answer:
        asked.append(path)
        if len(asked) == num_answered:
            made.until = time.monotonic() - 1
        return Answer("on and on", finish_reason="length")

    made = sitting(tmp_path, cut_off, questions=QUESTIONS)
    examine_reasoning(made)
    record = made.record.document()
    assert len(asked) == num_answered
    assert record["verdict"] == ("FAIL" if num_answered > len(QUESTIONS) / 2 else "INCONCLUSIVE")
    assert (record["coverage"]["parts"]["made"], record["coverage"]["parts"]["planned"]) == (num_answered, 5)
    of_all = f" (to {num_answered} of 5 questions)" if num_answered < 5 else ""
    assert made.record.findings[0].message.startswith(f"{num_answered} of {num_answered} answers{of_all} do not")
