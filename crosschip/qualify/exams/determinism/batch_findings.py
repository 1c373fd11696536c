"""Does a row depend on its batch? What an operator's compositions say, as one finding for each operator."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.determinism.batch_plan import BatchedCall, batched_calls
from crosschip.qualify.exams.determinism.composition import (
    ERROR_LIMIT,
    PRODUCTS,
    Compared,
    RowWise,
    compare_batches,
    depends_on_batch,
    make_row_wise,
)
from crosschip.qualify.exams.determinism.repetition import repeats_differ
from crosschip.qualify.finding import Finding, Verdict
from crosschip.qualify.reproducing.reproducers import (
    Check,
    shrink,
    smaller_calls,
    write_reproducer,
    write_untried_reproducer,
)
from crosschip.qualify.tracing.host_errors import is_of_the_host

__all__ = ["examine_batches"]

_CONFIRMED = 3
_MANY = 1000  # calls, by which what comes and goes should have come
_LIMITS = {
    "integers": "sums of small integers are exact in any order, so their bits cannot depend on it",
    "error": f"{ERROR_LIMIT} times the error of the other batch, the CPU and a sequential sum, and four deviations",
    "bits": "the CPU gives the same bits here, whatever the batch",
}


@dataclass(frozen=True)
class _Seen:
    """One call's values of one kind in one composition, where the chip's bits changed."""

    call: BatchedCall
    kind: str
    compared: Compared

    @property
    def why(self) -> str:
        """`integers` and `error` are beyond what the order of a sum explains; `bits` and `as on the CPU` are not."""
        if self.kind == "integers":
            return "integers"
        if self.kind == "traced" and self.compared.ratio > self.compared.limit:
            return "error"
        return "as on the CPU" if self.compared.share_on_cpu > 0 else "bits"


@dataclass(frozen=True)
class _Unsteady:
    """One call that went otherwise when it was made again: its bits, or `raised` in one of the tries."""

    call: BatchedCall
    words: str
    raised: bool = False


@dataclass
class _OfOperator:
    num_compared: int = 0
    seen: list[_Seen] = field(default_factory=list)
    unsteady: list[_Unsteady] = field(default_factory=list)


def examine_batches(context: ExamContext, until_s: float) -> None:
    """Compare compositions of the subject's row-wise calls until the exam's remaining time is down to `until_s`."""
    by_name: dict[str, _OfOperator] = {}
    calls, num_taken = list(batched_calls(context.trace, context.tier)), 0
    for call in calls:
        if context.remaining_s < until_s:
            break
        num_taken += 1
        name = f"batches of {call.title}"
        if name in context.skip:
            continue
        context.journal.now(name)
        found = by_name.setdefault(call.name, _OfOperator())
        for kind in ("traced", "integers", "cancelling") if call.name in PRODUCTS else ("traced",):
            _compare(context, call, kind, found)
    context.journal.covered("batch composition of calls", num_taken, len(calls))
    for name, of_operator in by_name.items():
        context.journal.checked("batch composition", of_operator.num_compared)
        _report(context, name, of_operator)


def _compare(context: ExamContext, call: BatchedCall, kind: str, found: _OfOperator) -> None:
    made = make_row_wise(call.operator, call.args, call.kwargs, list(call.sliced), kind, context.seed)
    try:
        compared = compare_batches(made, context.chip.device)
    except Exception as error:  # whatever the chip raises for a batch that it does not take
        words = f"{type(error).__name__}: {error}"
        if not is_of_the_host(words) and _goes_well(made, context.chip.device):
            found.unsteady.append(_Unsteady(call, f"{words}; and not when it was made again", raised=True))
        else:
            context.journal.not_covered(f"batch composition of {call.title}: {words}")
        return
    found.num_compared += len(compared)
    found.seen += [_Seen(call, kind, each) for each in compared if each.share > 0]


def _goes_well(made: RowWise, device: torch.device) -> bool:
    try:
        compare_batches(made, device)
    except Exception:  # as the first time
        return False
    return True


def _report(context: ExamContext, name: str, found: _OfOperator) -> None:
    _report_seen(context, name, found)
    if found.unsteady:
        _write_unsteady(context, name, found.unsteady)


def _report_seen(context: ExamContext, name: str, found: _OfOperator) -> None:
    if not found.seen:
        return
    shares = [(seen.compared.share, seen.compared.share_on_cpu) for seen in found.seen]
    context.journal.measured(
        operator=name,
        check="batch composition",
        num_compared=found.num_compared,
        num_different=len(found.seen),
        largest_share=max(share for share, _ in shares),
        largest_share_on_cpu=max(share for _, share in shares),
    )
    for why in ("integers", "error", "bits"):
        seen = [each for each in found.seen if each.why == why]
        if not seen:
            continue
        tries = (_otherwise(context, seen[0]) for _ in range(_CONFIRMED))
        unsteady = next((each for each in tries if each is not None), None)
        if unsteady is None:
            _write(context, name, why, seen, found.num_compared)
            return
        found.unsteady.append(unsteady)


def _otherwise(context: ExamContext, seen: _Seen) -> _Unsteady | None:
    """How it shows when it is made again, if not in the very same way: what comes and goes is not the batch's doing."""
    call, first = seen.call, seen.compared
    made = make_row_wise(call.operator, call.args, call.kwargs, list(call.sliced), seen.kind, context.seed)
    try:
        (again,) = compare_batches(made, context.chip.device, [first.name])
    except Exception as error:  # it raises now and did not before
        words = f"{type(error).__name__}: {error}"
        return None if is_of_the_host(words) else _Unsteady(call, f"{words}; and not when it was made before", True)
    # Errors are against products in fp64 on the CPU, whose last bits may vary.
    errors = ((first.error, again.error), (first.whole, again.whole))
    if first.share == again.share and all(math.isclose(*each, rel_tol=1e-6) for each in errors):
        return None
    return _Unsteady(call, f"{first.share:.2%} of the numbers change with {first.name}, then {again.share:.2%}")


