"""How many held-out problems the model answers right, greedily: looked at while a stage goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from crosschip.data import check_answer
from crosschip.model import Decoder, generate
from crosschip.recipe import RlSettings

if TYPE_CHECKING:
    from crosschip.data import ChatTokenizer, Source
    from crosschip.model import Transformer

__all__ = ["HeldOutScore", "score_held_out"]


@dataclass(frozen=True)
class HeldOutScore:
    """Of how many problems how many were answered right, and with how many tokens on average."""

    num_right: int
    num_problems: int
    mean_tokens: float


def score_held_out(model: Transformer, tokenizer: ChatTokenizer, source: Source, settings: RlSettings) -> HeldOutScore:
    """Answer the first `settings.validation_sequences` questions of the validation split in fp32."""
    longest = settings.seq_len - settings.max_new_tokens
    asked = []
    for row in source.rows("validation"):
        messages = row.as_messages()
        prompt = tokenizer.encode_chat(messages[:-1], add_generation_prompt=True)
        if len(prompt) <= longest:
            asked.append((prompt, messages[-1].content))
        if len(asked) == settings.validation_sequences:
            break
    stop_ids = set(tokenizer.stop_ids)
    decoder = Decoder(model, torch.float32)
    answers = generate(decoder, [prompt for prompt, _ in asked], settings.max_new_tokens, stop_ids)
    num_right = sum(
        check_answer(tokenizer.decode(answer), expected) for answer, (_, expected) in zip(answers, asked, strict=True)
    )
    return HeldOutScore(num_right, len(asked), sum(map(len, answers)) / len(asked))
