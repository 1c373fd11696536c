"""What is said of special values that come out wrong: the first operators of each kind singly, the others together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.finding import Finding
from crosschip.qualify.reproducing.reproducers import Check, shrink, write_reproducer
from crosschip.qualify.tracing.criticality import is_product
from crosschip.qualify.tracing.trace import Trace

__all__ = ["SpecialFindings", "is_used"]

# So many operators of one kind of failure get a finding of their own: those that the subject uses, and others.
_SINGLY = {True: 3, False: 1}
_SHRINK_S = 0.5
_HIDDEN = ("NaN hidden", "overflow hidden")
_CONSEQUENCE = {
    "NaN hidden": "watches for NaN are blind to it, and training goes on after it has failed",
    "overflow hidden": "watches for infinity are blind to it, and loss scaling never backs off",
}

# Every subject calculates, compares with the watches' functions, and casts.
_ALWAYS_USED = ("add", "sub", "mul", "div", "isnan", "isinf", "isfinite", "cast", "abs")


def is_used(trace: Trace, function: str) -> bool:
    """Whether the subject's calls contain a function such as `torch.exp`, in any of its forms."""
    name = function.split(".")[-1]
    if name in _ALWAYS_USED:
        return True
    if name in ("mm", "bmm", "mv", "addmm", "linear"):
        return any(is_product(call.operator) for call in trace.calls)
    forms = {_plain_name(call.operator) for call in trace.calls}
    return name in forms or f"a{name}" in forms or (name in ("amax", "amin") and name[1:] in forms)


def _plain_name(operator: str) -> str:
    """`softmax` for `aten._softmax.default`, `add` for `aten._foreach_add_.Scalar`, `vector_norm`, and so on."""
    return operator.split(".")[1].removeprefix("_foreach").strip("_").removeprefix("linalg_")


class SpecialFindings:
    """Collects failures by kind and reports them: at once where they are the first of their kind."""

    def __init__(self, context: ExamContext) -> None:
        self._context = context
        # Operators by kind of failure and by whether the subject uses them.
        self._known: dict[tuple[str, bool], list[str]] = defaultdict(list)

    def take(
        self,
        kind: str,
        operator: str,
        told: tuple[str, str, str],
        check: Check,
        candidates: Callable[[dict[str, Any]], Iterable[dict[str, Any]]],
        used: bool,
    ) -> None:
        """Take one failure: `told` is the subject, what was expected and what came out."""
        operators = self._known[kind, used]
        if operator in operators:
            return
        operators.append(operator)
        if len(operators) > _SINGLY[used]:
            return
        context = self._context
        device = context.chip.device
        if context.remaining_s > 2 * _SHRINK_S:
            check = shrink(check, device, candidates, _SHRINK_S)
        subject, expected, got = told
        message = f"{subject}: {kind}: expected {expected[:300]}, the chip gives {got[:200]}"
        if kind in _CONSEQUENCE:
            message += f"; {_CONSEQUENCE[kind]}"
        context.journal.finding(
            Finding(
                exam=context.exam,
                kind="numerics",
                verdict="FAIL" if used else "PASS WITH LIMITS",
                subject=subject,
                check=kind,
                message=message if used else f"{message} (the subject does not use it)",
                measured=got[:300],
                limit=expected[:300],
                limit_source="IEEE 754; the CPU in fp64, in fp32 and in the dtype itself, whichever is kindest",
                critical=used and kind in _HIDDEN,
                severity=3.0 if kind == "NaN hidden" else 2.0,
                reproducer=write_reproducer(context, f"{operator} {kind}", f"{subject}: {kind}", check),
            )
        )

    def tell_the_rest(self) -> None:
        """One finding for each kind with more operators than were told singly."""
        for (kind, used), operators in self._known.items():
            others = operators[_SINGLY[used] :]
            if not others:
                continue
            self._context.journal.finding(
                Finding(
                    exam=self._context.exam,
                    kind="numerics",
                    verdict="FAIL" if used else "PASS WITH LIMITS",
                    subject=f"{len(others)} more operators{'' if used else ' that the subject does not use'}",
                    check=kind,
                    message=f"{kind} also in {', '.join(others[:12])}{' and others' if len(others) > 12 else ''}",
                    measured=len(operators),
                    limit=0,
                    limit_source="operators in which it happens",
                    critical=used and kind in _HIDDEN,
                    details={"operators": others},
                )
            )
