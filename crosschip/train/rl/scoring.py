"""How many held-out problems the model answers right, greedily: looked at while a stage goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from crosschip.errors import DataError
from crosschip.model import Decoder
from crosschip.recipe import RlSettings
from crosschip.train.answering import Asking, Limits, answer_all
from crosschip.train.evaluate.checking import opened_checker
from crosschip.train.evaluate.judging import Judge
from crosschip.train.evaluate.questions import Question, question_of_row

if TYPE_CHECKING:
    from crosschip.data import ChatTokenizer, Source
    from crosschip.model import Transformer

__all__ = ["HeldOutProblems", "HeldOutScore"]


@dataclass(frozen=True)
class HeldOutScore:
    """Of how many problems how many were answered right, and with how many tokens on average. Of `num_errors` answers
    the checker could not tell; they are not right."""

    num_right: int
    num_problems: int
    mean_tokens: float
    num_errors: int = 0


class HeldOutProblems:
    """The first `settings.validation_sequences` questions of the validation split that leave room for an answer.

    They are judged by the stage's reward with the largest weight; right is what it gives 1.0 or more.

    Raises:
        DataError: there is none.
    """

    def __init__(self, source: Source, tokenizer: ChatTokenizer, settings: RlSettings) -> None:
        self._tokenizer, self._timeout_s = tokenizer, settings.reward_timeout_s
        self._checker_name = max(settings.rewards, key=lambda reward: reward.weight).checker
        self._limits = Limits(settings.max_new_tokens, frozenset(tokenizer.stop_ids))
        self._askings: list[Asking] = []
        self._questions: list[Question] = []
        longest = settings.seq_len - settings.max_new_tokens
        for row in source.rows("validation"):
            question = question_of_row(row)
            if question is None:  # it ends with the user, or is plain text
                continue
            prompt_ids = tokenizer.encode_chat(question.messages, add_generation_prompt=True)
            if len(prompt_ids) <= longest:
                self._askings.append(Asking(tuple(prompt_ids)))
                self._questions.append(Question(question.messages, row.as_messages()[-1].content))  # as in training
            if len(self._askings) == settings.validation_sequences:
                break
        if not self._askings:
            raise DataError(
                f"no held-out question with an answer has at most {longest} tokens, which seq_len leaves beside "
                "max_new_tokens",
                "raise rl.seq_len or lower rl.max_new_tokens, or leave out rl.validate_every",
            )

    def score(self, model: Transformer, beat: Callable[[], None] | None = None) -> HeldOutScore:
        """Answer them all in fp32; `beat` is called with each token of the answers, and with each that is judged."""
        num_right = num_tokens = num_errors = 0
        decoder = Decoder(model, torch.float32, by_kernels=True)
        with opened_checker(self._checker_name, self._timeout_s) as checker:
            judge = Judge(self._tokenizer, checker)
            for number, answer in answer_all(decoder, self._askings, self._limits, beat):
                opening = judge.opening_of(self._askings[number].prompt_ids)
                found = judge.judge(self._questions[number], answer, opening)
                num_tokens += len(answer)
                num_right += found.right
                num_errors += found.error is not None
                if beat is not None:
                    beat()  # many end at one token, and each may take its checker as long as it is let
        num_problems = len(self._askings)
        return HeldOutScore(num_right, num_problems, num_tokens / num_problems, num_errors)
