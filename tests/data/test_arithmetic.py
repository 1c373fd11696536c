import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosschip.data import Problem, held_out_problems, make_problem, open_source
from crosschip.data.arithmetic import HELD_OUT_SHARE, LEVELS, is_held_out
from crosschip.data.written_methods import add, divide, multiply, subtract
from crosschip.errors import DataError
from crosschip.recipe import DataSettings

EQUATION = re.compile(r"(?<![\d*+\-/])([\d*+-]+)=([\d*+]+)")
natural = st.integers(0, 99_999)


def wrong_equations(steps: str) -> list[str]:
    """Every `3+4=7` in the steps whose two sides differ."""
    return [f"{left}={right}" for left, right in EQUATION.findall(steps) if eval(left) != eval(right)]


def test_the_check_of_equations_finds_a_wrong_one() -> None:
    assert wrong_equations("47+38: 7+8=15, 4+3+1=9, so 85.") == ["4+3+1=9"]


def test_the_written_methods_read_as_documented() -> None:
    assert add(47, 38) == ("47+38: 7+8=15, 4+3+1=8, so 85.", 85)
    assert subtract(83, 47) == ("83-47: 13-7=6, 8-4-1=3, so 36.", 36)
    assert multiply(47, 6) == ("47*6: 7*6=42, 4*6+4=28, so 282.", 282)
    assert divide(84, 7) == ("84/7: 8=1*7+1, 14=2*7+0, so 12.", 12)
    assert multiply(47, 36)[0].endswith("47*3: 7*3=21, 4*3+2=14, so 141. 141 and 1 zero: 1410. " + add(282, 1410)[0])


@given(natural, natural)
def test_every_step_of_a_written_method_is_true(a: int, b: int) -> None:
    for steps, result in (add(a, b), subtract(max(a, b), min(a, b)), multiply(a, b)):
        assert wrong_equations(steps) == []
        assert re.findall(r"so (\d+)\.", steps)[-1] == str(result)
    assert add(a, b)[1] == a + b
    assert subtract(max(a, b), min(a, b))[1] == abs(a - b)
    assert multiply(a, b)[1] == a * b


@given(natural, st.integers(1, 9))
def test_every_step_of_a_division_is_true(quotient: int, digit: int) -> None:
    steps, result = divide(quotient * digit, digit)
    assert result == quotient
    assert wrong_equations(steps) == []


@pytest.mark.parametrize("level", sorted(LEVELS))
def test_problems_of_a_level_are_right(level: int) -> None:
    for index in range(300):
        problem = make_problem(level, 0, index)
        assert wrong_equations(problem.reasoning) == []
        assert problem.reasoning.endswith(f"so {problem.answer}.")
        assert int(problem.answer) >= 0
        expression = re.fullmatch(r"(?:What is|Calculate|How much is) ([^a-z]+)[.?]", problem.question)
        if level < 6:
            assert expression is not None
            assert eval(expression[1]) == int(problem.answer)


def test_a_problem_is_a_pure_function_of_level_seed_and_index() -> None:
    assert make_problem(1, 5, 7) == make_problem(1, 5, 7)
    assert len({make_problem(1, seed, index) for seed in range(3) for index in range(5)}) == 15


def test_a_golden_problem_stays_as_it_is() -> None:
    """Problems are data: a change of the generator must be meant."""
    expected = "47: 14-7=7, 6-4-1=1, so 17."
    assert make_problem(1, 0, 2) == Problem("How much is 64 - 47?", f"64-{expected}", "17", 1)


def test_an_unknown_level_names_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"level 9(?s:.)*\[1, 2, 3, 4, 5, 6\]"):
        make_problem(9, 0, 0)
    with pytest.raises(DataError, match="names no known levels"):
        open_source(DataSettings(source="arithmetic", levels=[1, 7]), 0)


def test_the_wording_does_not_decide_what_is_held_out() -> None:
    pairs = [(f"What is {a} + {b}?", f"Calculate {a} + {b}.") for a in range(40) for b in range(40)]
    assert all(is_held_out(first) == is_held_out(second) for first, second in pairs)
    share = sum(is_held_out(first) for first, _ in pairs) / len(pairs)
    assert abs(share - HELD_OUT_SHARE) < 5 * (HELD_OUT_SHARE / len(pairs)) ** 0.5


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.2])
def test_held_out_problems_are_never_trained_on(fraction: float) -> None:
    settings = DataSettings(source="arithmetic", levels=[1, 3], num_problems=4_000, validation_fraction=fraction)
    trained = {row.as_messages()[0].content for row in open_source(settings, 0).rows("train")}
    assert len(trained) > 1_000
    for level in (1, 3):
        held_out = {problem.question for problem in held_out_problems(level, 200, seed=0)}
        assert len(held_out) == 200
        assert not held_out & trained


def test_too_many_held_out_problems_are_refused() -> None:
    with pytest.raises(DataError, match=r"only \d+ were found"):
        held_out_problems(3, 3_000, seed=0)
