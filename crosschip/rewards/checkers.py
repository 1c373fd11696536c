"""The checkers that have a name, and how any other is found by its import path."""

from __future__ import annotations

import importlib
import re

from crosschip.errors import RecipeError
from crosschip.rewards.attempt import Attempt, Checker, what_was_raised
from crosschip.rewards.code_tests import check_code
from crosschip.rewards.mathematics import check_math

__all__ = ["CHECKERS", "IN_PROCESS", "check_arithmetic", "check_format", "checked_name", "find_checker"]

_TAG = re.compile(r"</?think>")
_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def check_arithmetic(attempt: Attempt) -> float:
    """1.0 where the final answer is the expected number (or word), by the verifier that evaluation uses.

    Where the row's answer ends in a line of `####`, what stands there is expected.
    """
    # Inside the function, because the package `crosschip.data` imports torch; this checker runs where torch is in use.
    from crosschip.data.answers import check_answer, final_answer

    if not attempt.closed:
        return 0.0
    return float(check_answer(attempt.answer, final_answer(attempt.expected)))


def check_format(attempt: Attempt) -> float:
    """1.0 where reasoning was opened and closed once, an answer stands behind it, and the model ended by itself."""
    if attempt.reasoning is None or not attempt.closed or not attempt.finished:
        return 0.0
    stray = _TAG.search(attempt.reasoning) or _TAG.search(attempt.answer)
    return float(bool(attempt.reasoning.strip()) and bool(attempt.answer.strip()) and stray is None)


CHECKERS: dict[str, Checker] = {
    "arithmetic": check_arithmetic,
    "code": check_code,
    "format": check_format,
    "math": check_math,
}
# Pure and bounded, so they need no process that can be killed.
IN_PROCESS = frozenset({"arithmetic", "format"})


def checked_name(name: str) -> str:
    """`name` if it is a checker's name or looks like an import path; else a `RecipeError`. Imports nothing."""
    if name in CHECKERS or _IMPORT_PATH.fullmatch(name):
        return name
    raise RecipeError(
        f"the reward {name!r} does not exist; there are {', '.join(sorted(CHECKERS))}",
        "take one of these, or name a function of your own as 'package.module:function'",
    )


def find_checker(name: str) -> Checker:
    """The checker of a name, or the function at `package.module:function`, which is imported here.

    A name that is neither, a module that cannot be imported and a function that is not there are `RecipeError`s.
    """
    if checked_name(name) in CHECKERS:
        return CHECKERS[name]
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module does when it is imported is its author's to mend
        raise RecipeError(
            f"the reward {name!r} cannot be imported: {what_was_raised(error)}",
            f"make `python -c 'import {module_name}'` work in the directory that you start crosschip in",
        ) from error
    found = getattr(module, function_name, None)
    if not callable(found):
        there = sorted(each for each, value in vars(module).items() if callable(value) and not each.startswith("_"))
        raise RecipeError(
            f"the reward {name!r} names no function of {module_name}, which has {', '.join(there) or 'none'}",
            "name a function that takes an Attempt and returns a number",
        )
    return found  # what it returns is checked whenever it is called
