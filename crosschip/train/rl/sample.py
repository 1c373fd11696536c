"""What goes out to an engine and what comes back: problems, sampled answers, groups of them. No torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Group", "Problem", "Sample"]


@dataclass(frozen=True)
class Problem:
    """A question with the tokens of its prompt, and what its answer is judged by. `number` is its place in the data.

    `opening` is what the prompt has begun of the answer: `<think>` where the chat template opens the reasoning.
    """

    number: int
    question: str
    expected: str
    prompt_ids: tuple[int, ...]
    opening: str = ""


@dataclass(frozen=True)
class Sample:
    """One sampled answer, as the engine gave it and as it was judged.

    `logprobs` are the engine's, of each token of `token_ids`, in nats at the recipe's temperature. `versions` are the
    versions of the weights, token by token. `routes` holds the experts of each fed position,
    [prompt + answer - 1, L, K], where the engine tells them. `reward` is None where the checker failed, and `error`
    says how. `finished`: ended by itself.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[int, ...]
    finished: bool
    text: str
    engine: str
    chip: str
    reward: float | None = None
    parts: dict[str, float] | None = None
    error: str | None = None
    routes: npt.NDArray[np.integer] | None = None


@dataclass(frozen=True)
class Group:
    """All answers to one problem."""

    problem: Problem
    samples: tuple[Sample, ...]

    @property
    def oldest_version(self) -> int:
        """The earliest version that any token of it was sampled with."""
        return min(min(sample.versions, default=0) for sample in self.samples)
