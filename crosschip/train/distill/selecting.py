"""Which answers are kept: right, reasoning closed, ended, clean, each once, and at most so many a problem. Pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from crosschip.data import Message
from crosschip.train.evaluate.questions import Question

__all__ = ["REASONS", "Sampled", "as_row", "select"]

# Why an answer is not kept, in the order in which it is asked.
Reason = Literal["kept", "failed", "unfinished", "open reasoning", "wrong", "unclean", "repeated", "too many"]
REASONS: tuple[Reason, ...] = get_args(Reason)
_JUNK = re.compile(r"</?think>|<\|[^|>]*\|>|\ufffd")  # tags inside of a part, control tokens, broken characters


@dataclass(frozen=True)
class Sampled:
    """One answer as it was judged. `reasoning` is None where the model showed none; `failure` says why none came."""

    reasoning: str | None
    answer: str
    right: bool
    closed: bool
    finished: bool
    num_tokens: int
    failure: str | None = None


def select(
    samples: Sequence[Sampled], keep: int, choose: Literal["shortest", "random"], key: Sequence[object]
) -> list[Reason]:
    """What becomes of each of a problem's answers. `random` draws by `key` and the answer's place alone."""
    reasons: list[Reason] = []
    seen: set[tuple[str | None, str]] = set()
    for sample in samples:
        reason = _fault(sample)
        if reason == "kept" and (sample.reasoning, sample.answer) in seen:
            reason = "repeated"
        if reason == "kept":
            seen.add((sample.reasoning, sample.answer))
        reasons.append(reason)
    good = [place for place, reason in enumerate(reasons) if reason == "kept"]
    if choose == "shortest":
        good.sort(key=lambda place: (samples[place].num_tokens, place))
    else:
        good.sort(key=lambda place: hashlib.sha256(repr((*key, place)).encode()).digest())
    for place in good[keep:]:
        reasons[place] = "too many"
    return reasons


def _fault(sample: Sampled) -> Reason:
    """The first thing that is wrong with an answer."""
    if sample.failure is not None:
        return "failed"
    if not sample.finished:
        return "unfinished"  # over-long ones among them: they were cut off at the limit
    if sample.reasoning is None or not sample.closed:
        return "open reasoning"
    if not sample.right:
        return "wrong"
    is_clean = bool(sample.reasoning.strip() and sample.answer.strip()) and not _JUNK.search(
        f"{sample.reasoning}\n{sample.answer}"
    )
    return "kept" if is_clean else "unclean"


def as_row(question: Question, sample: Sampled) -> dict[str, Any]:
    """The row that `[data] source = "files"` reads as a chat, reasoning and answer exactly as they were written."""
    answer = {"role": "assistant", "content": sample.answer, "reasoning_content": sample.reasoning}
    return {"messages": [*(_turn(message) for message in question.messages), answer]}


def _turn(message: Message) -> dict[str, str]:
    turn = {"role": message.role, "content": message.content}
    return turn if message.reasoning_content is None else turn | {"reasoning_content": message.reasoning_content}
