"""The software exam: is all there that the subject calls, in the dtypes it asks for, quick enough, and can it be saved?

Parts: the dtype truth table; copies, files and random numbers; every traced call; calls far slower than their share;
the speed of a whole step; the rates of products and copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.software.calls_exist import examine_calls, plain_parameters
from crosschip.qualify.exams.software.cliffs import CLIFF_FACTOR, CallTime, launches_of, slowness, typical_proportion
from crosschip.qualify.exams.software.dtype_findings import examine_dtypes
from crosschip.qualify.exams.software.rates import RATES_SHARE, examine_rates
from crosschip.qualify.exams.software.step_speed import STEP_SHARE, examine_step_speed
from crosschip.qualify.exams.software.transfer_findings import examine_transfers
from crosschip.qualify.finding import Finding
from crosschip.qualify.reproducing.reproducers import Check, outcome_of, write_reproducer
from crosschip.qualify.threads import half_the_cores
from crosschip.qualify.tracing.criticality import is_critical
from crosschip.qualify.tracing.replay import call_is_quick_enough, trivial_call_s
from crosschip.qualify.tracing.trace import TracedCall

__all__ = ["examine"]

_CLIFFS_SHARE = 0.15  # of the budget is kept for measuring suspiciously slow calls again
_MOST_CLIFFS = 6  # operators that are measured again and reported


def examine(context: ExamContext) -> None:
    """Examine the chip's software with the subject's calls."""
    with half_the_cores():
        examine_dtypes(context)
        examine_transfers(context)
        times, a_call_failed = examine_calls(
            context, until_s=context.budget_s * (_CLIFFS_SHARE + STEP_SHARE + RATES_SHARE)
        )
        if times:
            _examine_cliffs(context, times)
        examine_step_speed(context, a_call_failed)
    examine_rates(context)  # with all cores: a plan counts on them


def _examine_cliffs(context: ExamContext, times: Sequence[CallTime]) -> None:
    """Measure the calls that seem far too slow once more, beside the CPU, and report what stays: once an operator."""
    launch_s = trivial_call_s(context.chip.device)
    typical = typical_proportion(times, launch_s)
    context.journal.measured(what="speed", proportion=typical, launch_s=launch_s, num_calls=len(times))
    context.journal.checked("time of a call", len(times))
    calls = {call.id: call for call in context.trace.calls}
    suspects: dict[str, list[tuple[float, CallTime]]] = {}
    for each in times:
        slow = slowness(each, typical, launch_s)
        if slow > CLIFF_FACTOR:
            suspects.setdefault(calls[each.call_id].operator, []).append((slow, each))
    worst_first = sorted(suspects.values(), key=lambda found: -max(slow for slow, _ in found))
    for found in worst_first[:_MOST_CLIFFS]:
        slow, worst = max(found, key=lambda pair: pair[0])
        call = calls[worst.call_id]
        examine_one = partial(_examine_cliff, context, call, worst, slow, typical, len(found))
        context.part(f"time of {call.title} ({call.id})", examine_one)
    for found in worst_first[_MOST_CLIFFS:]:
        operator = calls[found[0][1].call_id].operator
        context.journal.not_covered(f"{operator} seems slow and was not measured again: the time was up")


def _examine_cliff(
    context: ExamContext, call: TracedCall, measured: CallTime, slow: float, typical: float, num_slow: int
) -> None:
    launches = launches_of(measured.num_tensors)
    parameters = {**plain_parameters(call, context.seed), "typical": typical, "launches": launches}
    check = Check(call_is_quick_enough, parameters)
    wrong, expected, got = outcome_of(check.function, str(context.chip.device), parameters)
    if not wrong:
        return
    title = f"{call.operator} is far slower on {context.chip.name} than its share allows: {got}, {expected}"
    context.journal.finding(
        Finding(
            exam=context.exam,
            kind="software",
            verdict="FAIL",
            subject=call.title,
            check="performance cliff",
            message=f"{call.operator} takes {got}, {expected}; an operator that runs on the host looks like this",
            measured=round(slow, 1),
            limit=CLIFF_FACTOR,
            limit_source="times what the chip's typical proportion to the CPU and a trivial call's time let expect",
            critical=is_critical(context.trace, call.operator),
            severity=slow / CLIFF_FACTOR,
            reproducer=write_reproducer(context, f"{call.operator} slow", title, check),
            details={"typical_proportion": typical, "num_slow_calls": num_slow, "phases": call.phases},
        )
    )
