from __future__ import annotations

import time

import pytest

from crosschip.errors import RecipeError
from crosschip.rewards import CHECKERS, find_checker
from crosschip.rewards.attempt import as_reward, what_was_raised
from crosschip.rewards.checkers import check_arithmetic, check_format
from tests.rewards.attempts import attempt

HOSTILE = {
    "blanks": "answer: a" + " " * 100_000 + "b",
    "tabs and blanks": "answer is " + "\t " * 50_000 + "b",
    "blank lines": "answer:" + " \n" * 50_000,
    "answers": "answer: " * 12_000,
    "braces": "\\boxed{" + "{" * 100_000,
    "boxes": "\\boxed{" * 14_000,
    "fractions": "\\frac{" * 16_000,
    "digits": "9" * 100_000,
    "groups": "1" + ",111" * 25_000 + ",",
    "slashes": "1/" * 50_000,
    "dots": ".1" * 50_000,
    "minus": "-$" * 50_000,
    "hashes": "####" * 25_000,
    "tags": "<think>" * 14_000,
    "nul": "\0" * 100_000,
    "surrogates": "\ud800" * 100_000,
}


@pytest.mark.parametrize(
    ("answer", "expected", "reward"),
    [
        ("It is 72.", "72", 1.0),
        ("\\boxed{3/4}", "0.75", 1.0),
        ("73", "72", 0.0),
        ("The answer is Paris", "paris", 1.0),
        ("#### 72", "Natalia sold 48 + 24 = 72.\n#### 72", 1.0),
        ("It is 48.", "Natalia sold 48 + 24 = 72.\n#### 72", 0.0),
    ],
)
def test_arithmetic(answer: str, expected: str, reward: float) -> None:
    assert check_arithmetic(attempt(answer, expected)) == reward


def test_arithmetic_looks_for_no_answer_in_reasoning_that_never_ends() -> None:
    assert check_arithmetic(attempt("", "72", "72", closed=False)) == 0.0
    assert check_arithmetic(attempt("72", "72", None, closed=False)) == 0.0
    assert check_arithmetic(attempt("", "72", "72")) == 0.0


@pytest.mark.parametrize("expected", ["72", "Paris"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_take_no_time_in_this_process(name: str, expected: str) -> None:
    started = time.monotonic()
    assert check_arithmetic(attempt(HOSTILE[name], expected)) == 0.0
    check_format(attempt(HOSTILE[name], expected, HOSTILE[name]))
    assert time.monotonic() - started < 3  # some take 20 ms; what is quadratic would take a minute


def test_format_is_one_reasoning_and_one_answer() -> None:
    assert check_format(attempt("72")) == 1.0
    assert check_format(attempt("72", reasoning=None)) == 0.0
    assert check_format(attempt("", closed=False)) == 0.0
    assert check_format(attempt(" \n")) == 0.0
    assert check_format(attempt("72", reasoning=" ")) == 0.0
    assert check_format(attempt("72", finished=False)) == 0.0
    assert check_format(attempt("a</think>72")) == 0.0
    assert check_format(attempt("72", reasoning="a<think>")) == 0.0


def test_a_checker_is_found_by_name_or_import_path() -> None:
    assert set(CHECKERS) == {"arithmetic", "code", "format", "math"}
    assert find_checker("format") is check_format
    assert find_checker("tests.rewards.outside:length")(attempt("four")) == 4.0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("arithmetics", ["'arithmetics'", "arithmetic, code, format, math", "package.module:function"]),
        ("", ["''"]),
        ("a.b", ["'a.b'"]),
        ("os:", ["'os:'"]),
        ("os;x:y", ["'os;x:y'"]),
        ("no.such.module:f", ["'no.such.module:f'", "ModuleNotFoundError", "No module named 'no'"]),
        ("tests.rewards.broken_module:f", ["OSError: no licence file", "broken_module.py:1"]),
        ("tests.rewards.outside:lenght", ["'tests.rewards.outside:lenght'", "length"]),
        ("tests.rewards.outside:numpy_like", ["names no function"]),
    ],
)
def test_a_bad_name_is_refused_with_what_there_is(name: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as refused:
        find_checker(name)
    assert all(word in str(refused.value) for word in [*words, "what to do"])


def test_only_finite_numbers_are_rewards() -> None:
    numpy = pytest.importorskip("numpy")
    given = (1, 0.5, True, numpy.float32(0.5), numpy.int64(2), numpy.isclose(1.0, 2.0), numpy.bool_(True))
    assert [as_reward(value) for value in given] == [1, 0.5, 1, 0.5, 2, 0, 1]
    for value in (float("nan"), float("inf"), numpy.float64("nan")):
        with pytest.raises(ValueError, match="finite"):
            as_reward(value)
    for value in (None, "1", [1.0], 1j, numpy.ones(2), numpy.ones(2) > 0):
        with pytest.raises(TypeError, match="a reward is a number"):
            as_reward(value)


def test_what_was_raised_can_be_written_down() -> None:
    class Untold(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    assert what_was_raised(ValueError("no letter: \ud800")) == "ValueError: no letter: ?"
    assert "Untold: (its message cannot be told" in what_was_raised(Untold())
