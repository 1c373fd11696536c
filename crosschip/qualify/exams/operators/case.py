"""One operator call under examination: its inputs, its calls on the chip and the CPU, the errors gathered so far."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.operators import checks
from crosschip.qualify.exams.operators.gradient import operator_or_gradient
from crosschip.qualify.exams.operators.left_to_chance import is_left_to_chance
from crosschip.qualify.exams.operators.plan import PlannedDraw, shorter_lists
from crosschip.qualify.exams.operators.problem import Problem, exact_problem, problem_of_judgement
from crosschip.qualify.exams.operators.runs import Comparison, InputMaker, Inputs, Outcome, compare, equal, on_device
from crosschip.qualify.exams.operators.shapes import Dimensions, base_name, name_dimensions
from crosschip.qualify.judging.judge import DrawErrors, Judgement, Slope, fails_alone, judge_draws
from crosschip.qualify.tracing.trace import TracedCall

__all__ = ["REFUSED", "Case", "Raised", "keep", "made", "on_chip", "raised"]

_CPU = torch.device("cpu")
_LONGEST_S = {"smoke": 3.0, "standard": 12.0, "soak": 60.0}


REFUSED = "runs"  # the check of a call that the chip refuses


class Raised(Exception):
    """The chip raised on a call that the CPU makes."""


@dataclass
class Case:
    """One call under examination. `limit` is a problem that leaves a pass with limits.

    `is_first` is the operator's first call in its dtype, which is examined the most thoroughly.
    `varied` are the dimensions that differ between the subject's calls of the operator, and may be empty one day.
    """

    context: ExamContext
    call: TracedCall
    is_first: bool
    varied: frozenset[str] = frozenset()
    judgement: Judgement | None = None
    worst_draw: PlannedDraw | None = None
    limit: Problem | None = None
    slope: Slope | None = None
    draws: dict[int, list[DrawErrors]] = field(default_factory=dict)  # by position of the output
    planned: dict[str, PlannedDraw] = field(default_factory=dict)  # by label, the first of it
    num_calls: int = 0
    is_exact: bool = False  # every honest result is the golden one

    def __post_init__(self) -> None:
        self.op: Any = operator_or_gradient(self.call.operator)
        self.base = base_name(self.call.operator)
        self.short = shorter_lists(self.call)
        self.dims: Dimensions = name_dimensions(self.short, torch.Tag.pointwise in self.op.tags)
        self.deadline = time.monotonic() + min(_LONGEST_S[self.context.tier], self.context.remaining_s)
        self.maker = InputMaker()
        self.seed = self.context.seed * 100_003 + 17

    @property
    def is_over(self) -> bool:
        """Whether the call has had its time."""
        return time.monotonic() > self.deadline


def keep(
    case: Case,
    draw: PlannedDraw,
    sides: Sequence[tuple[Inputs, Outcome, Outcome]],
    pool: dict[int, list[DrawErrors]],
) -> Problem | None:
    """Compare the draw's calls; errors go to the pool, by position of the output; what needs no tolerance is a problem
    now.
    """
    case.context.journal.checked("exact results" if case.is_exact else "errors", len(sides))
    if case.is_exact and all(equal(chip, eager) for _, chip, eager in sides):
        return None
    comparison = Comparison()
    for inputs, chip, eager in sides:
        compare(case.op, inputs, chip, eager, comparison)
    if comparison.wrong:
        source = "whole numbers, truth values, NaN and Inf have no rounding"
        return exact_problem("exact results", f"{comparison.wrong[0]} ({draw.label})", draw, source)
    if not comparison.has_golden:
        return None
    errors = comparison.errors(draw)
    for position, error in errors:
        pool.setdefault(position, []).append(error)
    case.planned.setdefault(draw.label, draw)
    broken = next(((position, error) for position, error in errors if fails_alone(error)), None)
    if broken is None:
        return None
    position, error = broken
    problem = problem_of_judgement(judge_draws([error]), draw)
    rounds = any(not each.exact for each in pool[position])
    if error.exact and error.is_nearly_exact and rounds:
        case.limit = case.limit or problem
        return None
    return problem


def made(case: Case, draw: PlannedDraw) -> tuple[Inputs, Outcome] | None:
    """The inputs and the CPU's outcome; None when the CPU refuses the call, or its result is anyone's guess."""
    try:
        inputs = case.maker.make(draw)
        if is_left_to_chance(case.base, inputs.args, inputs.kwargs):
            return None
        return inputs, on_device(case.op, inputs, _CPU)
    except (RuntimeError, IndexError, ValueError, NotImplementedError, TypeError):
        return None


def on_chip(case: Case, inputs: Inputs) -> Outcome:
    """The chip's outcome; `Raised` when it refuses the call."""
    case.num_calls += 1
    try:
        return on_device(case.op, inputs, case.context.chip.device)
    except Exception as error:  # whatever a chip raises is about that chip
        raise Raised(f"{type(error).__name__}: {error}") from error


def raised(message: str, draw: PlannedDraw) -> Problem:
    """The problem of a call that the chip refuses."""
    source = "the CPU makes the same call"
    first_line = message.splitlines()[0][:300]
    ways: tuple[tuple[Any, dict[str, Any]], ...] = ((checks.is_misshapen, {}),)
    return Problem(
        REFUSED, f"{first_line} ({draw.label})", first_line, "a result", source, draw, ways, 200.0, "software"
    )
