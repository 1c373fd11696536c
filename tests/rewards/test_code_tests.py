from __future__ import annotations

import json

import pytest

from crosschip.errors import DataError
from crosschip.rewards.code_tests import candidate_of, check_code, parse_problem
from crosschip.rewards.sandbox import Limits, ScriptRun
from tests.rewards.attempts import attempt

ADD = "```python\ndef add(a, b):\n    return a + b\n```"
SUMS = json.dumps({"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7"]})
READS = "```python\na, b = map(int, input().split())\nprint(a + b, end=' \\n\\n')\n```"


@pytest.mark.parametrize(
    ("answer", "candidate"),
    [
        ("x = 1", "x = 1"),
        ("Here:\n```python\nx = 1\n```\nbye", "x = 1"),
        ("```python\nx = 1\n```\nbetter:\n```py\nx = 2\n```", "x = 2"),
        ("```python\nx = 1\n```\nrun it:\n```\n$ python x.py\n```", "x = 1"),
        ("```\nx = 1\n```", "x = 1"),
        ("```python\nx = 1", "x = 1"),
        ("```bash\nls\n```", ""),
        ("  ```Python\r\nx = 1\r\n  ```", "x = 1\r"),
    ],
)
def test_the_candidate_is_the_last_block_of_python(answer: str, candidate: str) -> None:
    assert candidate_of(answer) == candidate


@pytest.mark.parametrize("expected", ["assert add(2, 2) == 4", json.dumps({"tests": "assert add(2, 2) == 4"})])
def test_tests_that_hold_are_a_point_and_others_none(expected: str) -> None:
    assert check_code(attempt(ADD, expected)) == 1.0
    assert check_code(attempt(ADD.replace("+", "-"), expected)) == 0.0


def test_inputs_are_run_one_by_one_and_compared_with_outputs() -> None:
    assert check_code(attempt(READS, SUMS)) == 1.0
    assert check_code(attempt(READS.replace("a + b", "3"), SUMS)) == 0.0
    assert check_code(attempt(READS.replace("```\n", "```").replace("\n```", "\nexit(1)\n```"), SUMS)) == 0.0


def test_the_inputs_share_the_time() -> None:
    slow = "```python\nimport time\ntime.sleep(0.4)\nprint(1)\n```"
    many = json.dumps({"inputs": [""] * 50, "outputs": ["1"] * 50})
    assert check_code(attempt(slow, many), Limits(wall_s=1.0)) == 0.0


def test_starting_the_sandbox_takes_nothing_from_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    own_s = [0.25, 0.5, 0.0]

    def run(candidate: str, text: str, limits: Limits) -> ScriptRun:
        given.append(limits.wall_s)
        return ScriptRun("1", own_s[len(given) - 1])

    monkeypatch.setattr("crosschip.rewards.code_tests.run_script", run)
    cases = json.dumps({"inputs": [""] * 3, "outputs": ["1"] * 3})
    assert check_code(attempt(READS, cases), Limits(wall_s=1.0)) == 1.0
    assert given == [1.0, 0.75, 0.25]


@pytest.mark.parametrize("answer", ["", " \n", "def broken(:", "\0", "\ud800", "(" * 100_000, "x = " + "9" * 10_000])
def test_what_is_no_program_is_no_point(answer: str) -> None:
    assert check_code(attempt(answer, "assert add(2, 2) == 4")) == 0.0


def test_reasoning_that_never_ends_holds_no_program() -> None:
    assert check_code(attempt("x = 1", "assert x", closed=False)) == 0.0


@pytest.mark.parametrize(
    ("expected", "word"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("assert add(", "no Python"),
        ("{1: 2", "no JSON"),
        ("{}", "an object of"),
        ('{"tests": 1}', "an object of"),
        ('{"tests": ""}', "empty"),
        ('{"tests": "x", "inputs": []}', "an object of"),
        ('{"inputs": [], "outputs": []}', "0 inputs"),
        ('{"inputs": ["1"], "outputs": []}', "1 inputs and 0 outputs"),
        ('{"inputs": [1], "outputs": ["1"]}', "not lists of texts"),
        ('{"inputs": "1", "outputs": ["1"]}', "not lists of texts"),
    ],
)
def test_tests_that_cannot_be_run_are_an_error_of_the_row(expected: str, word: str) -> None:
    with pytest.raises(DataError, match=word):
        check_code(attempt(ADD, expected))
    with pytest.raises(DataError, match=word):
        parse_problem(expected)
