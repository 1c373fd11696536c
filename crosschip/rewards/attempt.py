"""What a checker is given, and what comes out for one attempt."""

from __future__ import annotations

import math
import numbers
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from crosschip.errors import printable

__all__ = ["FULL_REWARD", "Attempt", "Checker", "RewardTerm", "Verdict", "as_reward", "what_was_raised"]

FULL_REWARD = 1.0  # of a checker: less is not right
_MAX_REASON_CHARACTERS = 500


@dataclass(frozen=True)
class Attempt:
    """One answer of the model to one question, already split into reasoning and answer.

    `reasoning`, `answer` and `closed` are what `crosschip.data.answers.split_reasoning` makes of the text.
    """

    question: str
    expected: str  # the row's answer; for code: the tests
    text: str  # everything the model wrote
    reasoning: str | None
    answer: str
    closed: bool  # reasoning was opened and closed
    finished: bool  # the model ended by itself within its limit
    num_tokens: int


Checker = Callable[[Attempt], float]


class RewardTerm(NamedTuple):
    """A checker by name or as `package.module:function`, its weight, and whether it must be 1.0 for any reward."""

    checker: str
    weight: float
    required: bool = False


@dataclass(frozen=True)
class Verdict:
    """The weighted sum of the parts, or the reason why there is none; `reward` is None exactly where `error` is not.

    Where a required part is less than 1.0 the reward is at most 0.0. `parts` has the unweighted value of each checker
    that gave one, also beside an error of another checker.
    """

    reward: float | None
    parts: dict[str, float]
    error: str | None

    def __post_init__(self) -> None:
        assert (self.reward is None) == (self.error is not None), "a verdict is either a reward or an error"


def as_reward(value: object) -> float:
    """What a checker returned as a float; True and False, numpy's too, are 1 and 0.

    A `TypeError` for what is no number, a `ValueError` for NaN and infinities: each would spoil a whole group.
    """
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        value = bool(value)
    if not isinstance(value, numbers.Real):
        raise TypeError(f"returned {value!r:.100} of type {type(value).__name__}; a reward is a number")
    reward = float(value)
    if not math.isfinite(reward):
        raise ValueError(f"returned {reward}; a reward is a finite number")
    return reward


def what_was_raised(error: BaseException) -> str:
    """The exception's type and message, and the line of the code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return printable(f"{type(error).__name__}: {_message(error)}"[:_MAX_REASON_CHARACTERS] + place)


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as again:  # a message that cannot be made is no reason to lose the error
        return f"(its message cannot be told: {type(again).__name__})"
