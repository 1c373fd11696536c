"""A problem found with one operator call, and the finding and the reproducer that are made of it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.operators import checks
from crosschip.qualify.exams.operators.plan import PlannedDraw
from crosschip.qualify.finding import Finding, Kind, Verdict
from crosschip.qualify.judging.judge import (
    BIAS_LIMIT,
    GROSS_LIMIT,
    RATIO_LIMIT,
    SLOPE_LIMIT,
    TAIL_LIMIT,
    Judgement,
    Slope,
)
from crosschip.qualify.reproducing.reproducers import (
    Check,
    outcome_of,
    shrink,
    slug_of,
    smaller_calls,
    write_reproducer,
)
from crosschip.qualify.tracing.trace import TracedCall

__all__ = [
    "Problem",
    "exact_problem",
    "finding_of",
    "problem_of_judgement",
    "problem_of_slope",
    "structure_problem",
    "verdict_details",
]

# What others hold operators to, beside the limits used here.
PUBLISHED = {
    "Ascend msprobe, error ratio to the reference device (max, mean, RMSE) for the strictest operators": [2, 1.2, 1.2],
    "Ascend msprobe, for ordinary operators": [10, 2, 2],
    "BackendBench, rtol and atol for every dtype": [1e-2, 1e-2],
}
_SHRINKING_S = 2.0
_NUM_SEEDS = 4
_RARE = 100  # calls, for a failure that comes and goes
_SEARCH_S = 10.0  # for finding a check that shows the problem; a part of an exam that takes long is taken for a hang


@dataclass(frozen=True)
class Problem:
    """What was wrong on which inputs. `ways` are checks that may show it in a file, the most telling first."""

    check: str
    message: str
    measured: float | str | None
    limit: float | str | None
    limit_source: str
    draw: PlannedDraw
    ways: tuple[tuple[Any, dict[str, Any]], ...] = ()
    severity: float = 1.0
    kind: Kind = "numerics"
    details: dict[str, Any] = field(default_factory=dict)


def exact_problem(check: str, message: str, draw: PlannedDraw, source: str) -> Problem:
    """A problem without tolerance."""
    ways: tuple[tuple[Any, dict[str, Any]], ...] = ((checks.differs, {}), (checks.errs, {"times": 4.0}))
    return Problem(check, message, message, "exact", source, draw, ways, 100.0)


def structure_problem(message: str, draw: PlannedDraw) -> Problem:
    """A result of another form, or an argument that was written and must not be."""
    source = "the operator's contract, as the CPU keeps it"
    ways: tuple[tuple[Any, dict[str, Any]], ...] = tuple(
        (each, {}) for each in (checks.is_misshapen, checks.overwrites, checks.views_otherwise)
    )
    return Problem("structure", message, message, "exact", source, draw, ways, 100.0)


def problem_of_judgement(judgement: Judgement, draw: PlannedDraw) -> Problem:
    """What the judge rejects."""
    details = verdict_details(judgement)
    if judgement.reason == "bitwise":
        message = f"{judgement.num_different} results differ from exact ones ({judgement.worst_draw})"
        exact = exact_problem("exact results", message, draw, "results that the dtype holds exactly have no rounding")
        return replace(exact, details=details)
    rejected = _REJECTED.get(judgement.reason, _error_ratio)(judgement)
    return Problem(
        rejected.check,
        rejected.message,
        rejected.measured,
        rejected.limit,
        rejected.source,
        draw,
        rejected.ways,
        rejected.measured / rejected.limit,
        details=details,
    )


@dataclass(frozen=True)
class _Rejected:
    """What a judgement's reason says, beside the inputs it was found on."""

    check: str
    message: str
    measured: float
    limit: float
    source: str
    ways: tuple[tuple[Any, dict[str, Any]], ...]


_BY_RATIO = ((checks.errs, {"times": RATIO_LIMIT}),)


def _outlier(judgement: Judgement) -> _Rejected:
    message = f"a result is off by {judgement.gross:.3g} times the honest error there ({judgement.worst_draw})"
    source = "2.5 times 6.4 standard deviations, which 10^10 honest results do not reach"
    ways = ((checks.errs, {"times": GROSS_LIMIT}), (checks.errs, {"times": 4.0}))
    return _Rejected("outliers", message, judgement.gross, GROSS_LIMIT, source, ways)


def _tail(judgement: Judgement) -> _Rejected:
    assert judgement.tail is not None
    message = f"the 99.9 % point of its errors is {judgement.tail:.3g} times that of the worst honest control"
    source = "2.5 times the widest honest difference of shape, normal against uniform errors"
    return _Rejected("error tail", message, judgement.tail, TAIL_LIMIT, source, _BY_RATIO)


