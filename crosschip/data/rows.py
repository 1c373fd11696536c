"""What a data set is made of: a row is plain text or a conversation, whatever file it came from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from crosschip.errors import DataError

__all__ = ["Message", "Role", "Row", "Split", "ToolCall", "falls_below"]

Role = Literal["system", "user", "assistant"]
Split = Literal["train", "validation"]
ROLES: tuple[str, ...] = get_args(Role)
_NUMBER = re.compile(r"[-+]?[\d.,/]*\d")


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool that an assistant made; `arguments` is the text of a JSON object."""

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `reasoning_content` is what an assistant thought before `content`.

    A turn of the role `tool` is what came of the call `tool_call_id`; `name` is then the tool's.
    """

    role: str
    content: str
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Row:
    """One document: plain `text`, or `messages` (a question and its answer are two messages).

    `question` is the data's own, without what the recipe adds to it.
    """

    text: str | None = None
    messages: tuple[Message, ...] | None = None
    question: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        assert (self.text is None) != (self.messages is None), "a row is either text or messages"

    def as_text(self) -> str:
        """The row as plain prose for pre-training: no tags, one turn a line, a bare number as `The answer is 72.`"""
        if self.text is not None:
            return self.text
        return "\n".join(_prose(message) for message in self.messages or ())

    def as_messages(self) -> tuple[Message, ...]:
        """The row as a conversation; a row of plain text has none and is a `DataError`."""
        if self.messages is None:
            start = (self.text or "")[:60]
            raise DataError(
                f"fine-tuning needs conversations, and the row {start!r}... is plain text",
                "give rows with messages, or with a question and an answer (data.question_field, data.answer_field)",
            )
        return self.messages

    def split_key(self) -> str:
        """What decides the row's split: the text, or the turns before the first answer to a user; all where none asks.

        Two answers to one question so fall on the same side, and no question of the training set is validated on.
        """
        if self.text is not None:
            return self.text
        prompt: list[str] = []
        was_asked = False
        for message in self.messages or ():
            if message.role == "assistant" and was_asked:
                break
            was_asked |= message.role == "user"
            content = message.content if self.question is None else self.question
            prompt.append(f"{message.role}\x00{content}")
        return "\x00".join(prompt)


def _prose(message: Message) -> str:
    if message.reasoning_content is None:
        return message.content
    is_bare = _NUMBER.fullmatch(message.content) is not None
    answer = f"The answer is {message.content}." if is_bare else message.content
    return f"{message.reasoning_content}\n{answer}"


def falls_below(key: str, share: float) -> bool:
    """Whether the hash of `key`, a number in [0, 1), is below `share`; it depends on nothing else, no seed either."""
    digest = hashlib.sha256(key.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def digest_of(parts: Sequence[object]) -> str:
    """SHA-256 in hex over the parts' representations: the one way fingerprints are put together here."""
    return hashlib.sha256(repr(tuple(parts)).encode("utf-8")).hexdigest()
