"""The subject's own step on the chip: does it run, and how fast? That tells two chips apart that have both passed."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable

import torch

from crosschip.chips import synchronize
from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.finding import Finding
from crosschip.qualify.judging.median_bounds import median_bounds
from crosschip.qualify.subjects.subject import Workload

__all__ = ["STEP_SHARE", "examine_step_speed"]

STEP_SHARE = 0.2  # of the exam's time
_LEAST_STEPS, _MOST_STEPS = 5, 40  # fewer than five bound no median
_PART = "speed of a step"


def examine_step_speed(context: ExamContext, a_call_failed: bool) -> None:
    """Measure steps per second, with 95 % bounds of the median, after one step that warms up.

    What a step costs at most is known after the first; where five do not fit into the time, that is said instead. A
    step in which the chip raises is a failure, unless `a_call_failed` by itself, which explains it.
    """

    if context.died_in:
        context.journal.not_covered(f"{_PART}: it would die as {sorted(context.died_in)[0]} did")
        return

    def run() -> None:
        try:
            _measure(context, STEP_SHARE * context.budget_s)
        except Exception as error:  # whatever the chip raises
            words, shown = f"{type(error).__name__}: {str(error)[:200]}", traceback.format_exc()
            traceback.clear_frames(error.__traceback__)  # they hold the workload on the chip
            if a_call_failed or not _runs_on_the_cpu(context):
                context.journal.not_covered(f"{_PART}: {words}")
            else:
                context.journal.finding(_broken_step(context, words, shown))

    context.part(_PART, run)


def _runs_on_the_cpu(context: ExamContext) -> bool:
    """Whether the subject makes the same step there; else it is no chip's failure."""
    context.journal.now("the subject's step on the CPU, as a control")  # a sign of life: it may take long there
    try:
        step, _ = _step(context, torch.device("cpu"))
        step(0)
    except Exception:
        return False
    return True


def _broken_step(context: ExamContext, words: str, shown: str) -> Finding:
    return Finding(
        exam=context.exam,
        kind="software",
        verdict="FAIL",
        subject=f"{context.role} step",
        check="the subject's step",
        message=f"the subject's own {context.role} step raises on the chip: {words}",
        measured=words,
        limit="a step",
        limit_source="the same step on the CPU",
        critical=True,
        severity=50.0,
        details={"traceback": shown[-4000:]},
    )


def _step(context: ExamContext, device: torch.device) -> tuple[Callable[[int], object], Workload]:
    """The subject's step of the role on a device, called with its number, and the workload that makes it."""
    dtype = getattr(torch, context.trace.compute_dtype)
    workload = context.subject.workload(device, dtype, context.seed)
    return workload.train_step if context.role == "train" else lambda number: workload.serve_step(), workload


def _measure(context: ExamContext, share_s: float) -> None:
    step, workload = _step(context, context.chip.device)
    count = 0

    def step_s() -> float:
        nonlocal count
        synchronize(context.chip)
        began = time.perf_counter()
        step(count)
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
