"""The exam of the operators: each traced call on the chip, against fp64 and relative to honest implementations.

Each distinct operator is examined on one of its calls, and on its gradient where the subject needs that, before any
gets its second call; critical ones come first, then each operator's other dtypes, whose kernels are others. What is
found wrong with an operator ends its examination: one finding each, the first that is sure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest

import torch

from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.operators.case import Case
from crosschip.qualify.exams.operators.checks import GRADIENT_OF
from crosschip.qualify.exams.operators.examination import examine_call
from crosschip.qualify.exams.operators.gradient import gradient_call, operator_or_gradient
from crosschip.qualify.exams.operators.plan import PlannedDraw
from crosschip.qualify.exams.operators.problem import Problem, finding_of, problem_of_judgement, verdict_details
from crosschip.qualify.exams.operators.shapes import varied_dimensions
from crosschip.qualify.finding import LEAST_COVERAGE, Finding
from crosschip.qualify.judging.judge import RATIO_LIMIT, Judgement, benjamini_hochberg
from crosschip.qualify.tracing.criticality import is_critical
from crosschip.qualify.tracing.trace import TracedCall, tensor_specs

__all__ = ["examine"]

_FLUSH_S = 1.0  # kept for what is said at the end


@dataclass
class _Open:
    """A call whose error ratio is for the end, when all p-values are known."""

    call: TracedCall
    judgement: Judgement
    draw: PlannedDraw


@dataclass
class _Sweep:
    """The exam so far."""

    context: ExamContext
    failed: dict[str, int] = field(default_factory=dict)  # operators, and how many of their calls were left out then
    p_values: list[float] = field(default_factory=list)
    open: list[_Open] = field(default_factory=list)
    limited: set[str] = field(default_factory=set)
    undecided: set[str] = field(default_factory=set)  # by the budget, on their first call
    cut: dict[str, int] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    critical: set[str] = field(default_factory=set)
    varied: dict[str, frozenset[str]] = field(default_factory=dict)  # by operator, the dimensions that differ


def examine(context: ExamContext) -> None:
    """Examine the operators of the trace within the budget."""
    sweep = _Sweep(context)
    by_operator: dict[str, list[TracedCall]] = {}
    for call in sorted(context.trace.calls, key=lambda call: -call.time_s):
        by_operator.setdefault(call.operator, []).append(call)
    for name, calls in by_operator.items():
        sweep.shares[name] = sum(map(context.trace.share, calls))
        sweep.varied[name] = varied_dimensions(calls, torch.Tag.pointwise in operator_or_gradient(name).tags)
    critical = [operator for operator in sweep.shares if is_critical(context.trace, operator)]
    sweep.critical = {*critical, *(GRADIENT_OF + operator for operator in critical)}
    in_order = _in_order(sweep, by_operator)
    examined: set[tuple[str, str]] = set()
    for call, is_first in in_order:
        operator = call.operator.removeprefix(GRADIENT_OF)
        if operator in sweep.failed:
            sweep.failed[operator] += 1
        elif context.remaining_s < _FLUSH_S:
            sweep.cut[call.operator] = sweep.cut.get(call.operator, 0) + 1
            sweep.undecided |= {call.operator} if is_first else set()
        else:
            kind = (call.operator, _dtype_of(call))
            context.part(f"{call.title} #{call.id}", partial(_examine, sweep, call, is_first, kind not in examined))
            examined.add(kind)
    _say_how_much(sweep, {call.operator for call, is_first in in_order if is_first})
    _flush(sweep)


def _say_how_much(sweep: _Sweep, operators: set[str]) -> None:
    """How many operators had their first call decided; every critical one must."""
    for what, of_these, least in (
        ("critical operators", operators & sweep.critical, 1.0),
        ("operators", operators, LEAST_COVERAGE),
    ):
        made = len(of_these - sweep.undecided)
        sweep.context.journal.covered(f"{what} and their gradients, one call each", made, len(of_these), least)


def _in_order(sweep: _Sweep, by_operator: dict[str, list[TracedCall]]) -> list[tuple[TracedCall, bool]]:
    """Calls with whether they are their operator's first; these first, critical ones first among them.

    Then come the first ones in another dtype, then all others.
    """

    def rank(operator: str) -> tuple[bool, float]:
        return operator not in sweep.critical, -sweep.shares[operator]

    ordered = sorted(by_operator, key=rank)
    firsts = [by_operator[operator][0] for operator in ordered]
    gradients = [made for call in firsts if (made := gradient_call(call)) is not None]
    of_dtypes, others = [], []
    for operator in ordered:
        first, *rest = by_operator[operator]
        by_dtype = {_dtype_of(call): call for call in reversed(rest) if _dtype_of(call) != _dtype_of(first)}
        of_dtypes.append([call for call in rest if call is by_dtype.get(_dtype_of(call))])
        others.append([call for call in rest if call is not by_dtype.get(_dtype_of(call))])
    further = [*_in_turn(of_dtypes), *_in_turn(others)]
    return [*((call, True) for call in [*firsts, *gradients]), *((call, False) for call in further)]


def _in_turn(columns: list[list[TracedCall]]) -> list[TracedCall]:
    """The first of each, then the second of each, and so on."""
    return [call for row in zip_longest(*columns) for call in row if call is not None]


def _dtype_of(call: TracedCall) -> str:
    """The dtype by which a kernel is chosen."""
    return next((spec["dtype"] for spec in tensor_specs([call.args, call.kwargs])), "")


def _examine(sweep: _Sweep, call: TracedCall, is_first: bool, is_first_of_dtype: bool) -> None:
    context = sweep.context
    operator = call.operator.removeprefix(GRADIENT_OF)
    case = Case(context, call, is_first_of_dtype, sweep.varied.get(operator, frozenset()))
    problem = examine_call(case)
    if problem is not None:
        sweep.failed[call.operator] = 0
        context.journal.finding(finding_of(context, call, problem, call.operator in sweep.critical))
    elif case.limit and call.operator not in sweep.limited:
        sweep.limited.add(call.operator)
        context.journal.finding(
            finding_of(context, call, case.limit, call.operator in sweep.critical, "PASS WITH LIMITS")
        )
    if case.judgement is not None:
        sweep.p_values.append(case.judgement.p_value)
        if problem is None and case.judgement.state in ("open", "abstain"):
            assert case.worst_draw is not None
            sweep.open.append(_Open(call, case.judgement, case.worst_draw))
            sweep.undecided |= {call.operator} if is_first and case.judgement.reason == "draws" else set()


def _flush(sweep: _Sweep) -> None:
    """Say what only the whole sweep can tell: rejections by their rank, what stayed open, what was not covered."""
    context = sweep.context
    context.journal.now("conclusions")
    rejected = benjamini_hochberg(sweep.p_values) if sweep.p_values else []
    threshold = max((p for p, out in zip(sweep.p_values, rejected, strict=True) if out), default=-1.0)
    told: set[str] = set(sweep.failed)
    for each in sorted(sweep.open, key=lambda each: each.judgement.p_value):
        if each.call.operator in told:
            continue
        told.add(each.call.operator)
        if each.judgement.p_value <= threshold:
            problem = problem_of_judgement(each.judgement, each.draw)
            context.journal.finding(finding_of(context, each.call, problem, each.call.operator in sweep.critical))
        elif each.judgement.reason == "draws":
            context.journal.not_covered(f"{each.call.title}: too few draws within the budget")
        else:
            context.journal.finding(_inconclusive(sweep, each))
    for operator, number in sweep.failed.items():
        if number:
            context.journal.not_covered(f"{operator}: {number} more calls, as one has failed")
    if sweep.cut:
        named = ", ".join(f"{operator} ({number})" for operator, number in sorted(sweep.cut.items()))
        context.journal.not_covered(f"calls that the budget of {context.budget_s:.0f} s cut, by operator: {named}")
    context.journal.done("conclusions")


def _inconclusive(sweep: _Sweep, each: _Open) -> Finding:
    judgement = each.judgement
    if judgement.state == "abstain":
        message = "honest implementations differ by more than 10 % of the result, so nothing can be said"
    else:
        message = f"the error ratio is between {judgement.lower:.3g} and {judgement.upper:.3g} after all draws"
    source = "2.5 times the worst honest control"
    problem = Problem("error ratio", message, judgement.ratio, RATIO_LIMIT, source, each.draw)
    details = verdict_details(judgement)
    found = finding_of(sweep.context, each.call, problem, each.call.operator in sweep.critical, "INCONCLUSIVE")
    return Finding(**{**found.__dict__, "details": {**found.details, **details}})
