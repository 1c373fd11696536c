"""Does a row depend on its batch? What an operator's compositions say, as one finding for each operator."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.determinism.batch_plan import BatchedCall, batched_calls
from crosschip.qualify.exams.determinism.composition import (
    ERROR_LIMIT,
    PRODUCTS,
    Compared,
    compare_batches,
    depends_on_batch,
    make_row_wise,
)
from crosschip.qualify.finding import Finding, Verdict
from crosschip.qualify.reproducing.reproducers import Check, shrink, smaller_calls, write_reproducer

__all__ = ["examine_batches"]

_CONFIRMED = 3
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


@dataclass
class _OfOperator:
    num_compared: int = 0
    seen: list[_Seen] = field(default_factory=list)


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
        context.journal.not_covered(f"batch composition of {call.title}: {type(error).__name__}: {error}")
        return
    found.num_compared += len(compared)
    found.seen += [_Seen(call, kind, each) for each in compared if each.share > 0]


def _report(context: ExamContext, name: str, found: _OfOperator) -> None:
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
        if seen and all(_again(context, seen[0]) for _ in range(_CONFIRMED)):
            _write(context, name, why, seen, found.num_compared)
            return


def _again(context: ExamContext, seen: _Seen) -> bool:
    """Whether it shows again in the very same way: what comes and goes is not the batch's doing."""
    call = seen.call
    made = make_row_wise(call.operator, call.args, call.kwargs, list(call.sliced), seen.kind, context.seed)
    try:
        return compare_batches(made, context.chip.device, [seen.compared.name]) == [seen.compared]
    except Exception:  # it raises now and did not before
        return False


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
