"""How many held-out problems the model answers right, greedily: looked at while a stage goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from crosschip.data import check_answer
from crosschip.errors import DataError
from crosschip.model import Decoder
from crosschip.recipe import RlSettings
from crosschip.train.answering import Asking, Limits, answer_all
from crosschip.train.evaluate.opening import opening_of

if TYPE_CHECKING:
    from crosschip.data import ChatTokenizer, Source
    from crosschip.model import Transformer

__all__ = ["HeldOutProblems", "HeldOutScore"]


@dataclass(frozen=True)
class HeldOutScore:
    """Of how many problems how many were answered right, and with how many tokens on average."""

    num_right: int
    num_problems: int
    mean_tokens: float


class HeldOutProblems:
    """The first `settings.validation_sequences` questions of the validation split that leave room for an answer.

    Raises:
        DataError: there is none.
    """

    def __init__(self, source: Source, tokenizer: ChatTokenizer, settings: RlSettings) -> None:
        self._tokenizer = tokenizer
        self._limits = Limits(settings.max_new_tokens, frozenset(tokenizer.stop_ids))
        self._askings: list[Asking] = []
        self._openings: list[str] = []
        self._expected: list[str] = []
        longest = settings.seq_len - settings.max_new_tokens
        for row in source.rows("validation"):
            messages = row.as_messages()
            prompt_ids = tokenizer.encode_chat(messages[:-1], add_generation_prompt=True)
            if len(prompt_ids) <= longest:
                self._askings.append(Asking(tuple(prompt_ids)))
                self._openings.append(opening_of(tokenizer, prompt_ids))
                self._expected.append(messages[-1].content)
            if len(self._askings) == settings.validation_sequences:
                break
        if not self._askings:
            raise DataError(
                f"no held-out prompt has at most {longest} tokens, which seq_len leaves beside max_new_tokens",
                "raise rl.seq_len or lower rl.max_new_tokens, or leave out rl.validate_every",
            )

    def score(self, model: Transformer) -> HeldOutScore:
        """Answer them all in fp32."""
        num_right = num_tokens = 0
        for number, answer in answer_all(Decoder(model, torch.float32, by_kernels=True), self._askings, self._limits):
            num_tokens += len(answer)
            text = self._openings[number] + self._tokenizer.decode(answer)
            num_right += check_answer(text, self._expected[number])
        num_problems = len(self._askings)
        return HeldOutScore(num_right, num_problems, num_tokens / num_problems)