def _write_unsteady(context: ExamContext, name: str, unsteady: list[_Unsteady]) -> None:
    worst = max(unsteady, key=lambda each: each.raised)
    title = f"{name} {'raises' if worst.raised else 'gives other bits'} now and then for the same inputs"
    call = worst.call
    parameters = {"operator": call.operator, "args": call.args, "kwargs": call.kwargs, "seed": context.seed}
    check = Check(repeats_differ, {**parameters, "number": _MANY})
    context.journal.finding(
        Finding(
            exam=context.exam,
            kind="software" if worst.raised else "numerics",
            verdict="FAIL",
            subject=call.title,
            check="the same batches again",
            message=f"{title}: {worst.words}",
            measured="other results",
            limit="the same result each time",
            limit_source="on one chip, with the same seed, a run is bit-exact",
            critical=True,
            reproducer=write_untried_reproducer(context, f"batches again {call.name}", title, check),
            details={"calls": sorted({each.call.title for each in unsteady})},
        )
    )


def _write(context: ExamContext, name: str, why: str, seen: list[_Seen], num_compared: int) -> None:
    verdict: Verdict = "PASS WITH LIMITS" if why == "bits" else "FAIL"
    worst = max(seen, key=lambda each: each.compared.ratio if why == "error" else each.compared.share)
    compared = worst.compared
    ways = sorted({each.compared.name for each in seen})
    moved = [way for way in ways if way.startswith("rows")]
    depends = "size" if not moved else "size and the position" if len(moved) < len(ways) else "position"
    what = {
        "integers": f"{compared.share:.2%} of exact integer results change",
        "error": f"the error changes by a factor of {compared.ratio:.3g}",
        "bits": f"{compared.share:.2%} of the numbers change in their last bits, as another order of the sum explains",
    }[why]
    title = f"{name}: a row's result depends on the batch's {depends}"
    context.journal.finding(
        Finding(
            exam=context.exam,
            kind="numerics",
            verdict=verdict,
            subject=worst.call.title,
            check="batch composition",
            message=f"{title}: {what} ({', '.join(ways[:4])}); in {len(seen)} of {num_compared} comparisons",
            measured=compared.ratio if why == "error" else compared.share,
            limit=compared.limit if why == "error" else 0.0,
            limit_source=_LIMITS[why],
            critical=True,
            severity=max(1.0, compared.ratio),
            reproducer=_reproducer(context, worst, why, title),
            details={
                "values": worst.kind,
                "compositions": ways,
                "calls": sorted({each.call.title for each in seen}),
                "share_on_cpu": compared.share_on_cpu,
                "error": compared.error,
                "error_in_whole_batch": compared.whole,
                "honest_error": compared.honest,
            },
        )
    )


def _reproducer(context: ExamContext, worst: _Seen, why: str, title: str) -> str | None:
    if context.remaining_s < 0:
        return None
    parameters: dict[str, Any] = {
        "operator": worst.call.operator,
        "args": worst.call.args,
        "kwargs": worst.call.kwargs,
        "sliced": list(worst.call.sliced),
        "kind": worst.kind,
        "name": worst.compared.name,
        "limit": worst.compared.limit if why == "error" else 0.0,
        "seed": context.seed,
    }
    check = shrink(Check(depends_on_batch, parameters), context.chip.device, smaller_calls, limit_s=1.0)
    return write_reproducer(context, f"batch {worst.call.name}", title, check)
