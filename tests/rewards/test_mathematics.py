from __future__ import annotations

import pytest

from crosschip.errors import DataError
from crosschip.rewards.mathematics import check_math, last_boxed
from tests.rewards.attempts import attempt


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ("\\frac{1}{2}", "1/2"),
        ("12345", "12\\,345"),
        ("1\\,000\\,000", "1000000"),
        ("(1,\\ 200)", "(1, 200)"),
        ("0.5", "\\frac{1}{2}"),
        ("\\frac12", "$\\frac{1}{2}$"),
        ("2\\sqrt{2}", "\\sqrt{8}"),
        ("x^2+2x+1", "(x+1)^2"),
        ("(1, 2)", "(1,2)"),
        ("\\{1,2\\}", "\\{2,1\\}"),
        ("72", "the answer is \\boxed{72}"),
        ("\\text{Monday}", "\\text{Monday}"),
        ("1,000", "1000"),
        ("72", "48 / 2 = 24, and 48 + 24 = 72\n#### 72"),  # as GSM8K has it
    ],
)
def test_an_expression_in_another_form_is_right(box: str, expected: str) -> None:
    assert check_math(attempt(f"So it is $\\boxed{{{box}}}$.", expected)) == 1.0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("\\boxed{3}", "4"),
        ("4", "4"),  # no box
        ("\\boxed{4} or \\boxed{5}", "4"),
        ("\\boxed{4", "4"),
        ("\\boxed{}", "4"),
        ("\\boxed{\\frac{}{}{", "4"),
        ("\\boxed{)(}", "4"),
        ("\\boxed{" + "1+" * 5_000 + "1}", "5001"),  # longer than any answer
        ("\\boxed{x+1}", "x+2"),
        ("\\boxed{\\text{Sunday}}", "\\text{Monday}"),
    ],
)
def test_a_wrong_or_absent_expression_is_not(answer: str, expected: str) -> None:
    assert check_math(attempt(answer, expected)) == 0.0


def test_reasoning_that_never_ends_holds_no_answer() -> None:
    assert check_math(attempt("\\boxed{4}", "4", closed=False)) == 0.0


def test_a_row_without_an_answer_is_an_error() -> None:
    with pytest.raises(DataError, match="empty"):
        check_math(attempt("\\boxed{4}", " $ $ "))


def test_the_braces_of_a_box_are_matched() -> None:
    assert last_boxed("\\boxed{1} \\boxed{\\frac{1}{2}} {") == "\\frac{1}{2}"
    assert last_boxed("no box") is None
    assert last_boxed("\\boxed{{" + "}" * 1) is None
