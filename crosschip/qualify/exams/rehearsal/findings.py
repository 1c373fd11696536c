"""From the evidence of a rehearsal to findings: a replay in lockstep names the operators, each with a reproducer."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.rehearsal.judgement import Evidence
from crosschip.qualify.exams.rehearsal.lockstep import Divergence, Replay
from crosschip.qualify.exams.rehearsal.run import ChipRaisedError
from crosschip.qualify.finding import Finding
from crosschip.qualify.reproducing.reproducers import Check, shrink, smaller_calls, write_reproducer
from crosschip.qualify.tracing.one_call import call_is_wrong

__all__ = ["not_rehearsed", "nothing_finite", "raised_evidence", "report"]

_MOST_OPERATORS = 4  # findings of one replay
_SHRINK_S = 2.0
_NOT_THE_MODEL = ("/torch/", "crosschip/qualify/")


def raised_evidence(raised: ChipRaisedError, what: str) -> Evidence:
    """Evidence of a step that raised. Python tells the line of the model, which may be all that is ever known."""
    error, seed, step = raised.__cause__ or raised, raised.seed, raised.step
    message = f"{type(error).__name__}: {error}".strip()
    line = _line_of_the_model(error)
    return Evidence(
        check="exception",
        subject=f"{what} at {line}" if line else what,
        message=f"seed {seed}, step {step}: {what} raises {message}" + (f" (at {line})" if line else ""),
        measured=message,
        limit="a result, as on the CPU",
        limit_source="the same step on the CPU",
        severity=1000.0,
        seed=seed,
        step=step,
    )


def not_rehearsed(context: ExamContext, what: str, critical: bool) -> Finding:
    """The finding of a rehearsal that was too short; `critical` when nothing at all can be said."""
    return Finding(
        exam=context.exam,
        kind="numerics",
        verdict="INCONCLUSIVE",
        subject="rehearsal",
        check="time",
        message=f"in {context.budget_s:.0f} s there was no time for {what}, the least that says something",
        measured="too short",
        limit=what,
        limit_source="the statistics of a mean over independent draws",
        critical=critical,
        not_covered=what,
    )


def nothing_finite(context: ExamContext, seed: int) -> Finding:
    """The finding of a subject whose logits are NaN and infinities throughout where they should be right."""
    return Finding(
        exam=context.exam,
        kind="numerics",
        verdict="INCONCLUSIVE",
        subject="logits",
        check="finite",
        message=f"seed {seed}: on the CPU no logit is finite, so none can be compared; let the subject give numbers",
        measured="not finite",
        limit="at least one finite logit on the CPU",
        limit_source="an infinity or NaN has no error",
        critical=True,
        not_covered="the rehearsal of serving",
    )


def report(context: ExamContext, evidence: Sequence[Evidence], replay: Replay) -> None:
    """Write the findings: one for each operator that the replay found wrong, else one for what was seen in training."""
    worst = max(evidence, key=lambda each: each.severity)
    others = [each.message for each in evidence if each is not worst]
    details: dict[str, Any] = {
        "seed": worst.seed,
        "step": worst.step,
        "also": others[:5],
        "num_other_signs": len(others),
        "calls_replayed": replay.num_calls,
        "calls_compared": replay.num_compared,
        "calls_the_cpu_cannot_make": dict(replay.not_compared),
    }
    if not replay.divergences:
        context.journal.finding(_unnamed(context, worst, replay, details))
    for place, divergence in enumerate(replay.divergences[:_MOST_OPERATORS]):
        first = place == 0
        context.journal.finding(_named(context, worst, divergence, replay, details, first))
    if len(replay.divergences) > _MOST_OPERATORS:
        left = ", ".join(each.operator for each in replay.divergences[_MOST_OPERATORS:])
        context.journal.not_covered(f"wrong in the same replay, without a finding of their own: {left}")


def _unnamed(context: ExamContext, worst: Evidence, replay: Replay, details: dict[str, Any]) -> Finding:
    why = "a replay in lockstep found no single operator wrong, so it comes and goes or lies between operators"
    if not replay.complete:
        why = "there was no time to replay all of the step in lockstep"
    if not replay.num_calls:
        why = "the step was not replayed in lockstep"
    return Finding(
        exam=context.exam,
        kind="software" if worst.check == "exception" else "numerics",
        verdict="FAIL",
        subject=worst.subject,
        check=worst.check,
        message=f"{worst.message}; {why}",
        measured=worst.measured,
        limit=worst.limit,
        limit_source=worst.limit_source,
        critical=True,
        severity=worst.severity,
        details=details,
    )


def _named(
    context: ExamContext,
    worst: Evidence,
    divergence: Divergence,
    replay: Replay,
    details: dict[str, Any],
    first: bool,
) -> Finding:
    raises = divergence.what == "exception"
    wrong = f"raises {divergence.measured}" if raises else _in_words(divergence)
    count = replay.num_wrong[divergence.name]
    place = f", at {divergence.code}" if divergence.code else ""
    told = f"{divergence.subject}{place}: {wrong} ({count} wrong calls of it in the step)"
    order = "the first wrong operator of the replayed step is" if first else "wrong in the same step as well is"
    return Finding(
        exam=context.exam,
        kind="software" if raises else "numerics",
        verdict="FAIL",
        subject=divergence.subject,
        check=worst.check,
        message=f"{worst.message}; {order} {told}",
        measured=divergence.measured,
        limit=divergence.limit,
        limit_source="the CPU in the same dtype with the same inputs, against fp64",
        critical=True,
        severity=worst.severity * (1.0 if first else 0.5),
        reproducer=_reproducer(context, divergence),
        details={**details, "call": divergence.number, "code": divergence.code, "training": worst.measured},
    )


def _in_words(divergence: Divergence) -> str:
    if isinstance(divergence.measured, float) and isinstance(divergence.limit, float):
        return f"{divergence.what} {divergence.measured:.3g}, limit {divergence.limit:.3g}"
    return f"{divergence.what} {divergence.measured}"


def _reproducer(context: ExamContext, divergence: Divergence) -> str | None:
    parameters = {
        "operator": divergence.operator,
        "args": divergence.args,
        "kwargs": divergence.kwargs,
        "seed": context.seed,
    }
    context.journal.now(f"rehearsal, shrinking a call of {divergence.operator}")
    check = shrink(Check(call_is_wrong, parameters), context.chip.device, smaller_calls, limit_s=_SHRINK_S)
    title = f"{divergence.operator} gives wrong results, as seen in {divergence.where}."
    return write_reproducer(context, divergence.operator, title, check)


def _line_of_the_model(error: BaseException) -> str | None:
    """The innermost line of the model, or of its training, before the call went to the chip."""
    frames = []
    for frame in traceback.extract_tb(error.__traceback__):
        if "crosschip/chips/" in frame.filename:
            break
        if not any(part in frame.filename for part in _NOT_THE_MODEL):
            frames.append(frame)
    if not frames:
        return None
    last = frames[-1]
    return f"{'/'.join(last.filename.split('/')[-3:])}:{last.lineno} in {last.name}"
