"""What a soak says, as findings and measurements."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.determinism.repetition import repeats_differ
from crosschip.qualify.exams.stability.corruption import (
    PLANNED_CHIPS,
    MismatchRate,
    implied_words,
    mismatch_rate,
    rate_words,
)
from crosschip.qualify.exams.stability.series import finite, thinned
from crosschip.qualify.exams.stability.soak import Soaked
from crosschip.qualify.exams.stability.step_times import (
    DRIFT_LIMIT,
    TAIL_LIMIT,
    StepTimes,
    drift_is_the_chips,
    step_times,
    tail_is_high,
)
from crosschip.qualify.exams.stability.work import Repeats
from crosschip.qualify.finding import LEAST_COVERAGE, Finding, Verdict
from crosschip.qualify.reproducing.ends import call_ends
from crosschip.qualify.reproducing.reproducers import Check, outcome_of, write_reproducer, write_untried_reproducer
from crosschip.qualify.tracing.criticality import is_critical
from crosschip.qualify.tracing.trace import TracedCall

__all__ = ["report_corruption", "report_sensors", "report_step_times"]

_REPRODUCED_WITHIN_S = 20.0
_LEAST_REPEATS, _MOST_REPEATS = 1_000, 20_000
_FOR_TIME = 4  # repeats that tell how long more of them take, with making the inputs and comparing
_CONCLUSIONS = "soak: conclusions"
_SAME_BITS = "fixed work on one chip gives the same bits each time"


def report_corruption(context: ExamContext, soaked: Soaked) -> None:
    """Mismatches by what they were seen in, their rate, and what it means for many chips."""
    context.journal.now(_CONCLUSIONS)
    context.journal.covered(
        "operators in the soak",
        soaked.num_calls,
        soaked.num_planned,
        0.0 if soaked.has_step else LEAST_COVERAGE,  # the step holds them all
    )
    for refused in soaked.refused:
        context.journal.not_covered(f"soak: {refused}")
    if soaked.device_s <= 0.0:
        return
    context.journal.checked("fixed work again", sum(each.number - 1 for each in soaked.repeats))
    odd = [each for each in soaked.repeats if each.mismatches]
    left_open = [each for each in odd if each.work.is_left_open]
    # A step that holds an operator whose bits torch leaves open may vary with it.
    counted = [each for each in odd if each not in left_open and not (left_open and each.work.call is None)]
    rate = mismatch_rate(sum(each.mismatches for each in counted), soaked.device_s)
    chips = PLANNED_CHIPS if context.planned_chips is None else (context.planned_chips,)
    words = f"{rate_words(rate)}; {implied_words(rate, chips)}"
    _measure_rate(context, soaked, rate, chips)
    for each in sorted(odd, key=lambda repeats: -repeats.mismatches):
        context.journal.now(_CONCLUSIONS)
        _report_mismatch(context, each, words, each in counted)
    for each in soaked.repeats:
        if each.raised:
            _report_raised(context, each)
    if rate.mismatches == 0:
        context.journal.not_covered(f"silent corruption that is rarer: {words}")


def _measure_rate(context: ExamContext, soaked: Soaked, rate: MismatchRate, planned_chips: tuple[int, ...]) -> None:
    implied = [(chips, rate.per_day(chips)) for chips in planned_chips]
    context.journal.measured(
        check="silent corruption",
        num_repeats=sum(each.number for each in soaked.repeats),
        **{name: finite(value) for name, value in asdict(rate).items()},
        elapsed_s=finite(soaked.elapsed_s),
        words=rate_words(rate),
        implied=[
            {"chips": chips, "expected_per_day": finite(expected), "upper_per_day": finite(most)}
            for chips, (expected, most) in implied
        ],
        implied_words=implied_words(rate, planned_chips),
    )


def _report_mismatch(context: ExamContext, repeats: Repeats, rate: str, counts: bool) -> None:
    verdict: Verdict = "FAIL" if counts else "PASS WITH LIMITS"
    difference = repeats.difference()
    assert difference is not None, repeats.work.part
    open_words = "" if counts else "; torch leaves the order of a sum open here, so it may be no corruption"
    title = f"{repeats.work.subject} gives other bits now and then"
    call = repeats.work.call
    context.journal.finding(
        Finding(
            exam=context.exam,
            kind="stability",
            verdict=verdict,
            subject=repeats.work.subject,
            check="fixed work again",
            message=f"{title}: {repeats.mismatches} of {repeats.number} repeats, the first of them repeat "
            f"{repeats.first_odd}: {difference.words()}{open_words}; in all {rate}",
            measured=repeats.mismatches / repeats.number,
            limit=0.0,
            limit_source=_SAME_BITS,
            critical=True,
            severity=1.0 + repeats.mismatches,
            reproducer=_reproducer(context, repeats, title),
            details={
                "first_odd_repeat": repeats.first_odd,
                "num_repeats": repeats.number,
                "difference": difference.document(),
                "hashes": dict(repeats.odd.most_common(20)),
                "operator": call.operator if call else None,
            },
        )
    )


def _reproducer(context: ExamContext, repeats: Repeats, title: str) -> str | None:
    """A file that repeats the call often enough to meet a mismatch, where that can be done in time."""
    call = repeats.work.call
    number = max(64, 5 * repeats.number // max(1, repeats.mismatches))
    left_s = min(_REPRODUCED_WITHIN_S, context.remaining_s)
    if call is None or number > _MOST_REPEATS or left_s <= 0.0:
        return None
    parameters = call.parameters(context.seed)
    started = time.monotonic()
    outcome_of(repeats_differ, str(context.chip.device), {**parameters, "number": _FOR_TIME})
    once_s = (time.monotonic() - started) / _FOR_TIME
    # Once on the CPU, which must not show it, and once on the chip.
    if 2 * number * once_s > left_s:
        return None
    return write_reproducer(
        context, f"soak {call.operator}", title, Check(repeats_differ, {**parameters, "number": number})
    )


def _report_raised(context: ExamContext, repeats: Repeats) -> None:
    call = repeats.work.call
    context.journal.finding(
        Finding(
            exam=context.exam,
            kind="stability",
            verdict="FAIL",
            subject=repeats.work.subject,
            check="fixed work again",
            message=f"raises after {repeats.number} repeats that went well: {repeats.raised}",
            measured="raises",
            limit="the same result each time",
            limit_source=_SAME_BITS,
            critical=call is None or is_critical(context.trace, call.operator),
            severity=50.0,
            reproducer=None if call is None else _reproducer_of_raising(context, repeats, call),
        )
    )


def _reproducer_of_raising(context: ExamContext, repeats: Repeats, call: TracedCall) -> str | None:
    """A file that repeats the call twice as often as went well, or a thousand times, since other calls went before it.

    It is not tried: what has raised may do so at once now.
    """
    number = max(_LEAST_REPEATS, 2 * repeats.number)
    if number > _MOST_REPEATS:
        return None
    title = f"{repeats.work.subject} raises after {repeats.number} calls that went well"
    check = call_ends(call, number, context.seed)
    return write_untried_reproducer(context, f"raises {call.operator}", title, check)


def report_step_times(context: ExamContext, soaked: Soaked) -> None:
    """Drift and tail of the step's time. Limits at most: other work on the machine can cause them."""
    steps, host = step_times(soaked.steps_s), step_times(soaked.host_s)
    if steps is None:
        context.journal.not_covered(f"step times: {len(soaked.steps_s)} steps are too few")
        return
    context.journal.checked("step times", steps.num)
    context.journal.measured(
        check="step times",
        role=context.role,
        **_summary(steps),
        host=None if host is None else _summary(host),
        step_time_s=thinned(soaked.steps_at_s, soaked.steps_s),
        host_time_s=thinned(soaked.steps_at_s, soaked.host_s),
    )
    missing = [name for name, value in (("drift", steps.drift), ("p99", steps.p99_s)) if value is None]
    if missing:
        context.journal.not_covered(f"{' and '.join(missing)} of step times: {steps.num} steps are too few")
    if drift_is_the_chips(steps, host):
        assert steps.drift is not None
        words = (
            f"steps take {steps.drift.median:.3g} times as long in the second half of the soak as in the first "
            f"(at least {steps.drift.lower:.3g} times, 95 %), which the host's own work does not{_heat(soaked)}"
        )
        _limit(context, "step-time drift", words, steps.drift.lower, DRIFT_LIMIT, "a tenth of the time, lost to drift")
    if tail_is_high(steps, host):
        assert steps.tail is not None
        words = f"one step in a hundred takes {steps.tail:.3g} times the median's {steps.p50_s * 1e3:.3g} ms"
        source = "one late step in a hundred, for which all ranks wait, costs 2 % of the time"
        _limit(context, "step-time tail", words, steps.tail, TAIL_LIMIT, source)


