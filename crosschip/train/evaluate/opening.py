"""What a prompt has begun of the answer: chat templates of reasoning models end with an opening tag."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from crosschip.data.answers import THINK_OPEN

if TYPE_CHECKING:
    from crosschip.data import ChatTokenizer

__all__ = ["opening_of"]

_LAST_TOKENS = 8  # of a prompt: more than an opening tag and a line break have


def opening_of(tokenizer: ChatTokenizer, prompt_ids: Sequence[int]) -> str:
    """`<think>` where the prompt ends with it, so that the model goes on inside its reasoning; else nothing.

    Whoever reads the answer reads it behind this: else reasoning that was cut off would pass for an answer.
    """
    ends_open = tokenizer.decode(list(prompt_ids[-_LAST_TOKENS:])).rstrip().endswith(THINK_OPEN)
    return THINK_OPEN if ends_open else ""
