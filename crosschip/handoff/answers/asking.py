"""Asking one side everything, some questions at a time, until it is done or the engine is gone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from crosschip.handoff.answers.engine import Ask, Engine, Fault, Reply
from crosschip.handoff.answers.questions import Question, instructions_of

__all__ = ["Asked", "Attempt", "Collected", "Manner", "attempts_of", "collect"]

_MOST_FAULTS_IN_A_ROW = 5
_TELL_EVERY_S = 5.0

Asked = tuple[str, int | None]  # the question's id and the sample; None is the greedy answer
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Attempt:
    """One question in one mode."""

    question: Question
    sample: int | None
    seed: int

    @property
    def key(self) -> Asked:
        """What pairs it with the other side's."""
        return self.question.id, self.sample


@dataclass(frozen=True)
class Manner:
    """How both sides are asked. `temperature` is of sampled answers; greedy ones have none."""

    temperature: float
    max_tokens: int
    concurrency: int
    has_tool_field: bool = False


@dataclass
class Collected:
    """What one side answered. `ended` says why it was asked no more; `faults` are answers that never came."""

    replies: dict[Asked, Reply] = field(default_factory=dict)
    faults: dict[Asked, str] = field(default_factory=dict)
    ended: str = ""
    model: str = ""


def attempts_of(questions: Sequence[Question], num_samples: int, seed: int) -> list[Attempt]:
    """Each question once greedily, and `num_samples` times sampled. Questions of all kinds come mixed.

    Both sides get the same seed for the same question and sample.
    """
    kinds = list(dict.fromkeys(question.kind for question in questions))
    by_kind = [[question for question in questions if question.kind == kind] for kind in kinds]
    longest = max((len(each) for each in by_kind), default=0)
    mixed = [each[place] for place in range(longest) for each in by_kind if place < len(each)]
    return [
        Attempt(question, sample, seed if sample is None else seed + 1 + sample)
        for question in mixed
        for sample in (None, *range(num_samples))
    ]


def collect(engine: Engine, attempts: Sequence[Attempt], manner: Manner, tell: Tell = lambda line: None) -> Collected:
    """Ask everything, at most `manner.concurrency` questions at a time; an engine that is gone is asked no more."""
    collected = Collected(model=engine.model)
    told_at, in_a_row = time.monotonic(), 0
    gone = threading.Event()  # what waits in the pool is not asked any more
    with ThreadPoolExecutor(manner.concurrency) as pool:
        waiting: dict[Future[Reply | Fault | None], Attempt] = {}
        remaining = iter(attempts)
        while True:
            while len(waiting) < manner.concurrency and not gone.is_set() and (attempt := next(remaining, None)):
                waiting[pool.submit(_ask, engine, attempt, manner, gone)] = attempt
            if not waiting:
                return collected
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                attempt, result = waiting.pop(future), future.result()
                if isinstance(result, Reply):
                    collected.replies[attempt.key], in_a_row = result, 0
                elif result is not None:
                    collected.faults[attempt.key], in_a_row = str(result), in_a_row + 1
                    collected.ended = collected.ended or _is_gone(engine, result, in_a_row)
                    if collected.ended:
                        gone.set()
            if time.monotonic() - told_at > _TELL_EVERY_S:
                told_at = time.monotonic()
                tell(f"{engine.url}: {len(collected.replies) + len(collected.faults)} of {len(attempts)} answers")


def _ask(engine: Engine, attempt: Attempt, manner: Manner, gone: threading.Event) -> Reply | Fault | None:
    """One answer, or why there is none; None once the engine is gone."""
    if gone.is_set():
        return None
    question = attempt.question
    messages = question.messages_with(instructions_of(question, manner.has_tool_field))
    has_tool_field = manner.has_tool_field and question.kind == "tools"
    temperature = 0.0 if attempt.sample is None else manner.temperature
    try:
        return engine.ask(Ask(messages, attempt.seed, temperature, manner.max_tokens, has_tool_field))
    except Fault as fault:
        return fault


def _is_gone(engine: Engine, fault: Fault, in_a_row: int) -> str:
    """Why the engine is asked no more; empty while it may go on."""
    if in_a_row >= _MOST_FAULTS_IN_A_ROW:
        return f"{in_a_row} questions in a row got no proper answer, the last: {fault}"
    if fault.kind == "unreachable" and not engine.is_there():
        return f"the engine is gone: {fault}"
    return ""
