"""Mathematics: the expression in the last `\\boxed{}` against the expected one, by math-verify (sympy)."""

from __future__ import annotations

import functools
import logging
import re
from typing import Any

from crosschip.errors import DataError
from crosschip.rewards.attempt import Attempt

__all__ = ["check_math", "last_boxed", "load_math_verify"]

_BOX = "\\boxed{"
_HASHES = "####"
_THIN_SPACES = re.compile(r"(?<=\d)\\[,;: ](?=\d{3}(?!\d))")  # as in 12\,345, where math-verify sees no 12345
_MAX_BOX_CHARACTERS = 1_000  # no final answer is longer, and what sympy does with it grows faster than its length


def check_math(attempt: Attempt) -> float:
    """1.0 where the last `\\boxed{}` of the answer is the expected expression in any of its forms.

    Without a box, or with one of more than 1,000 characters, it is 0.0. An expected answer that math-verify cannot
    read is a `DataError`. Some expressions (`9^{9^{9^9}}`) take sympy for ever: call it where it can be killed.
    """
    boxed = last_boxed(attempt.answer) if attempt.closed else None
    if boxed is None or not boxed.strip() or len(boxed) > _MAX_BOX_CHARACTERS:
        return 0.0
    expected = _expected_expression(attempt.expected)
    if not expected:
        raise DataError("the row's expected answer is empty", "give the rows that math checks an answer")
    if boxed.strip() == expected:
        return 1.0
    return float(_are_equal(expected, boxed))


def _expected_expression(expected: str) -> str:
    """What the row's answer holds: its box, else what follows the last `####` (as in GSM8K), else all of it."""
    return last_boxed(expected) or expected.rpartition(_HASHES)[2].strip().strip("$").strip()


def last_boxed(text: str) -> str | None:
    """What the last `\\boxed{}` holds, braces matched; None without one or where it is never closed."""
    start = text.rfind(_BOX)
    if start < 0:
        return None
    depth, begin = 1, start + len(_BOX)
    for index in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[begin:index]
    return None


def _are_equal(expected: str, boxed: str) -> bool:
    math_verify = load_math_verify()
    gold = _parsed(expected)
    if not gold:
        raise DataError(
            f"math-verify cannot read the row's expected answer {expected!r:.200}",
            "write it as LaTeX or as a number, or take another checker for these rows",
        )
    # Its own time limit is a signal, which works in a main thread only; ours is the worker's, which is killed.
    return bool(math_verify.verify(gold, _parsed(boxed), timeout_seconds=None))


def _parsed(expression: str) -> Any:
    math_verify = load_math_verify()
    latex = math_verify.LatexExtractionConfig(boxed_match_priority=0)
    boxed = _BOX + _THIN_SPACES.sub("", expression) + "}"
    return math_verify.parse(boxed, extraction_config=[latex], parsing_timeout=None)


@functools.cache
def load_math_verify() -> Any:
    """The library, imported when it is first needed (sympy takes about a second)."""
    # It warns that its time limit is off, which is meant.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    import math_verify

    return math_verify
