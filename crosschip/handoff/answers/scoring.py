"""From two replies to the same question to what each task says of them. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from crosschip.data import check_answer
from crosschip.handoff.answers.asking import Asked, Attempt, Collected
from crosschip.handoff.answers.engine import Reply
from crosschip.handoff.answers.health import examine_reply
from crosschip.handoff.answers.questions import Question, Task
from crosschip.handoff.answers.tools import find_calls, is_valid_call

__all__ = ["LengthPair", "Outcome", "is_right", "is_valid_call_reply", "length_unit", "lengths_of", "outcomes_of"]


@dataclass(frozen=True)
class Outcome:
    """One pair in one task."""

    task: Task
    key: Asked
    a: bool
    b: bool


@dataclass(frozen=True)
class LengthPair:
    """The lengths of one pair, in the unit that `length_unit` names."""

    key: Asked
    a: float
    b: float


def is_right(question: Question, reply: Reply) -> bool:
    """Whether the final answer is the expected one, by the verifier that training uses."""
    health = examine_reply(reply)
    return reply.refusal is None and health.reasoning_closed and check_answer(health.answer, question.expected)


def is_valid_call_reply(question: Question, reply: Reply) -> bool:
    """Whether the reply calls the tool that fits, in the field for calls or else in the text, and nothing else."""
    if reply.refusal is not None:
        return False
    calls = reply.calls or tuple(find_calls(examine_reply(reply).answer))
    return bool(calls) and all(is_valid_call(call, question.expected) for call in calls)


def outcomes_of(attempts: list[Attempt], a: Collected, b: Collected) -> Iterator[Outcome]:
    """What the tasks say of every pair that both sides answered."""
    for attempt, one, other in _pairs(attempts, a, b):
        question = attempt.question
        judge = is_valid_call_reply if question.kind == "tools" else is_right
        yield Outcome(question.kind, attempt.key, judge(question, one), judge(question, other))
        if question.kind != "tools":
            yield Outcome("format", attempt.key, examine_reply(one).is_valid, examine_reply(other).is_valid)


def _pairs(attempts: list[Attempt], a: Collected, b: Collected) -> Iterator[tuple[Attempt, Reply, Reply]]:
    for attempt in attempts:
        if attempt.key in a.replies and attempt.key in b.replies:
            yield attempt, a.replies[attempt.key], b.replies[attempt.key]


def length_unit(attempts: list[Attempt], a: Collected, b: Collected) -> str:
    """The finest measure of length that both sides give for every reply."""
    replies = [reply for attempt, *both in _pairs(attempts, a, b) for reply in both if attempt.question.kind != "tools"]
    answered = [reply for reply in replies if reply.refusal is None]
    if answered and all(reply.reasoning_tokens is not None for reply in answered):
        return "tokens of reasoning"
    if answered and all(reply.completion_tokens is not None for reply in answered):
        return "tokens of reasoning and answer"
    return "characters of reasoning and answer"


def lengths_of(attempts: list[Attempt], a: Collected, b: Collected, unit: str) -> list[LengthPair]:
    """The lengths of every pair that neither side refused."""
    found = []
    for attempt, one, other in _pairs(attempts, a, b):
        if attempt.question.kind != "tools" and one.refusal is None and other.refusal is None:
            found.append(LengthPair(attempt.key, _length(one, unit), _length(other, unit)))
    return found


def _length(reply: Reply, unit: str) -> float:
    if unit == "tokens of reasoning":
        return float(reply.reasoning_tokens or 0)
    if unit == "tokens of reasoning and answer":
        return float(reply.completion_tokens or 0)
    return float(len(reply.reasoning) + len(reply.text))
