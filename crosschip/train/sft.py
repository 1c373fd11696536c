"""Fine-tuning's data: chats, of which only the assistant's turns are trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crosschip.data import ChatTokenizer, prepare_chat
from crosschip.recipe import StageSettings
from crosschip.rundir import RunDirectory
from crosschip.train.pretrain import NUM_PROMPTS, StageData, TokensTold
from crosschip.train.validation import Prompt

if TYPE_CHECKING:
    from crosschip.data import Source

__all__ = ["fine_tuning_data", "questions"]


def fine_tuning_data(
    source: Source, tokenizer: ChatTokenizer, run: RunDirectory, stage: StageSettings, seed: int, tell: TokensTold
) -> StageData:
    """Token stores under `run.data` (made once, then reused) and held-out questions as prompts."""
    train = prepare_chat(source, tokenizer, run.data, stage.seq_len, seed, "train", progress=tell)
    enough = stage.validation_sequences
    validation = prepare_chat(source, tokenizer, run.data, stage.seq_len, seed, "validation", max_examples=enough)
    return StageData(train, validation, questions(source, tokenizer, stage.seq_len // 2))


def questions(source: Source, tokenizer: ChatTokenizer, longest: int) -> list[Prompt]:
    """The first held-out questions of up to `longest` tokens, for samples. Where nobody asks, there is none."""
    prompts = []
    for row in source.rows("validation"):
        messages = row.as_messages()
        asked = messages[:-1] if messages[-1].role == "assistant" else messages
        if not asked:
            continue
        token_ids = tokenizer.encode_chat(asked, add_generation_prompt=True)
        if len(token_ids) <= longest:
            prompts.append(Prompt(asked[-1].content, tuple(token_ids)))
        if len(prompts) == NUM_PROMPTS:
            break
    return prompts
