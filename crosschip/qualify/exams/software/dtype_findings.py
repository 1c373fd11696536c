"""The dtype truth table of a chip, judged by what the subject needs."""

from __future__ import annotations

from functools import partial

from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.operator_watch import OperatorWatch
from crosschip.qualify.exams.software.dtype_truth import DTYPES, dtype_step, steps_of
from crosschip.qualify.finding import Finding, Verdict
from crosschip.qualify.reproducing.reproducers import RAISED, Check, outcome_of, write_reproducer
from crosschip.qualify.tracing.criticality import is_product
from crosschip.qualify.tracing.trace import Trace, tensor_specs

__all__ = ["examine_dtypes"]

# A chip without these is not the less for it: nothing here computes in them.
_OPTIONAL = ("float8_e4m3fn", "float8_e5m2")

_Answer = tuple[str, str, str]  # the step, what was expected, what the chip gave


def examine_dtypes(context: ExamContext) -> None:
    """Take each dtype through its steps. A missing one matters if it is used, a silently narrower one always."""
    used = _dtypes_in(context.trace)
    multiplied = _dtypes_in(context.trace, only_products=True)
    for dtype in DTYPES:
        missing: list[_Answer] = []
        wrong: list[_Answer] = []
        answers: dict[str, str] = {}
        for step in steps_of(dtype):
            part = f"dtype {dtype}: {step}"
            if context.wants(part):
                with OperatorWatch(context.journal, part) as watch, watch.mode():
                    context.part(part, partial(_take, context, dtype, step, missing, wrong, answers))
        if answers:
            context.journal.measured(what="dtype", dtype=dtype, used=dtype in used, **answers)
        if missing and (dtype in used or dtype not in _OPTIONAL):
            needed = [each for each in missing if dtype in (multiplied if each[0] == "multiply matrices" else used)]
            _report_missing(context, dtype, missing, bool(needed))
        if wrong:
            only_products = all(each[0] == "multiply matrices" for each in wrong)
            harmless = (only_products and dtype not in multiplied) or (dtype in _OPTIONAL and dtype not in used)
            _report_wrong(context, dtype, wrong, "PASS WITH LIMITS" if harmless else "FAIL", dtype in used)


def _take(
    context: ExamContext, dtype: str, step: str, missing: list[_Answer], wrong: list[_Answer], answers: dict[str, str]
) -> None:
    parameters = {"dtype": dtype, "step": step}
    failed, expected, got = outcome_of(dtype_step, str(context.chip.device), parameters)
    context.journal.checked("dtype")
    answers[step.replace(" ", "_")] = "yes" if not failed else "no" if expected == RAISED else "wrong"
    if failed:
        (missing if expected == RAISED else wrong).append((step, expected, got))


def _dtypes_in(trace: Trace, only_products: bool = False) -> set[str]:
    """The dtypes of tensors that the subject's calls read or make."""
    return {
        spec["dtype"]
        for call in trace.calls
        if not only_products or is_product(call.operator)
        for spec in tensor_specs([call.args, call.kwargs, call.outputs])
    }


def _report_missing(context: ExamContext, dtype: str, missing: list[_Answer], needed: bool) -> None:
    steps = ", ".join(step for step, _, _ in missing)
    first = missing[0]
    use = "the subject uses it" if needed else "the subject does not use it"
    context.journal.finding(
        Finding(
            exam=context.exam,
            kind="software",
            verdict="FAIL" if needed else "PASS WITH LIMITS",
            subject=dtype,
            check="dtype truth table",
            message=f"{dtype} is not there for: {steps} ({use}); the chip says {first[2][:200]}",
            measured=f"no: {steps}",
            limit="what the subject uses must be there",
            limit_source="the subject's trace",
            critical=needed,
            reproducer=_reproducer(context, dtype, first[0], f"{dtype} is not there: {steps}"),
        )
    )


def _report_wrong(context: ExamContext, dtype: str, wrong: list[_Answer], verdict: Verdict, used: bool) -> None:
    steps = ", ".join(step for step, _, _ in wrong)
    step, expected, got = wrong[0]
    context.journal.finding(
        Finding(
            exam=context.exam,
            kind="numerics",
            verdict=verdict,
            subject=dtype,
            check="dtype truth table",
            message=f"{dtype} is silently not what it says ({steps}): {expected} was expected, the chip gives {got}",
            measured=got,
            limit=expected,
            limit_source=f"exact in {dtype}; 1.5 spacings of rounding are allowed",
            critical=used,
            severity=2.0,
            reproducer=_reproducer(context, dtype, step, f"{dtype} is silently computed in another dtype: {step}"),
        )
    )


def _reproducer(context: ExamContext, dtype: str, step: str, title: str) -> str | None:
    return write_reproducer(context, f"{dtype} {step}", title, Check(dtype_step, {"dtype": dtype, "step": step}))
