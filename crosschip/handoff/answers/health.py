"""Whether generation is healthy: reasoning that ends, one answer, no loop, a proper stop, whole characters. Pure."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from crosschip.data.answers import THINK_CLOSE, THINK_OPEN, split_reasoning
from crosschip.handoff.answers.engine import Reply

__all__ = ["ReplyHealth", "examine_reply", "health_of", "is_loop"]

_PROPER_STOPS = ("stop", "tool_calls", "eos", "eos_token")
_LOOP_CHARACTERS = 96  # of the end of a text that have to be periodic
_LOOP_REPEATS = 4
_LONGEST_TAIL = 4096
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


@dataclass(frozen=True)
class ReplyHealth:
    """What one reply is, apart from whether it is right."""

    reasoning: str | None
    answer: str
    reasoning_closed: bool
    has_one_answer: bool
    stops: bool
    loops: bool
    is_utf8: bool

    @property
    def is_valid(self) -> bool:
        """Whether a program can take the answer from it."""
        return self.reasoning_closed and self.has_one_answer and self.stops and self.is_utf8 and not self.loops


def examine_reply(reply: Reply) -> ReplyHealth:
    """Take a reply apart, whether the engine parts the reasoning from the answer or leaves the tags in the text."""
    reasoning, answer, closed = split_reasoning(reply.text)
    if reply.reasoning:
        reasoning = reply.reasoning + (reasoning or "")
        # The engine parted them itself; an answer that never came means that the reasoning did not end.
        closed = closed and bool(answer.strip() or reply.calls)
    return ReplyHealth(
        reasoning,
        answer,
        closed and reply.refusal is None,
        bool(reply.calls) or _has_one_answer(answer),
        reply.finish_reason in _PROPER_STOPS,
        is_loop(reply.reasoning) or is_loop(reply.text),
        reply.is_utf8,
    )


def _has_one_answer(answer: str) -> bool:
    """Some text, no reasoning tag in it, and no two boxes with different answers."""
    boxed = {each.strip() for each in _BOXED.findall(answer)}
    return bool(answer.strip()) and THINK_OPEN not in answer and THINK_CLOSE not in answer and len(boxed) <= 1


def is_loop(text: str) -> bool:
    """Whether the text ends in the same passage, four times or more: the end of a model that found no end.

    The z function of the reversed text tells, for each period, how far back it reaches.
    """
    tail = text.rstrip()[-_LONGEST_TAIL:][::-1]
    reach = _z_function(tail)
    for period in range(1, len(tail) // _LOOP_REPEATS + 1):
        length = period + reach[period] if period < len(tail) else period
        if length >= max(_LOOP_CHARACTERS, _LOOP_REPEATS * period):
            return True
    return False


def _z_function(text: str) -> list[int]:
    """For each place, how many characters from there equal those from the beginning (Gusfield 1997)."""
    num = len(text)
    reach = [0] * num
    left = right = 0
    for place in range(1, num):
        length = min(right - place, reach[place - left]) if place < right else 0
        while place + length < num and text[length] == text[place + length]:
            length += 1
        reach[place] = length
        if place + length > right:
            left, right = place, place + length
    return reach


def health_of(replies: Sequence[Reply]) -> dict[str, Any]:
    """The health of one side's replies as a document: counts, and the length in tokens where the engine tells."""
    examined = [examine_reply(reply) for reply in replies if reply.refusal is None]
    tokens = [reply.completion_tokens for reply in replies if reply.completion_tokens is not None]
    counted = [{key: value for key, value in asdict(each).items() if isinstance(value, bool)} for each in examined]
    return {
        "num_replies": len(replies),
        "num_refused": sum(reply.refusal is not None for reply in replies),
        "first_refusal": next((reply.refusal for reply in replies if reply.refusal is not None), None),
        "num_reasoning": sum(each.reasoning is not None for each in examined),
        "num_reasoning_open": sum(not each["reasoning_closed"] for each in counted),
        "num_without_one_answer": sum(not each["has_one_answer"] for each in counted),
        "num_loops": sum(each["loops"] for each in counted),
        "num_not_utf8": sum(not each["is_utf8"] for each in counted),
        "stop_reasons": dict(Counter(str(reply.finish_reason) for reply in replies if reply.refusal is None)),
        "mean_tokens": statistics.fmean(tokens) if tokens else None,
        "median_tokens": statistics.median(tokens) if tokens else None,
        "most_tokens": max(tokens, default=None),
    }
