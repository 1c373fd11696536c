"""The speed of the subject's own step on the chip: what tells two chips apart that have both passed."""

from __future__ import annotations

import time

import torch

from crosschip.chips import synchronize
from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.judging.median_bounds import median_bounds

__all__ = ["STEP_SHARE", "examine_step_speed"]

STEP_SHARE = 0.2  # of the exam's time
_LEAST_STEPS, _MOST_STEPS = 5, 40  # fewer than five bound no median
_PART = "speed of a step"


def examine_step_speed(context: ExamContext) -> None:
    """Measure steps per second, with 95 % bounds of the median, after one step that warms up.

    What a step costs at most is known after the first; where five do not fit into the time, that is said instead.
    """

    if context.died_in:
        context.journal.not_covered(f"{_PART}: it would die as {sorted(context.died_in)[0]} did")
        return

    def run() -> None:
        try:
            _measure(context, STEP_SHARE * context.budget_s)
        except Exception as error:  # whatever the chip raises: the traced calls and the rehearsal name it
            context.journal.not_covered(f"{_PART}: {type(error).__name__}: {str(error)[:200]}")

    context.part(_PART, run)


def _measure(context: ExamContext, share_s: float) -> None:
    dtype = getattr(torch, context.trace.compute_dtype)
    workload = context.subject.workload(context.chip.device, dtype, context.seed)
    count = 0

    def step_s() -> float:
        nonlocal count
        synchronize(context.chip)
        began = time.perf_counter()
        workload.train_step(count) if context.role == "train" else workload.serve_step()
        synchronize(context.chip)
        count += 1
        return time.perf_counter() - began

    first_s = step_s()
    ends_at = time.monotonic() + share_s
    if share_s < _LEAST_STEPS * first_s:
        context.journal.not_covered(
            f"{_PART}: the first took {first_s:.2g} s, and {_LEAST_STEPS} more do not fit into {share_s:.2g} s"
        )
        return
    times_s = [step_s() for _ in range(_LEAST_STEPS)]
    while len(times_s) < _MOST_STEPS and time.monotonic() < ends_at:
        times_s.append(step_s())
    bounds = median_bounds(times_s)
    assert bounds is not None
    context.journal.checked(_PART, len(times_s))
    context.journal.measured(
        kind="speed", what=f"{context.role} steps", value=1 / bounds.median, lower=1 / bounds.upper,
        upper=1 / bounds.lower, unit="steps/s", num=len(times_s), notes=list(workload.notes),
    )  # fmt: skip
