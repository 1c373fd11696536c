"""What bursts say, as findings."""

from __future__ import annotations

from collections.abc import Sequence

from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.stability.burst import Burst
from crosschip.qualify.exams.stability.series import finite
from crosschip.qualify.finding import Finding

__all__ = ["report_bursts"]


def report_bursts(context: ExamContext, bursts: Sequence[Burst]) -> None:
    """Work that raised or gave other bits in company, or on long prompts from one time to the next."""
    for burst in bursts:
        if burst.refused:
            context.journal.not_covered(f"{burst.part}: {burst.refused}")
            continue
        context.journal.checked("burst", burst.num_done)
        context.journal.measured(
            check="burst",
            part=burst.part,
            num_done=burst.num_done,
            num_different=burst.num_different,
            time_s=finite(burst.time_s),
        )
        if burst.raised:
            _report(context, burst, "raises", f"raises what it did not alone or over shorter prompts: {burst.raised}")
        if burst.num_different:
            assert burst.difference is not None, burst.part
            words = f"{burst.num_different} of {burst.num_done} results have other bits than the first"
            _report(context, burst, burst.num_different / burst.num_done, f"{words}: {burst.difference.words()}")


def _report(context: ExamContext, burst: Burst, measured: float | str, words: str) -> None:
    context.journal.finding(
        Finding(
            exam=context.exam,
            kind="stability",
            verdict="FAIL" if burst.num_different else burst.verdict,
            subject=burst.part.removeprefix("burst: "),
            check="burst",
            message=words,
            measured=measured,
            limit="a result" if isinstance(measured, str) else 0.0,
            limit_source="the same work gives the same bits, whatever runs beside it",
            critical=True,
            severity=20.0,
            reproducer=burst.reproducer,
            details={"difference": burst.difference.document() if burst.difference else None},
        )
    )
