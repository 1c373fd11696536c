"""The problems of a reinforcement-learning stage, by number: epoch after epoch, each in an order of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from crosschip.data.order import permutation
from crosschip.errors import DataError
from crosschip.train.evaluate.opening import opening_of
from crosschip.train.rl.sample import Problem

if TYPE_CHECKING:
    from crosschip.data import ChatTokenizer, Row, Source

__all__ = ["Problems"]


class Problems:
    """Questions of a source's training split whose prompts have at most `longest_prompt` tokens.

    `beat` is called for each row that is read.

    Raises:
        DataError: a row has no question with an answer, or no prompt is short enough.
    """

    def __init__(
        self, source: Source, tokenizer: ChatTokenizer, longest_prompt: int, seed: int, beat: Callable[[], None]
    ) -> None:
        self._tokenizer, self._seed = tokenizer, seed
        self._asked: list[tuple[Row, tuple[int, ...]]] = []
        self.num_too_long = 0
        for row in source.rows("train"):
            beat()
            prompt_ids = self._prompt_ids(_checked(row))
            if len(prompt_ids) <= longest_prompt:
                self._asked.append((row, prompt_ids))
            else:
                self.num_too_long += 1
        if not self._asked:
            raise DataError(
                f"none of the {self.num_too_long} prompts has at most {longest_prompt} tokens, which seq_len leaves "
                "beside max_new_tokens",
                "raise rl.seq_len or lower rl.max_new_tokens",
            )
        self._order = lru_cache(maxsize=2)(self._make_order)

    def __len__(self) -> int:
        return len(self._asked)

    def __call__(self, number: int) -> Problem:
        """The problem at a place of the endless row of epochs."""
        epoch, place = divmod(number, len(self._asked))
        row, prompt_ids = self._asked[int(self._order(epoch)[place])]
        messages = row.as_messages()
        opening = opening_of(self._tokenizer, prompt_ids)
        return Problem(number, messages[-2].content, messages[-1].content, prompt_ids, opening)

    def _prompt_ids(self, row: Row) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode_chat(row.as_messages()[:-1], add_generation_prompt=True))

    def _make_order(self, epoch: int) -> npt.NDArray[np.int64]:
        return permutation(len(self._asked), "problems", self._seed, epoch)


def _checked(row: Row) -> Row:
    messages = row.messages or ()
    if len(messages) < 2 or messages[-1].role != "assistant" or not messages[-1].content.strip():
        start = (row.text or "".join(message.content for message in messages))[:60]
        raise DataError(
            f"reinforcement learning needs questions with answers, and the row {start!r}... is none",
            "give rows with a question and an answer (data.question_field, data.answer_field)",
        )
    return row
