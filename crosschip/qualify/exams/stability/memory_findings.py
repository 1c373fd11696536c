"""What memory readings of a soak say, and which operator the growth comes from."""

from __future__ import annotations

import math
import time
from array import array
from dataclasses import dataclass
from typing import Literal

from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.stability.memory import garbage_set_aside, memory_left, read_memory
from crosschip.qualify.exams.stability.memory_check import memory_grows
from crosschip.qualify.exams.stability.memory_slope import (
    LEAST_READINGS,
    PLANNED_RUN_HOURS,
    MemorySlope,
    memory_slope,
    memory_verdict,
)
from crosschip.qualify.exams.stability.series import finite, thinned
from crosschip.qualify.exams.stability.soak import Soaked
from crosschip.qualify.exams.stability.work import Work
from crosschip.qualify.finding import Finding, Verdict
from crosschip.qualify.reproducing.ends import ends
from crosschip.qualify.reproducing.reproducers import Check, outcome_of, write_reproducer
from crosschip.qualify.tracing.trace import TracedCall

__all__ = ["report_memory"]

_BLAMED_CALLS = 32
_REPRODUCED_CALLS, _REPRODUCED_WITHIN_S = 256, 10.0  # of what grows most; on the CPU, too
_BLAMING_S = 10.0  # beyond the exam's own time: a leak without a name helps nobody
_GIB = 1 << 30

Where = Literal["resident", "allocated", "device"]
_WORDS: dict[Where, str] = {
    "resident": "host memory, resident",
    "allocated": "host memory, handed out by the C library",
    "device": "device memory",
}


@dataclass(frozen=True)
class _Growth:
    where: Where
    slope: MemorySlope
    verdict: Verdict
    hours: float | None
    left: int | None


def report_memory(context: ExamContext, soaked: Soaked) -> None:
    """The slope of each kind of memory; growth of the host's is one finding, the device's another."""
    context.journal.covered(
        "rounds of work, of those that memory's slope needs",
        min(len(soaked.rounds_at_s), LEAST_READINGS),
        LEAST_READINGS,
        least=1.0,
    )
    host_left, device_left = memory_left(context.chip.device)
    found: list[_Growth] = []
    readings: list[tuple[Where, array[float], int | None]] = [
        ("resident", soaked.resident, host_left),
        ("allocated", soaked.allocated, host_left),
        ("device", soaked.on_device, device_left),
    ]
    for where, sizes, left in readings:
        growth = _measure(context, soaked, where, sizes, left)
        if growth is not None:
            found.append(growth)
    for kinds in (("allocated", "resident"), ("device",)):
        growing = [each for each in found if each.where in kinds and each.verdict != "PASS"]
        if growing:
            _report(context, soaked, max(growing, key=lambda each: (each.verdict == "FAIL", each.slope.lower)))


def _measure(
    context: ExamContext, soaked: Soaked, where: Where, sizes: array[float], left: int | None
) -> _Growth | None:
    if not sizes or any(math.isnan(each) for each in sizes):
        context.journal.not_covered(
            f"{_WORDS[where]}: nobody tells it" if sizes else f"{_WORDS[where]}: no round ended"
        )
        return None
    slope = memory_slope(soaked.rounds_at_s, sizes)
    series = thinned(soaked.rounds_at_s, sizes)
    if slope is None:
        context.journal.measured(check="memory", what=where, series=series)
        context.journal.not_covered(f"slope of {_WORDS[where]}: {len(sizes)} rounds of work are too few")
        return None
    verdict, hours = memory_verdict(slope, left)
    context.journal.checked("memory slope")
    context.journal.measured(
        check="memory",
        what=where,
        bytes_per_hour=finite(slope.bytes_per_hour),
        lower=finite(slope.lower),
        upper=finite(slope.upper),
        least_seen=finite(slope.least_seen),
        num_parts=slope.num_parts,
        span_s=finite(slope.span_s),
        left_bytes=left,
        hours_until_full=finite(hours),
        series=series,
    )
    if verdict == "PASS" and where != "allocated":
        unseen = max(slope.least_seen, slope.upper)
        context.journal.not_covered(
            f"a leak of {_WORDS[where]} that is slower than {unseen / _GIB:.2g} GiB/h, in {slope.span_s:.0f} s of soak"
        )
    return _Growth(where, slope, verdict, hours, left)


