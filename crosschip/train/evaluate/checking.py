"""Which function judges an answer, in evaluation and in rejection sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import NamedTuple

from crosschip.data import check_answer
from crosschip.recipe import Recipe, RlSettings
from crosschip.rewards import FULL_REWARD, Attempt, Rewarder

__all__ = ["DEFAULT_TIMEOUT_S", "Checker", "Finding", "opened_checker", "time_limit_s"]

DEFAULT_TIMEOUT_S: float = RlSettings.model_fields["reward_timeout_s"].default


class Finding(NamedTuple):
    """Whether an answer is right; `error` says why its checker could not tell, and then it is not."""

    right: bool
    error: str | None = None


Checker = Callable[[Attempt], Finding]


def time_limit_s(recipe: Recipe | None) -> float:
    """What a recipe's last reinforcement learning gives a checker for one answer, in seconds; else the default."""
    stages = [settings for _, settings in recipe.stages] if recipe is not None else []
    limits = [stage.reward_timeout_s for stage in stages if isinstance(stage, RlSettings)]
    return limits[-1] if limits else DEFAULT_TIMEOUT_S


@contextmanager
def opened_checker(name: str | None, timeout_s: float = DEFAULT_TIMEOUT_S) -> Iterator[Checker]:
    """The judge of this name, until the block ends; None compares the final answer with the expected one.

    A named one is a reward's checker (docs/rewards.md): right is what it gives 1.0 or more. One that takes longer than
    `timeout_s` for an answer has failed.

    Raises:
        RecipeError: there is none of this name.
    """
    if name is None:
        yield _is_expected
        return
    with closing(Rewarder([(name, 1.0)], timeout_s)) as rewarder:

        def judge(attempt: Attempt) -> Finding:
            verdict = rewarder.judge([attempt])[0]
            return Finding(verdict.reward is not None and verdict.reward >= FULL_REWARD, verdict.error)

        yield judge


def _is_expected(attempt: Attempt) -> Finding:
    return Finding(check_answer(attempt.answer, attempt.expected))
