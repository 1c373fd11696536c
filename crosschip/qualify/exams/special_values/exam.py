"""The exam of special values: overflow, infinities, NaN, subnormal numbers, -0.

Parts: a table of functions and special values in each floating-point dtype of the subject; what training watches for
numbers that are not finite; subnormal numbers and the sign of zero; and the subject's own calls with one input
poisoned. A chip that hides NaN or overflow makes every watch blind: a run that has failed goes on looking well.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.software.calls_exist import plain_parameters
from crosschip.qualify.exams.special_values.non_finite_watch import (
    WATCHES,
    subnormals_are_kept,
    watch_sees,
    zeros_keep_their_sign,
)
from crosschip.qualify.exams.special_values.poisoned_call import poison_shows
from crosschip.qualify.exams.special_values.special_case import lies_of, single_cases, special_case
from crosschip.qualify.exams.special_values.special_findings import SpecialFindings, is_used
from crosschip.qualify.exams.special_values.special_table import FAMILIES, special_parameters
from crosschip.qualify.finding import Finding
from crosschip.qualify.reproducing.reproducers import RAISED, Check, outcome_of, smaller_calls, write_reproducer
from crosschip.qualify.threads import half_the_cores
from crosschip.qualify.tracing.inputs import operator_named
from crosschip.qualify.tracing.trace import Trace, TracedCall, tensor_specs

__all__ = ["examine"]

# Where NaN goes is the operator's own choice (an order, an index), or another exam's question (masks of attention).
_NOT_POISONED = ("sort", "topk", "arg", "bernoulli", "multinomial", "dropout", "rand", "attention", "unique", "empty")
_MOST_POISONED = 6  # inputs of one call; lists of tensors may have hundreds


def examine(context: ExamContext) -> None:
    """Examine what the chip does with special values."""
    with half_the_cores():
        _examine(context)


def _examine(context: ExamContext) -> None:
    findings = SpecialFindings(context)
    refused: set[str] = set()
    dtypes = _dtypes(context.trace)
    for dtype in dtypes:
        for family in FAMILIES:
            context.part(f"{family} in {dtype}", partial(_table, context, findings, refused, family, dtype))
        context.part(f"watches in {dtype}", partial(_watches, context, dtype))
        context.part(f"small numbers in {dtype}", partial(_small_numbers, context, dtype))
    if refused:
        context.journal.not_covered(f"special values of what the chip refuses: {', '.join(sorted(refused)[:12])}")
    _poisoned_calls(context, findings)
    findings.tell_the_rest()


def _dtypes(trace: Trace) -> list[str]:
    """The floating-point dtypes of the subject that the table knows."""
    found = {spec["dtype"] for call in trace.calls for spec in tensor_specs([call.args, call.kwargs])}
    return [dtype for dtype in ("bfloat16", "float16", "float32", "float64") if dtype in found]


def _table(context: ExamContext, findings: SpecialFindings, refused: set[str], family: str, dtype: str) -> None:
    for parameters in special_parameters(family, dtype):
        function = parameters["function"]
        context.journal.checked(family)
        try:
            lies = lies_of(str(context.chip.device), **parameters)
        except Exception:  # that it is missing is the software exam's finding, if the subject needs it
            refused.add(f"{function} in {dtype}")
            continue
        for kind in sorted({lie[0] for lie in lies}):
            check = Check(special_case, {**parameters, "kind": kind})
            _, expected, got = outcome_of(special_case, str(context.chip.device), check.parameters)
            told = (f"{function} {dtype}", expected, got)
            findings.take(kind, function, told, check, single_cases, is_used(context.trace, function))


def _watches(context: ExamContext, dtype: str) -> None:
    """The role's watches with NaN and with both infinities; one finding names those that are blind."""
    blind: list[tuple[str, Check]] = []
    for watch in WATCHES[context.role]:
        for value in (math.nan, math.inf, -math.inf):
            check = Check(watch_sees, {"dtype": dtype, "watch": watch, "value": value})
            context.journal.checked("watches")
            wrong, expected, _ = outcome_of(watch_sees, str(context.chip.device), check.parameters)
            if wrong and expected != RAISED and not outcome_of(watch_sees, "cpu", check.parameters)[0]:
                blind.append((f"{watch} ({value})", check))
    if blind:
        names = ", ".join(name for name, _ in blind)
        message = f"what training watches does not see numbers that are not finite in {dtype}: {names}"
        _report(context, "FAIL", f"non-finite watch in {dtype}", "watches", message, "blind", "sees", blind[0][1])