def _report(context: ExamContext, soaked: Soaked, growth: _Growth) -> None:
    slope = growth.slope
    blamed = _blamed(context, soaked, growth.where)
    full = (
        "nobody tells how much is left"
        if growth.hours is None or growth.left is None
        else f"the {growth.left / _GIB:.3g} GiB left are full after {growth.hours:.3g} hours at the lower bound"
    )
    context.journal.finding(
        Finding(
            exam=context.exam,
            kind="stability",
            verdict=growth.verdict,
            subject="device memory" if growth.where == "device" else "host memory",
            check="memory slope",
            message=f"{_WORDS[growth.where]} grows with the work by {slope.bytes_per_hour / _GIB:.3g} GiB/h (at least "
            f"{slope.lower / _GIB:.3g}, 95 %), in nearly all of {slope.num_parts} parts of the soak after the warm-up; "
            f"{full}{_blame_words(blamed)}",
            measured=finite(slope.lower),
            limit=0.0 if growth.left is None else finite(growth.left / PLANNED_RUN_HOURS),
            limit_source=f"bytes/h at which what is left would be full within a run of {PLANNED_RUN_HOURS:.0f} hours",
            critical=True,
            severity=1.0 if growth.hours is None else max(1.0, PLANNED_RUN_HOURS / max(growth.hours, 1e-6)),
            reproducer=_reproducer(context, soaked, growth.where, blamed),
            details={"hours_until_full": finite(growth.hours), "bytes_per_call": blamed},
        )
    )


def _blamed(context: ExamContext, soaked: Soaked, where: Where) -> dict[str, float]:
    """Bytes per call by what grows when it is repeated alone, the worst first; resident memory is too coarse."""
    deadline = time.monotonic() + _BLAMING_S
    found: dict[str, float] = {}
    with garbage_set_aside():
        for repeats in soaked.repeats:
            if time.monotonic() > deadline:
                break
            if not repeats.raised:
                context.journal.now(repeats.work.part)
                found[repeats.work.subject] = _growth_per_call(context, repeats.work, where)
    worst = sorted(found.items(), key=lambda pair: -pair[1])
    return {subject: size for subject, size in worst[:10] if size >= 1.0}


def _reproducer(context: ExamContext, soaked: Soaked, where: Where, blamed: dict[str, float]) -> str | None:
    """A file that repeats the call by which memory grows most, where one was found that is quick enough."""
    calls = {repeats.work.subject: repeats.work.call for repeats in soaked.repeats}
    for subject, size in blamed.items():  # the worst first; a step is no call
        if (call := calls[subject]) is not None and _is_quick(context, call):
            parameters = {**call.parameters(context.seed), "where": "device" if where == "device" else "allocated"}
            check = Check(memory_grows, {**parameters, "number": _REPRODUCED_CALLS, "least": size / 2})
            return write_reproducer(context, f"memory {call.operator}", f"{subject} keeps memory", check)
    return None


def _is_quick(context: ExamContext, call: TracedCall) -> bool:
    """Whether the CPU, too, makes the call often enough in time."""
    context.journal.now(f"{call.title} ({call.id}), on the CPU as a control")
    started = time.monotonic()
    outcome_of(ends, "cpu", {**call.parameters(context.seed), "number": 2})
    once_s = (time.monotonic() - started) / 2
    return 2 * _REPRODUCED_CALLS * once_s < _REPRODUCED_WITHIN_S


def _growth_per_call(context: ExamContext, work: Work, where: Where) -> float:
    """Bytes; 0 where nobody tells."""
    number = _BLAMED_CALLS if work.call else 2
    work.run()
    before = read_memory(context.chip.device)
    for _ in range(number):
        work.run()
    after = read_memory(context.chip.device)
    began, ended = (each.device if where == "device" else each.allocated for each in (before, after))
    return 0.0 if began is None or ended is None else (ended - began) / number


def _blame_words(blamed: dict[str, float]) -> str:
    if not blamed:
        return ""
    shown = [f"{subject} ({bytes_each:,.0f} bytes a call)" for subject, bytes_each in list(blamed.items())[:3]]
    return f"; it grows when these are repeated alone: {', '.join(shown)}"
