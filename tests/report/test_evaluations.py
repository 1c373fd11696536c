"""Two evaluations compared: the numbers are those of the textbook tests, and what cannot be paired is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from crosschip.errors import RunDirectoryError
from crosschip.report.evaluations import compare_evaluations, comparison_lines, evaluation_lines, read_evaluation
from crosschip.rundir import write_json


def evaluation(rights: list[bool], drawn: list[list[bool]] | None = None, **settings: Any) -> dict[str, Any]:
    rows: list[dict[str, Any]] = [
        {"question": f"question {number}", "expected": "1", "right": right} for number, right in enumerate(rights)
    ]
    for row, answers in zip(rows, drawn or [], strict=False):
        row["drawn"] = [{"right": right} for right in answers]
    return {"schema_version": 2, "stage": "sft", "step": 7, "problems": rows, **settings}


def test_one_pair_a_problem_is_mcnemars_exact_test() -> None:
    a = [True] * 100 + [True] * 5 + [False] * 17 + [False] * 78
    b = [True] * 100 + [False] * 5 + [True] * 17 + [False] * 78
    found = compare_evaluations(evaluation(a), evaluation(b))["greedy"]
    assert (found["only_a"], found["only_b"]) == (5, 17)
    assert found["difference"] == pytest.approx(0.06)
    assert found["p"] == pytest.approx(stats.binomtest(5, 22).pvalue)
    assert found["low_95"] < 0.06 < found["high_95"]
    assert found["bootstrap_low_95"] < 0.06 < found["bootstrap_high_95"]
    text = "\n".join(comparison_lines(compare_evaluations(evaluation(a), evaluation(b))))
    assert "B - A      +6.0 points" in text
    assert "so         B is better" in text
    assert "B is worse" in "\n".join(comparison_lines(compare_evaluations(evaluation(b), evaluation(a))))


def test_few_problems_show_nothing_and_say_what_they_could_see() -> None:
    document = compare_evaluations(evaluation([True] * 20 + [False] * 10), evaluation([True] * 22 + [False] * 8))
    assert document["greedy"]["smallest_detectable"] > 0.2
    text = "\n".join(comparison_lines(document))
    assert "no difference is shown; that is not the same as being equal" in text
    assert "with 80 % power; one point would take" in text


def test_drawn_answers_of_one_problem_hang_together() -> None:
    """Ten problems on which all eight answers fall one way are ten, not eighty."""
    a = evaluation([True] * 20, [[False] * 8] * 7 + [[True] * 8] * 13)
    b = evaluation([True] * 20, [[True] * 8] * 7 + [[True] * 8] * 10 + [[False] * 8] * 3)
    found = compare_evaluations(a, b)["drawn"]
    assert (found["num_problems"], found["num_pairs"]) == (20, 160)
    assert found["p"] == pytest.approx(stats.binomtest(3, 10).pvalue)
    assert "sign-flip test over problems" in "\n".join(comparison_lines(compare_evaluations(a, b)))


def test_only_problems_of_both_are_paired_and_settings_that_differ_are_told() -> None:
    a, b = evaluation([True] * 5, max_new_tokens=100), evaluation([True] * 3, max_new_tokens=50)
    document = compare_evaluations(a, b)
    assert (document["num_common"], document["num_only_a"], document["num_only_b"]) == (3, 2, 0)
    text = "\n".join(comparison_lines(document))
    assert "2 problems are in A alone" in text
    assert "NOT the same on both sides: max_new_tokens 100 and 50" in text
    b["problems"] = [{"question": "another", "expected": "2", "right": True}]
    with pytest.raises(RunDirectoryError, match="no problem in common"):
        compare_evaluations(a, b)


def test_a_question_that_is_asked_twice_counts_twice() -> None:
    document = evaluation([True, False])
    document["problems"][1]["question"] = "question 0"
    assert compare_evaluations(document, document)["num_common"] == 2


def test_older_documents_are_read_and_newer_ones_refused(tmp_path: Path) -> None:
    old = evaluation([True, False]) | {"schema_version": 1}
    write_json(tmp_path / "evaluation.json", old)
    assert read_evaluation(tmp_path) == old  # a run directory holds one
    write_json(tmp_path / "new.json", old | {"schema_version": 3})
    with pytest.raises(RunDirectoryError, match="schema version 3"):
        read_evaluation(tmp_path / "new.json")
    write_json(tmp_path / "none.json", {"schema_version": 2})
    with pytest.raises(RunDirectoryError, match="no problems"):
        read_evaluation(tmp_path / "none.json")


def test_a_checker_that_failed_has_a_row_of_its_own() -> None:
    figures = {
        "score": 0.0,
        "score_low_95": 0.0,
        "score_high_95": 0.9,
        "num_right": 0,
        "num_problems": 2,
        "closed_reasoning_share": 1.0,
        "finished_share": 0.5,
        "num_checker_errors": 3,
        "first_checker_error": "my:checker: ValueError: no such unit",
        "drawn": {"num_answers": 4},
    }
    line = evaluation_lines(evaluation([False, False]) | figures)[-1]
    assert line.split("  ")[0] == "checker failed"
    assert "3 of 6 answers" in line
    assert line.endswith("first: my:checker: ValueError: no such unit")


def test_prompts_without_room_have_rows_of_their_own() -> None:
    figures = {
        "score": 0.0,
        "score_low_95": 0.0,
        "score_high_95": 0.9,
        "num_right": 0,
        "num_problems": 2,
        "closed_reasoning_share": 0.0,
        "finished_share": 0.0,
        "max_new_tokens": 64,
    }
    document = evaluation([False, False]) | figures
    short = {"num_prompts_too_long": 1, "num_prompts_with_less_room": 2}
    too_long, less_room = evaluation_lines(document | short)[-2:]
    assert [" ".join(line.split()) for line in (too_long, less_room)] == [
        "prompt too long 1 of 2 not answered, and counted as wrong",
        "less room 2 of 2 for fewer than 64 tokens of answer",
    ]
    assert len(evaluation_lines(document | dict.fromkeys(short, 0))) == len(evaluation_lines(document)) == 3


def test_the_table_of_a_version_1_document() -> None:
    figures = {
        "score": 0.5,
        "score_low_95": 0.1,
        "score_high_95": 0.9,
        "num_right": 1,
        "num_problems": 2,
        "closed_reasoning_share": 1.0,
        "finished_share": 0.5,
    }
    lines = evaluation_lines(evaluation([True, False]) | figures)
    assert len(lines) == 3
    assert lines[0].startswith("greedy")
    assert "1 of 2 right" in lines[0]