def _small_numbers(context: ExamContext, dtype: str) -> None:
    """Limits that the user should know of: honest chips differ here."""
    for function, subject, what in (
        (
            subnormals_are_kept,
            f"subnormal numbers in {dtype}",
            f"below {torch.finfo(getattr(torch, dtype)).tiny:.1e} is 0",
        ),
        (zeros_keep_their_sign, f"the sign of zero in {dtype}", "the sign of zero is lost"),
    ):
        check = Check(function, {"dtype": dtype})
        wrong, expected, got = outcome_of(function, str(context.chip.device), check.parameters)
        context.journal.checked("small numbers")
        if wrong and expected != RAISED:
            message = f"{subject}: {what}: expected {expected}, the chip gives {got}"
            _report(context, "PASS WITH LIMITS", subject, "small numbers", message, got, expected, check)


def _report(
    context: ExamContext, verdict: Any, subject: str, name: str, message: str, measured: str, limit: str, check: Check
) -> None:
    context.journal.finding(
        Finding(
            exam=context.exam,
            kind="numerics",
            verdict=verdict,
            subject=subject,
            check=name,
            message=message,
            measured=measured,
            limit=limit,
            limit_source="IEEE 754",
            critical=verdict == "FAIL",
            severity=4.0,
            reproducer=write_reproducer(context, subject, message, check),
        )
    )


def _poisoned_calls(context: ExamContext, findings: SpecialFindings) -> None:
    """The smallest call of each operator and dtype, with NaN in one input after the other."""
    calls, num_left = _smallest_calls(context.trace), 0
    for call in calls:
        if context.remaining_s < 0.1 * context.budget_s:
            num_left += 1
            continue
        context.part(f"NaN in {call.title} ({call.id})", partial(_poisoned_call, context, findings, call))
    context.journal.covered("traced calls with NaN", len(calls) - num_left, len(calls))


def _smallest_calls(trace: Trace) -> list[TracedCall]:
    smallest: dict[tuple[str, str], tuple[int, TracedCall]] = {}
    for call in trace.calls:
        op = operator_named(call.operator)
        specs = [spec for spec in tensor_specs([call.args, call.kwargs]) if _is_floating_point(spec)]
        if not specs or op.is_view or any(name in call.operator for name in _NOT_POISONED):
            continue
        size = sum(math.prod(spec["shape"]) for spec in specs)
        kind = (call.operator, specs[0]["dtype"])
        if size > 0 and (kind not in smallest or size < smallest[kind][0]):
            smallest[kind] = (size, call)
    return [call for _, call in sorted(smallest.values(), key=lambda pair: pair[0])]


def _is_floating_point(spec: dict[str, Any]) -> bool:
    dtype: torch.dtype = getattr(torch, spec["dtype"])
    return dtype.is_floating_point and 0 not in spec["shape"]


def _poisoned_call(context: ExamContext, findings: SpecialFindings, call: TracedCall) -> None:
    parameters = plain_parameters(call, context.seed)
    num_inputs = sum(map(_is_floating_point, tensor_specs([call.args, call.kwargs])))
    step = max(1, num_inputs // _MOST_POISONED)
    for poisoned in range(0, num_inputs, step):
        check = Check(poison_shows, {**parameters, "poisoned": poisoned})
        wrong, expected, got = outcome_of(poison_shows, str(context.chip.device), check.parameters)
        context.journal.checked("traced call with NaN")
        if wrong and expected != RAISED and not outcome_of(poison_shows, "cpu", check.parameters)[0]:
            kind = "NaN or infinity invented" if got.startswith("0 of them") else "NaN hidden"
            findings.take(kind, call.operator, (call.title, expected, got), check, smaller_calls, used=True)
            return
