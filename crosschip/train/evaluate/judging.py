"""One answer judged: is it right, was its reasoning closed, how long is which part of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from crosschip.data import ChatTokenizer, split_reasoning
from crosschip.data.answers import THINK_CLOSE
from crosschip.rewards import Attempt
from crosschip.train.evaluate.checking import Checker
from crosschip.train.evaluate.opening import opening_of
from crosschip.train.evaluate.questions import Question

__all__ = ["Answered", "Judge"]


@dataclass(frozen=True)
class Answered:
    """One question as it stands in `evaluation.json`.

    `text` is all that the model wrote, `answer` what follows its reasoning, `closed` whether there was reasoning that
    was ended, `finished` whether the model ended by itself within the limit, `token_ids` the answer as it was made.
    `num_reasoning_tokens` counts up to and with `</think>`; the other tokens are the answer's, its end among them.
    """

    question: str
    expected: str
    answer: str
    right: bool
    reasoning: str | None
    closed: bool
    finished: bool
    num_tokens: int
    num_reasoning_tokens: int
    text: str
    token_ids: list[int]
    level: int | None = None
    error: str | None = None  # why the checker could not tell


class Judge:
    """Judges answers as one tokenizer and one checker read them."""

    def __init__(self, tokenizer: ChatTokenizer, checker: Checker) -> None:
        self._tokenizer, self._checker = tokenizer, checker
        self._close_ids = tokenizer.encode_with_controls(THINK_CLOSE)

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return self._tokenizer.stop_ids

    def prompt_of(self, question: Question) -> tuple[int, ...]:
        """The question as the model reads it, up to where its answer begins."""
        return tuple(self._tokenizer.encode_chat(question.messages, add_generation_prompt=True))

    def opening_of(self, prompt_ids: Sequence[int]) -> str:
        """What a prompt has begun of the answer."""
        return opening_of(self._tokenizer, prompt_ids)

    def judge(self, question: Question, token_ids: list[int], opening: str = "") -> Answered:
        """What is to be said of this answer, which goes on behind `opening`. The checker is given what the rewards of
        reinforcement learning are given."""
        text = self._tokenizer.decode(token_ids)
        reasoning, answer, closed = split_reasoning(opening + text)
        finished = bool(token_ids) and token_ids[-1] in self._tokenizer.stop_ids
        attempt = Attempt(
            question.text, question.expected, opening + text, reasoning, answer, closed, finished, len(token_ids)
        )
        found = self._checker(attempt)
        return Answered(
            question=question.text,
            expected=question.expected,
            answer=answer,
            right=found.right,
            reasoning=reasoning,
            closed=closed and reasoning is not None,
            finished=finished,
            num_tokens=len(token_ids),
            num_reasoning_tokens=0 if reasoning is None else self._reasoning_length(token_ids, reasoning, closed),
            text=text,
            token_ids=token_ids,
            level=question.level,
            error=found.error,
        )

    def _reasoning_length(self, token_ids: list[int], reasoning: str, closed: bool) -> int:
        if not closed:
            return len(token_ids)
        place = _place_of(self._close_ids, token_ids)
        if place is not None:
            return place + len(self._close_ids)
        # The tag was written in other pieces, as vocabularies without a token for it allow.
        return min(len(token_ids), len(self._tokenizer.encode(reasoning)) + len(self._close_ids))


def _place_of(wanted: Sequence[int], ids: Sequence[int]) -> int | None:
    for place in range(len(ids) - len(wanted) + 1):
        if list(ids[place : place + len(wanted)]) == list(wanted):
            return place
    return None
