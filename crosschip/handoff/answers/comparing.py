"""Two engines or checkpoints on the same problems and seeds: do they answer equally well?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crosschip.errors import HandoffError
from crosschip.handoff.answers.asking import Attempt, Collected, Manner, attempts_of, collect
from crosschip.handoff.answers.engine import Engine, Fault
from crosschip.handoff.answers.health import health_of
from crosschip.handoff.answers.identity import weights_hash
from crosschip.handoff.answers.judging import Levels, TaskResult, judge_lengths, judge_shares, with_verdicts
from crosschip.handoff.answers.questions import (
    ARITHMETIC_LEVELS,
    Question,
    Task,
    made_questions,
    parse_tasks,
    read_questions,
)
from crosschip.handoff.answers.scoring import Outcome, length_unit, lengths_of, outcomes_of
from crosschip.handoff.answers.sides import Side, opened, side_of
from crosschip.handoff.answers.verdicts import Verdict, overall

__all__ = ["ANSWERS_SCHEMA", "AnswersReport", "compare_answers"]

ANSWERS_SCHEMA = 1
_MOST_EXAMPLES = 10
_MOST_CHARACTERS = 2000

Tell = Callable[[str], None]


@dataclass(frozen=True)
class AnswersReport:
    """What a comparison found. `problems` are reasons why it is not complete; `not_covered` what it did not ask."""

    verdict: Verdict
    tasks: list[TaskResult]
    settings: dict[str, Any]
    a: dict[str, Any]
    b: dict[str, Any]
    problems: list[str]
    not_covered: list[str]
    examples: list[dict[str, Any]] = field(default_factory=list)
    outcomes: list[list[Any]] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """The report for JSON. `outcomes` are rows of [task, problem, sample, A, B], so that all can be reckoned again.

        A number that is none, as an interval without an end, is null.
        """
        document = {
            "schema_version": ANSWERS_SCHEMA,
            "kind": "answers",
            "verdict": self.verdict,
            "settings": self.settings,
            "tasks": [each.document() for each in self.tasks],
            "a": self.a,
            "b": self.b,
            "problems": self.problems,
            "not_covered": self.not_covered,
            "examples": self.examples,
            "outcomes": self.outcomes,
        }
        return _finite(document)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def compare_answers(
    a: str | Side,
    b: str | Side,
    *,
    problems: Path | None = None,
    num_problems: int | None = None,
    samples: int = 0,
    tasks: str | Sequence[str] | None = None,
    levels: Sequence[int] = ARITHMETIC_LEVELS,
    alpha: float = 0.05,
    margin: float = 0.03,
    length_margin: float = 0.1,
    temperature: float = 0.6,
    max_tokens: int = 1024,
    seed: int = 0,
    concurrency: int = 8,
    chip: str = "auto",
    api_key: str | None = None,
    tell: Tell = lambda line: None,
) -> AnswersReport:
    """Ask both sides the same and test, task by task, whether B is as good as A within the margin.

    Args:
        a: what the model was before: the address of an engine, or a model directory, which is served here on `chip`.
        b: what it is now.
        problems: a JSONL file of problems; None makes held-out arithmetic of `levels` and stories.
        num_problems: of each kind; 200 if made, all of a file.
        samples: sampled answers to each problem at `temperature`, beside the greedy one; their seeds are the same for
            both sides.
        tasks: some of `answers`, `stories`, `tools`, `format`, `length`; None is all.
        alpha: of each one-sided test of equivalence, and of the test of a drop over all tasks together.
        margin: the largest harmless difference of two shares.
        length_margin: the largest harmless difference of the mean lengths, relative to A's.
        max_tokens: of each answer.
        seed: of the problems, the samples and the resampling.

    Raises:
        HandoffError: a side, a task, a level or a file of problems that makes no sense.
    """
    stated = _checked(Levels(alpha, margin, length_margin))
    sides = [each if isinstance(each, Side) else side_of(each, chip=chip, api_key=api_key) for each in (a, b)]
    chosen = parse_tasks(tasks, problems is not None)
    if samples < 0 or max_tokens < 1 or concurrency < 1 or (num_problems is not None and num_problems < 1):
        given = f"samples {samples}, tokens {max_tokens}, concurrency {concurrency}, problems {num_problems}"
        raise HandoffError(f"{given}: not all of them are possible", "samples may be 0, the others are 1 at least")
    questions = _questions(problems, chosen, num_problems, seed, levels)
    attempts = attempts_of(questions, samples, seed)
    has_tool_field = any(each.question.kind == "tools" for each in attempts) and _both_take_tools(sides)
    collected = _ask_both(sides, attempts, Manner(temperature, max_tokens, concurrency, has_tool_field), tell)
    settings = {
        "alpha": alpha,
        "power": stated.power,
        "margin": margin,
        "length_margin": length_margin,
        "tasks": list(chosen),
        "problems": str(problems) if problems is not None else f"made, levels {','.join(map(str, levels))}",
        "num_questions": len(questions),
        "samples": samples,
        "temperature": temperature,
        "max_tokens": max_tokens,
        "seed": seed,
        "tools_asked_in": "the field `tools`" if has_tool_field else "words",
    }
    return _report(chosen, attempts, sides, collected, stated, settings)


def _checked(levels: Levels) -> Levels:
    named = {"alpha": (levels.alpha, 0.5), "margin": (levels.margin, 1.0), "length margin": (levels.length_margin, 10)}
    for name, (value, most) in named.items():
        if not 0 < value < most:
            raise HandoffError(f"{name} = {value:g} is none", f"give a number between 0 and {most:g}")
    return levels


def _questions(
    problems: Path | None, tasks: Sequence[Task], num: int | None, seed: int, levels: Sequence[int]
) -> list[Question]:
    if problems is not None and "stories" not in tasks:
        return read_questions(problems, tasks, num)
    if problems is not None:
        raise HandoffError("stories are made, and a file of problems is given", "leave out one of the two")
    return made_questions(tasks, 200 if num is None else num, seed, levels)


def _ask_both(
    sides: Sequence[Side], attempts: list[Attempt], manner: Manner, tell: Tell
) -> tuple[Collected, Collected]:
    """One side after the other, so that two directories never need the memory of both; B only what A answered."""
    one = _ask_one("A", sides[0], attempts, manner, tell)
    return one, _ask_one("B", sides[1], [each for each in attempts if each.key in one.replies], manner, tell)


def _ask_one(name: str, side: Side, attempts: list[Attempt], manner: Manner, tell: Tell) -> Collected:
    try:
        with opened(side) as engine:
            tell(f"{name}: {engine.model} at {engine.url}: {len(attempts)} answers")
            return collect(engine, attempts, manner, tell)
    except Fault as fault:
        return Collected(ended=f"it could not be asked at all: {fault}")


def _both_take_tools(sides: Sequence[Side]) -> bool:
    """Whether tools go into the request's own field: only if both sides take it, so that both read the same words.

    A directory is served by the engine here, which has no such field.
    """
    if not all(side.is_url for side in sides):
        return False
    with ExitStack() as stack:
        engines = [Engine(side.target, side.api_key, side.timeout_s) for side in sides]
        for engine in engines:
            stack.callback(engine.close)
        return all(engine.is_there() and engine.takes_tools() for engine in engines)


def _report(
    tasks: Sequence[Task],
    attempts: list[Attempt],
    sides: Sequence[Side],
    collected: Sequence[Collected],
    levels: Levels,
    settings: dict[str, Any],
) -> AnswersReport:
    one, other = collected
    outcomes = [each for each in outcomes_of(attempts, one, other) if each.task in tasks]
    results: list[TaskResult] = []
    for task in tasks:
        if task == "length":
            unit = length_unit(attempts, one, other)
            results.append(judge_lengths(lengths_of(attempts, one, other, unit), unit, levels, settings["seed"]))
        else:
            mine = [each for each in outcomes if each.task == task]
            results.append(judge_shares(task, mine, levels, settings["seed"]))
    results = with_verdicts(results, levels)
    critical = "answers" if "answers" in tasks else ""
    verdict = overall([(each.task, each.verdict, not each.no_power) for each in results], critical)
    problems = [line for name, each in zip("AB", collected, strict=True) for line in _what_is_missing(name, each)]
    if problems and verdict != "FAIL":
        verdict = "INCONCLUSIVE"
    sides_told = [_side_document(side, each, len(attempts)) for side, each in zip(sides, collected, strict=True)]
    return AnswersReport(
        verdict,
        results,
        settings,
        sides_told[0],
        sides_told[1],
        problems,
        [f"{each.task}: {each.no_power}" for each in results if each.no_power],
        _examples(attempts, outcomes, one, other),
        [[each.task, *each.key, each.a, each.b] for each in outcomes],
    )


def _what_is_missing(name: str, side: Collected) -> list[str]:
    lines = [f"{name} was asked no more after {len(side.replies)} answers: {side.ended}"] if side.ended else []
    if side.faults:
        first = next(iter(side.faults.values()))
        lines.append(f"{name} gave no proper answer to {len(side.faults)} questions, the first: {first}")
    return lines


def _side_document(side: Side, collected: Collected, num_asked: int) -> dict[str, Any]:
    return {
        "target": side.target,
        "weights": None if side.is_url else weights_hash(Path(side.target)),
        "model": collected.model,
        "num_asked": num_asked,
        "num_faults": len(collected.faults),
        "ended": collected.ended,
        "health": health_of(list(collected.replies.values())),
    }


def _examples(attempts: list[Attempt], outcomes: list[Outcome], a: Collected, b: Collected) -> list[dict[str, Any]]:
    """What A had right and B wrong, for people to look at."""
    questions = {attempt.key: attempt.question for attempt in attempts}
    lost = [each for each in outcomes if each.a and not each.b]
    return [
        {
            "task": each.task,
            "question": questions[each.key].messages[-1]["content"][:_MOST_CHARACTERS],
            "expected": questions[each.key].expected,
            "sample": each.key[1],
            "a": _shown(a, each),
            "b": _shown(b, each),
        }
        for each in lost[:_MOST_EXAMPLES]
    ]


def _shown(side: Collected, outcome: Outcome) -> dict[str, Any]:
    reply = side.replies[outcome.key]
    text = reply.refusal or reply.text or str(reply.calls or "")
    return {
        "reasoning": reply.reasoning[-_MOST_CHARACTERS:],
        "text": text[-_MOST_CHARACTERS:],
        "finish_reason": reply.finish_reason,
    }
