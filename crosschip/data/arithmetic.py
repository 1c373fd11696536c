"""Verifiable problems made on the spot: the data set that needs no download.

The levels, each with the steps written out (see `written_methods`):

1. sums of two or three numbers of one or two digits, and one difference in six: `What is 47 + 38 + 5?`
2. sums and differences of two to four numbers of up to three digits, with borrows
3. two or three digits times one digit
4. three or four digits divided by one digit without a rest, and two digits times two digits
5. brackets: `(12 + 7) * 3 - 8`
6. stories of two steps

A problem is a pure function of (level, seed, index). A twentieth of all problems is held out by a hash of the numbers
and signs in the question, so the same sum in another wording, or under another seed, is on the same side.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from crosschip.data.rows import Message, Row, falls_below
from crosschip.data.word_problems import STORIES
from crosschip.data.written_methods import add, chain, divide, multiply, multiply_by_digit, subtract
from crosschip.errors import DataError

__all__ = ["HELD_OUT_SHARE", "LEVELS", "Problem", "held_out_problems", "is_held_out", "make_problem"]

HELD_OUT_SHARE = 0.05
_WORDINGS = ("What is {}?", "Calculate {}.", "How much is {}?")
_MAX_TRIES_WITHOUT_A_NEW_ONE = 4_000  # then hardly one in 200 held-out questions of the level is left
_Made = tuple[str, str, int]  # question, steps, result


@dataclass(frozen=True)
class Problem:
    """A question, the steps to its answer, and the answer as it is to be written."""

    question: str
    reasoning: str
    answer: str
    level: int

    def as_row(self) -> Row:
        """The problem as a conversation of one question and one reasoned answer."""
        return Row(messages=(Message("user", self.question), Message("assistant", self.answer, self.reasoning)))


def make_problem(level: int, seed: int, index: int) -> Problem:
    """The problem number `index` of a level; an unknown level is a `DataError`."""
    if level not in LEVELS:
        raise DataError(f"arithmetic level {level} does not exist", f"use levels from {sorted(LEVELS)}")
    digest = hashlib.sha256(f"{level} {seed} {index}".encode()).digest()
    question, reasoning, result = LEVELS[level](random.Random(int.from_bytes(digest[:8], "big")))
    return Problem(question, reasoning, str(result), level)


def is_held_out(question: str, share: float = HELD_OUT_SHARE) -> bool:
    """Whether a question may never be trained on; decided by its numbers and signs alone."""
    return falls_below("".join(re.findall(r"\d+|[-+*/()]| (?=\d)", question)), share)


def held_out_problems(level: int, count: int, seed: int) -> list[Problem]:
    """`count` held-out problems with distinct questions; a level with too few of them is a `DataError`."""
    problems: dict[str, Problem] = {}
    index = last_new = 0
    while len(problems) < count and index - last_new < _MAX_TRIES_WITHOUT_A_NEW_ONE:
        problem = make_problem(level, seed, index)
        if is_held_out(problem.question) and problem.question not in problems:
            problems[problem.question] = problem
            last_new = index
        index += 1
    if len(problems) < count:
        raise DataError(
            f"{count} distinct held-out problems of level {level} were asked for, and only {len(problems)} were found",
            f"ask for at most {len(problems)} (evaluate.num_problems), or take another level",
        )
    return list(problems.values())


def _asked(rng: random.Random, expression: str) -> str:
    return rng.choice(_WORDINGS).format(expression)


def _small_number(rng: random.Random) -> int:
    return rng.randint(1, 9) if rng.random() < 0.25 else rng.randint(10, 99)


def _level_1(rng: random.Random) -> _Made:
    if rng.random() < 1 / 6:
        smaller, larger = sorted((_small_number(rng), _small_number(rng)))
        steps, result = subtract(larger, smaller)
        return _asked(rng, f"{larger} - {smaller}"), steps, result
    numbers = [_small_number(rng) for _ in range(rng.choice((2, 3)))]
    steps, result = chain(numbers, "+" * (len(numbers) - 1))
    return _asked(rng, " + ".join(map(str, numbers))), steps, result


def _level_2(rng: random.Random) -> _Made:
    total = rng.randint(10, 999)
    numbers, operators, expression = [total], "", str(total)
    for _ in range(rng.randint(1, 3)):
        operator = rng.choice("+-") if total > 9 else "+"
        number = rng.randint(2, min(total, 999)) if operator == "-" else rng.randint(10, 999)
        total += number if operator == "+" else -number
        numbers.append(number)
        operators += operator
        expression += f" {operator} {number}"
    steps, result = chain(numbers, operators)
    return _asked(rng, expression), steps, result


def _level_3(rng: random.Random) -> _Made:
    number, digit = rng.randint(11, 99) if rng.random() < 0.5 else rng.randint(100, 999), rng.randint(2, 9)
    steps, result = multiply_by_digit(number, digit)
    return _asked(rng, f"{number} * {digit}"), steps, result


def _level_4(rng: random.Random) -> _Made:
    if rng.random() < 0.5:
        digit = rng.randint(2, 9)
        number = digit * rng.randint(-(-100 // digit), 9999 // digit)
        steps, result = divide(number, digit)
        return _asked(rng, f"{number} / {digit}"), steps, result
    a, b = rng.randint(11, 99), rng.randint(11, 99)
    steps, result = multiply(a, b)
    return _asked(rng, f"{a} * {b}"), steps, result


def _level_5(rng: random.Random) -> _Made:
    a, b, digit = rng.randint(11, 99), rng.randint(2, 99), rng.randint(2, 9)
    inner_sign = rng.choice("+-") if b < a else "+"
    inner_steps, inner = (add if inner_sign == "+" else subtract)(a, b)
    product_steps, product = multiply_by_digit(inner, digit)
    outer_sign = rng.choice("+-") if product > 1 else "+"
    c = rng.randint(1, min(product, 99)) if outer_sign == "-" else rng.randint(1, 99)
    outer_steps, result = (add if outer_sign == "+" else subtract)(product, c)
    expression = f"({a} {inner_sign} {b}) * {digit} {outer_sign} {c}"
    return _asked(rng, expression), f"{inner_steps} {product_steps} {outer_steps}", result


def _level_6(rng: random.Random) -> _Made:
    return rng.choice(STORIES)(rng)


LEVELS: dict[int, Callable[[random.Random], _Made]] = {
    1: _level_1,
    2: _level_2,
    3: _level_3,
    4: _level_4,
    5: _level_5,
    6: _level_6,
}
