"""Which function judges an answer, in evaluation and in rejection sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import NamedTuple

from crosschip.data import check_answer
from crosschip.rewards import Attempt, Rewarder

__all__ = ["Checker", "Finding", "opened_checker"]

FULL_REWARD = 1.0  # of a named checker: less is not right


class Finding(NamedTuple):
    """Whether an answer is right; `error` says why its checker could not tell, and then it is not."""

    right: bool
    error: str | None = None


Checker = Callable[[Attempt], Finding]


@contextmanager
def opened_checker(name: str | None) -> Iterator[Checker]:
    """The judge of this name, until the block ends; None compares the final answer with the expected one.

    A named one is a reward's checker (docs/rewards.md): right is what it gives 1.0 or more.

    Raises:
        RecipeError: there is none of this name.
    """
    if name is None:
        yield _is_expected
        return
    with closing(Rewarder([(name, 1.0)])) as rewarder:

        def judge(attempt: Attempt) -> Finding:
            verdict = rewarder.judge([attempt])[0]
            return Finding(verdict.reward is not None and verdict.reward >= FULL_REWARD, verdict.error)

        yield judge


def _is_expected(attempt: Attempt) -> Finding:
    return Finding(check_answer(attempt.answer, attempt.expected))
