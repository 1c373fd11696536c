"""What engines answer, read into one form: completions and chats, whole and streamed, of vLLM, llama.cpp and ours."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from crosschip.qualify.serving.client import EngineFault, StreamedReply

__all__ = ["Answer", "Token", "impossible_scores", "read_answer", "read_stream"]

_OF_ANOTHER_FORM = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError)
_SUM_SLACK = 1e-3  # probabilities from fp32 log-probs of bf16 logits may add up to a little more than one


@dataclass(frozen=True)
class Token:
    """One token: its name (`token_id:7` where the engine gives ids), natural log-prob, and the most likely ones.

    `offset` is where it begins in the text, in characters; `data` its bytes, where the engine tells them.
    """

    name: str
    logprob: float | None
    top: dict[str, float] = field(default_factory=dict)
    offset: int | None = None
    data: bytes | None = None

    @property
    def token_id(self) -> int | None:
        """The id, where the engine names tokens by ids."""
        number = self.name.removeprefix("token_id:")
        return int(number) if number != self.name and number.isdigit() else None


@dataclass
class Answer:
    """One choice. With `echo` the prompt's tokens come first in `tokens`."""

    text: str = ""
    reasoning: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, int] = field(default_factory=dict)  # with `cached_tokens`, where the engine tells
    pieces: list[str] = field(default_factory=list)  # of a stream: the text of each event
    done: bool = True  # of a stream: `[DONE]` came

    @property
    def logprobs(self) -> list[float | None]:
        """The tokens' own log-probs."""
        return [token.logprob for token in self.tokens]

    @property
    def names(self) -> list[str]:
        """The tokens' names."""
        return [token.name for token in self.tokens]

    @property
    def ids(self) -> list[int]:
        """The tokens' ids; only of an engine that names tokens by ids."""
        return [token.token_id for token in self.tokens if token.token_id is not None]


def read_answer(document: dict[str, Any], path: str = "", body: dict[str, Any] | None = None) -> Answer:
    """The first choice of a completion or chat, which answers the request `body` to `path`.

    Raises:
        EngineFault: the document has another form.
    """
    answer = Answer()
    try:
        _take(answer, document["choices"][0], "message")
    except _OF_ANOTHER_FORM as error:
        raise EngineFault("garbage", f"an answer of another form: {type(error).__name__} {error}", path, body) from None
    answer.usage = _usage(document)
    return answer


def read_stream(reply: StreamedReply, path: str = "", body: dict[str, Any] | None = None) -> Answer:
    """The first choice put together from the events of a stream, which answers the request `body` to `path`.

    Raises:
        EngineFault: an event has another form.
    """
    answer = Answer(done=reply.done)
    try:
        for event in reply.events:
            answer.usage = _usage(event) or answer.usage
            for choice in event.get("choices") or []:
                if choice.get("index", 0) == 0:
                    before = len(answer.text) + len(answer.reasoning)
                    _take(answer, choice, "delta")
                    if len(answer.text) + len(answer.reasoning) > before:
                        answer.pieces.append((answer.reasoning + answer.text)[before:])
    except _OF_ANOTHER_FORM as error:
        raise EngineFault("garbage", f"an event of another form: {type(error).__name__} {error}", path, body) from None
    return answer


def _usage(document: dict[str, Any]) -> dict[str, int]:
    usage = document.get("usage")
    if not isinstance(usage, dict):
        return {}
    details = usage.get("prompt_tokens_details")
    counts = {**usage, **details} if isinstance(details, dict) else usage
    return {name: value for name, value in counts.items() if isinstance(value, int)}


def _take(answer: Answer, choice: dict[str, Any], message_key: str) -> None:
    """Add what a choice holds to the answer."""
    message = choice.get(message_key)
    if isinstance(message, dict):
        answer.text += message.get("content") or ""
        answer.reasoning += message.get("reasoning_content") or message.get("reasoning") or ""
    else:
        answer.text += choice.get("text") or ""
    logprobs = choice.get("logprobs")
    if isinstance(logprobs, dict):
        answer.tokens += _content(logprobs["content"]) if logprobs.get("content") else _legacy(logprobs)
    reason = choice.get("finish_reason")
    answer.finish_reason = answer.finish_reason if reason is None else str(reason)


def _legacy(logprobs: dict[str, Any]) -> Iterable[Token]:
    names = logprobs.get("tokens") or []
    values = logprobs.get("token_logprobs") or [None] * len(names)
    tops = logprobs.get("top_logprobs") or [None] * len(names)
    offsets = logprobs.get("text_offset") or [None] * len(names)
    for name, value, top, offset in zip(names, values, tops, offsets, strict=True):
        best = {key: float(each) for key, each in (top or {}).items()}
        yield Token(str(name), _number(value), best, offset if isinstance(offset, int) else None)


def _content(entries: list[dict[str, Any]]) -> Iterable[Token]:
    for entry in entries:
        top = {_entry_name(each): float(each["logprob"]) for each in entry.get("top_logprobs") or []}
        data = entry.get("bytes")
        yield Token(
            _entry_name(entry), _number(entry["logprob"]), top, None, bytes(data) if isinstance(data, list) else None
        )


def _entry_name(entry: dict[str, Any]) -> str:
    """llama.cpp gives ids beside the text."""
    return f"token_id:{entry['id']}" if isinstance(entry.get("id"), int) else str(entry["token"])


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def impossible_scores(tokens: Iterable[Token]) -> str | None:
    """What no probability distribution can be, in words; None when all scores are possible."""
    for place, token in enumerate(tokens):
        values = [*token.top.values(), *([] if token.logprob is None else [token.logprob])]
        if any(math.isnan(value) or value > _SUM_SLACK for value in values):
            return f"token {place} ({token.name!r}) has the log-prob {max(values, key=_badness)}"
        total = sum(math.exp(value) for value in token.top.values())
        if total > 1 + _SUM_SLACK:
            return f"the probabilities of the most likely tokens at token {place} add up to {total:.4f}"
        # Only ids tell tokens apart: several halves of characters have one and the same text.
        listed = token.top.get(token.name) if token.token_id is not None else None
        if listed is not None and token.logprob is not None and abs(listed - token.logprob) > _SUM_SLACK:
            return f"token {place} has the log-prob {token.logprob:.4f} and is listed with {listed:.4f}"
    return None


def _badness(value: float) -> float:
    return math.inf if math.isnan(value) else value