def _bias(judgement: Judgement) -> _Rejected:
    worst = max((each for each in judgement.offsets if each.fails), key=lambda each: abs(each.effect))
    words = {"bias": "away from zero", "shift": "upwards", "gain": "in proportion to the result"}[worst.kind]
    message = (
        f"its errors have one sign: their mean {words} is {worst.effect:+.3g} of the honest error, "
        f"{worst.z:+.3g} standard errors beyond the controls'; {worst.share:.1g} of the results"
    )
    source = "half the usual error; truncation instead of rounding has 1.73 of it"
    ways = ((checks.is_biased, {"limit": BIAS_LIMIT, "draws": 16}),)
    return _Rejected("bias", message, abs(worst.effect), BIAS_LIMIT, source, ways)


def _error_ratio(judgement: Judgement) -> _Rejected:
    assert judgement.ratio is not None
    message = (
        f"its error is {judgement.ratio:.3g} times that of the worst honest control "
        f"(95 % bounds {judgement.lower:.3g} to {judgement.upper:.3g}, p = {judgement.p_value:.2g})"
    )
    source = "2.5 times the worst honest control, one-sided test, false discoveries held at 5 %"
    return _Rejected("error ratio", message, judgement.ratio, RATIO_LIMIT, source, _BY_RATIO)


_REJECTED = {"outlier": _outlier, "tail": _tail, "bias": _bias, "slight bias": _bias}


def problem_of_slope(slope: Slope, draw: PlannedDraw) -> Problem:
    """An error that grows too fast with K."""
    message = f"its error grows with K by the power {slope.value:.2f} more than that of the worst honest control"
    source = "half the growth of an accumulator as coarse as the result"
    ways = ((checks.errs, {"times": RATIO_LIMIT}),)
    return Problem("slope over K", message, slope.value, SLOPE_LIMIT, source, draw, ways, slope.value / SLOPE_LIMIT)


def verdict_details(judgement: Judgement) -> dict[str, Any]:
    """The judge's numbers for a report."""
    numbers = {name: getattr(judgement, name) for name in ("ratio", "lower", "upper", "p_value", "tail", "gross")}
    rounded = {name: float(f"{value:.5g}") for name, value in numbers.items() if value is not None}
    counts = {name: getattr(judgement, name) for name in ("num_draws", "num_outputs", "num_exact", "num_abstained")}
    offsets = {each.kind: [round(each.effect, 4), round(each.z, 2)] for each in judgement.offsets}
    return {**rounded, **counts, "offsets_effect_and_z": offsets}


def finding_of(
    context: ExamContext, call: TracedCall, problem: Problem, critical: bool, verdict: Verdict = "FAIL"
) -> Finding:
    """The finding, with a reproducer when a check on the chip shows the problem alone."""
    reproducer = _reproducer(context, call, problem) if verdict == "FAIL" else None
    return Finding(
        exam=context.exam,
        kind=problem.kind,
        verdict=verdict,
        subject=call.title,
        check=problem.check,
        message=f"{call.operator}: {problem.message}",
        measured=problem.measured,
        limit=problem.limit,
        limit_source=problem.limit_source,
        critical=critical,
        severity=problem.severity,
        reproducer=reproducer,
        details={**problem.details, "inputs": problem.draw.label, "published limits": PUBLISHED},
    )


def _reproducer(context: ExamContext, call: TracedCall, problem: Problem) -> str | None:
    """The file's name; None where no check shows the problem alone, or none did in time."""
    title = f"{call.title}: {problem.message}"
    limit_s = min(_SHRINKING_S, max(0.2, context.remaining_s / 10))
    for check in _checks_that_show(context, call, problem):
        smallest = check if check.repeats > 1 else shrink(check, context.chip.device, smaller_calls, limit_s)
        for each in (smallest, check):
            name = write_reproducer(context, slug_of(call.title), title, each)
            if name is not None:
                return name
    return None


def _checks_that_show(context: ExamContext, call: TracedCall, problem: Problem) -> Iterator[Check]:
    """Values are drawn anew there, so a few seeds are tried, and then many calls for a failure that comes and goes."""
    args, kwargs = problem.draw.encoded
    device, started, longest_s = str(context.chip.device), time.monotonic(), 1e-6
    for seed, (function, more) in itertools.product(range(_NUM_SEEDS), problem.ways):
        given = {"operator": call.operator, "args": args, "kwargs": kwargs, "seed": problem.draw.seed + seed, **more}
        began = time.monotonic()
        check = Check(function, given)
        if _shows(check, device):
            yield check
        longest_s = max(longest_s, time.monotonic() - began)
        if time.monotonic() - started > _SEARCH_S:
            return
    # A check is made here and before its file is written, each time on both devices; there are two or three checks.
    number = min(_RARE, int(_SEARCH_S / 12 / longest_s))
    common = {"operator": call.operator, "args": args, "kwargs": kwargs, "seed": problem.draw.seed}
    many = [Check(function, {**common, **more}, repeats=number) for function, more in problem.ways]
    many.append(Check(checks.errs_in_turn, {**common, "times": GROSS_LIMIT, "draws": number}))
    yield from (check for check in many if number > 1 and _shows(check, device))


def _shows(check: Check, device: str) -> bool:
    """Whether the check fails on the chip and not on the CPU."""
    return all(
        outcome_of(check.function, place, check.parameters, check.repeats)[0] == (place == device)
        for place in (device, "cpu")
    )
