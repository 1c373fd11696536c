"""Pre-training's data: every row as plain text, packed into windows of equal length."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crosschip.data import ChatStream, ChatTokenizer, PackedStream, prepare_packed
from crosschip.recipe import StageSettings
from crosschip.rundir import RunDirectory
from crosschip.train.validation import Prompt

if TYPE_CHECKING:
    from crosschip.data import Source

__all__ = ["NUM_PROMPTS", "StageData", "TokensTold", "pretraining_data"]

TokensTold = Callable[[int], None]  # hears the number of tokens while a store is being written

NUM_PROMPTS = 4
PROMPT_TOKENS = 16


@dataclass(frozen=True)
class StageData:
    """What a stage trains on, is validated on, and continues in its samples."""

    train: PackedStream | ChatStream
    validation: PackedStream | ChatStream
    prompts: list[Prompt]


def pretraining_data(
    source: Source, tokenizer: ChatTokenizer, run: RunDirectory, stage: StageSettings, seed: int, tell: TokensTold
) -> StageData:
    """Token stores under `run.data` (made once, then reused) and the first words of held-out rows as prompts."""
    train = prepare_packed(source, tokenizer, run.data, stage.seq_len, seed, "train", progress=tell)
    enough = stage.validation_sequences * stage.seq_len + 1
    validation = prepare_packed(source, tokenizer, run.data, stage.seq_len, seed, "validation", max_tokens=enough)
    return StageData(train, validation, _first_words(source, tokenizer, min(PROMPT_TOKENS, stage.seq_len - 2)))


def _first_words(source: Source, tokenizer: ChatTokenizer, longest: int) -> list[Prompt]:
    prompts = []
    for row in itertools.islice(source.rows("validation"), NUM_PROMPTS):
        token_ids = tokenizer.encode(row.as_text())
        beginning = token_ids[: min(longest, len(token_ids) // 2)]
        prompts.append(Prompt(tokenizer.decode(beginning), (tokenizer.bos_id, *beginning)))
    return prompts