def _summary(steps: StepTimes) -> dict[str, Any]:
    drift = steps.drift
    return {
        "num_steps": steps.num,
        "p50_s": finite(steps.p50_s),
        "p99_s": finite(steps.p99_s),
        "p99_over_p50": finite(steps.tail),
        "max_s": finite(steps.max_s),
        "jitter": finite(steps.jitter),
        "drift": None if drift is None else finite(drift.median),
        "drift_lower": None if drift is None else finite(drift.lower),
        "drift_upper": None if drift is None else finite(drift.upper),
    }


def _limit(context: ExamContext, check: str, words: str, measured: float, limit: float, source: str) -> None:
    context.journal.finding(
        Finding(
            exam=context.exam,
            kind="stability",
            verdict="PASS WITH LIMITS",
            subject=f"{context.role} step of {context.subject.name}, made small",
            check=check,
            message=words,
            measured=finite(measured),
            limit=limit,
            limit_source=source,
            severity=measured / limit,
        )
    )


def _heat(soaked: Soaked) -> str:
    """What the sensors say beside a drift: a clock that fell, a temperature that rose."""
    readings = soaked.sensors
    clocks = [each.clock_mhz for each in readings if each.clock_mhz is not None]
    heats = [each.temperature_c for each in readings if each.temperature_c is not None]
    words = [f"clock {clocks[0]:.0f} to {clocks[-1]:.0f} MHz"] if len(clocks) > 1 else []
    words += [f"{heats[0]:.0f} to {heats[-1]:.0f} degrees C"] if len(heats) > 1 else []
    return f"; meanwhile {', '.join(words)}" if words else ""


def report_sensors(context: ExamContext, soaked: Soaked) -> None:
    """Series of clock, temperature and power, null where nobody tells."""
    series = {
        name: _known(soaked.sensors_at_s, [getattr(each, name) for each in soaked.sensors])
        for name in ("clock_mhz", "temperature_c", "power_w")
    }
    context.journal.measured(check="sensors", **series)
    missing = [name for name, points in series.items() if points is None]
    if missing:
        context.journal.not_covered(f"{', '.join(missing)}: neither torch nor the vendor's tool nor the system tells")


def _known(times_s: Sequence[float], values: Sequence[float | None]) -> list[list[float | None]] | None:
    numbers = [math.nan if value is None else value for value in values]
    return None if all(math.isnan(value) for value in numbers) else thinned(times_s, numbers)
