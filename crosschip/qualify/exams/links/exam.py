"""Links: several processes over the chip's own collectives. Are sums right, links equal and steady, deaths noticed?

A CPU and the simulated chip have several ranks on one machine; an accelerator one for each device of its kind and
model.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.links.collective_cases import kind_is_needed, needed_by
from crosschip.qualify.exams.links.conformance_findings import (
    CallResult,
    Defect,
    call_results,
    defects_of,
    refusals_of,
)
from crosschip.qualify.exams.links.drill import GRACE_S, start_apart, strike
from crosschip.qualify.exams.links.drill_findings import detection_finding, skew_finding
from crosschip.qualify.exams.links.flaps import judge_sustained
from crosschip.qualify.exams.links.group import backend_for
from crosschip.qualify.exams.links.link_checks import late_rank_is_lost, loss_goes_unnoticed, pair_is_slow
from crosschip.qualify.exams.links.link_findings import (
    bandwidth_entry,
    collective_times,
    fits_document,
    flap_finding,
    largest_times,
    outlier_finding,
    pair_times,
    pooled_visits,
    sustained_entry,
    sustained_seconds,
)
from crosschip.qualify.exams.links.message_sizes import Layout, layout_of
from crosschip.qualify.exams.links.outliers import OUTLIER_RATIO, find_outliers
from crosschip.qualify.exams.links.reproduction import write_collective_reproducer
from crosschip.qualify.exams.links.schedule import Schedule, schedule
from crosschip.qualify.exams.links.session import START_LIMIT_S, Session, run_session
from crosschip.qualify.exams.links.slow_collectives import find_slow_collectives, slow_collective_finding
from crosschip.qualify.exams.peers import ON_HOST, chips_alike
from crosschip.qualify.finding import Finding
from crosschip.qualify.reproducing.reproducers import Check, write_untried_reproducer

__all__ = ["chips_of_ranks", "examine"]

_SHARED_RATIO = 3.0  # between ranks on shared cores a message may take twice as long by chance
_HOST_WAIT_S = 0.05  # for which a rank may wait for a core that it shares with others, even at the best of times
_REPRODUCER_S = 15.0  # two sets of ranks: on the chip and on the CPU
_OVERTIME_S = 45.0  # for the file of the worst failure, which is made even when the time is up
_ANNOUNCE_EVERY_S = 5.0


@dataclass
class _Exam:
    """The exam under way. Parts are announced again while ranks, which have deadlines of their own, work."""

    context: ExamContext
    chips: list[str]
    layout: Layout
    directory: Path
    announced: tuple[str, float] = ("", 0.0)
    start_s: float = 5.0

    @property
    def num_ranks(self) -> int:
        return len(self.chips)

    def announce(self, part: str) -> None:
        if part != self.announced[0] or time.monotonic() - self.announced[1] > _ANNOUNCE_EVERY_S:
            self.context.journal.now(part)
            self.announced = part, time.monotonic()


def chips_of_ranks(context: ExamContext) -> list[str]:
    """The chip of each rank: on a host's memory three or, beyond the smoke tier, four; else one for each device.

    Of fewer than three nobody can say which pair is the slow one.
    """
    if context.chip.device.type in ON_HOST:
        return [context.chip_spec] * (3 if context.tier == "smoke" else 4)
    return chips_alike(context)


def examine(context: ExamContext) -> None:
    """Examine the collectives and the links between this machine's chips of the kind."""
    import torch.distributed as dist

    if not dist.is_available():
        context.journal.not_covered("this torch has no torch.distributed")
        return
    with tempfile.TemporaryDirectory(prefix="crosschip-links-") as name:
        exam = _Exam(context, chips_of_ranks(context), layout_of(context.trace), Path(name))
        exam.start_s = 2.0 + 2.0 * exam.num_ranks / max(1, os.cpu_count() or 1)
        context.part("collectives and links", lambda: _collectives_and_links(exam))
        if exam.num_ranks < 2:
            _report_single(exam)
            return
        context.part("a rank killed", lambda: _drill(exam, "killed"))
        context.part("a rank stopped", lambda: _drill(exam, "stopped"))
        context.part("ranks that start apart", lambda: _skew(exam))
    context.journal.not_covered("other machines; crosschip.qualify.exams.links.measure is for them")


def _plan(exam: _Exam, start_s: float) -> Schedule:
    exam.start_s = start_s
    return schedule(exam.context.tier, exam.context.budget_s, exam.num_ranks, start_s)


def _collectives_and_links(exam: _Exam) -> None:
    context = exam.context
    session = run_session(
        exam.directory / "session",
        exam.chips,
        exam.layout,
        context.tier,
        lambda start_s: _plan(exam, start_s),
        context.seed,
        exam.announce,
    )
    context.journal.measured(
        check="links",
        backend=backend_for(context.chip.device),
        num_ranks=exam.num_ranks,
        start_s=round(session.started_s, 2),
        messages=[{"num_bytes": each.num_bytes, "what": each.what} for each in session.messages],
    )
    _report_ends(exam, session)
    _report_conformance(exam, session)
    if exam.num_ranks > 1:
        _report_links(exam, session)
        _report_sustained(exam, session)


def _report_ends(exam: _Exam, session: Session) -> None:
    """Ranks that raised, died or hung: the first to do so is named with what it was doing."""
    if session.deaths:
        first = session.deaths[0]
        _tell(exam, "stability", first.during, "ranks", f"rank {first.rank} of {exam.num_ranks}, in {first.during}: "
              f"{first.how}", "ended", "all ranks end their work")  # fmt: skip
    elif session.hung:
        rank = min(session.hung)
        _tell(exam, "stability", session.hung[rank], "ranks", f"{len(session.hung)} of {exam.num_ranks} ranks hang; "
              f"rank {rank} in {session.hung[rank]}", "hang", "each collective ends within its time-out")  # fmt: skip


def _tell(exam: _Exam, kind: Any, subject: str, check: str, message: str, measured: str, limit: str) -> None:
    exam.context.journal.finding(
        Finding(
            exam=exam.context.exam,
            kind=kind,
            verdict="FAIL",
            subject=subject,
            check=check,
            message=message,
            measured=measured,
            limit=limit,
            limit_source="the same work between processes on the CPU takes seconds",
            critical=True,
            severity=100.0,
        )
    )


def _report_conformance(exam: _Exam, session: Session) -> None:
    journal = exam.context.journal
    notes = [note for note in session.notes if "case" in note]
    results = call_results(notes)
    journal.checked("collective conformance", sum("refused" not in note for note in notes))
    done = min((note["rounds_done"] for note in session.notes if "rounds_done" in note), default=0)
    if not session.deaths and not session.hung:
        journal.covered("collectives with their operations", done, session.num_rounds)
    for result in results:
        ratios = [note["ratio"] for case, note in result.notes if "ratio" in note and case.sums_up]
        if ratios:
            journal.measured(check="collective conformance", call=result.call, worst_ratio=max(ratios))
    _report_refusals(exam, results)
    defects = sorted(defects_of(results, exam.num_ranks), key=lambda each: (each.is_limit, -each.severity))
    for number, defect in enumerate(defects):
        wanted = not defect.is_limit and (number == 0 or exam.context.remaining_s > _REPRODUCER_S)
        name = _reproducer_in_time(exam, defect) if wanted else None
        journal.finding(_defect_finding(exam, defect, name))


def _reproducer_in_time(exam: _Exam, defect: Defect) -> str | None:
    """The reproducer's name; None where it shows nothing, or the exam's time was up long before it is made.

    On a busy machine new ranks take a minute to start, which is no hang of the chip and must not cost the finding.
    """
    made: Future[str | None] = Future()

    def make() -> None:
        try:
            made.set_result(write_collective_reproducer(exam.context, defect, exam.num_ranks))
        except Exception as error:
            made.set_exception(error)

    threading.Thread(target=make, daemon=True).start()  # a pool would wait for it when the exam ends
    while not made.done():
        exam.announce(f"reproducing {defect.check}: {defect.call}")
        if exam.context.remaining_s <= -_OVERTIME_S:
            return None
        wait([made], timeout=1.0)
    return made.result()


def _defect_finding(exam: _Exam, defect: Defect, reproducer: str | None) -> Finding:
    """One device alone calls no collective in its work, so what is wrong with them there is a limit."""
    needed = needed_by(exam.context.role, defect.case, exam.layout.routes_tokens, exam.layout.dtypes)
    is_limit = defect.is_limit or exam.num_ranks < 2
    return Finding(
        exam=exam.context.exam,
        kind="numerics",
        verdict="PASS WITH LIMITS" if is_limit else "FAIL",
        subject=defect.call,
        check=defect.check,
        message=defect.message,
        measured=defect.measured,
        limit=defect.limit,
        limit_source=defect.limit_source,
        critical=needed and not is_limit,
        severity=defect.severity,
        reproducer=reproducer,
        details={"case": defect.case.document(), "num_ranks": exam.num_ranks},
    )


def _report_refusals(exam: _Exam, results: Sequence[CallResult]) -> None:
    """What the back end has not got: a failure when the role needs it; on the CPU nothing was to be examined."""
    for case, words in refusals_of(results):
        call = case.call
        if exam.context.chip.device.type == "cpu":
            exam.context.journal.not_covered(f"{call}: gloo has none ({words})")
            continue
        needed = needed_by(exam.context.role, case, exam.layout.routes_tokens, exam.layout.dtypes)
        exam.context.journal.finding(
            Finding(
                exam=exam.context.exam,
                kind="software",
                verdict="FAIL" if needed else "PASS WITH LIMITS",
                subject=call,
                check="collective exists",
                message=f"{backend_for(exam.context.chip.device)} has no {call}: {words}",
                measured="refused",
                limit="supported",
                limit_source=f"the {exam.context.role} step needs it over several ranks"
                if needed
                else "the subject can do without it",
                critical=needed,
            )
        )


def _report_links(exam: _Exam, session: Session) -> None:
    journal, context = exam.context.journal, exam.context
    pairs = pair_times(session.notes)
    pooled = {f"ranks {first} and {second}": pooled_visits(visits) for (first, second), visits in pairs.items()}
    collectives = collective_times(session.notes)
    for document in fits_document(collectives):
        journal.measured(**bandwidth_entry(document, exam.num_ranks))
    for slow in find_slow_collectives(collectives, _HOST_WAIT_S if context.chip.device.type in ON_HOST else 0.0):
        needed = kind_is_needed(context.role, slow.collective, exam.layout.routes_tokens)
        journal.finding(slow_collective_finding(context.exam, slow, exam.num_ranks, needed))
    for document in fits_document(pooled):
        journal.measured(**bandwidth_entry(document))
    planned = exam.num_ranks * (exam.num_ranks - 1) // 2
    journal.checked("pairs", len(pairs))
    journal.covered("pairs of ranks", len(pairs), planned)
    ratio = _SHARED_RATIO if context.chip.device.type in ON_HOST else OUTLIER_RATIO
    largest = max((max(visits[0]) for visits in pairs.values() if visits[0]), default=0)
    for outlier in find_outliers(largest_times(pairs), ratio):
        finding = outlier_finding(context.exam, outlier, largest, len(pairs), ratio)
        parameters = {"pair": [*outlier.pair], "pairs": [[*each] for each in pairs], "num_ranks": exam.num_ranks}
        _report_shown(exam, finding, Check(pair_is_slow, {**parameters, "num_bytes": largest, "most_ratio": ratio}))
    if len(pairs) < 3:
        journal.not_covered("slow pairs among others: that takes three ranks")


def _report_sustained(exam: _Exam, session: Session) -> None:
    journal = exam.context.journal
    seconds = sustained_seconds(session.notes)
    sustained = judge_sustained(seconds)
    journal.covered("a sustained run", int(sustained is not None), 1, least=0.0)
    if sustained is None:
        return
    num_bytes = session.messages[-1].num_bytes
    journal.checked("sustained", sustained.num_seconds)
    journal.measured(**sustained_entry(seconds, sustained, num_bytes, exam.num_ranks))
    for flap in sustained.flaps:
        journal.finding(flap_finding(exam.context.exam, sustained, flap, exam.num_ranks, num_bytes))


def _drill(exam: _Exam, how: str) -> None:
    plan, part = _plan(exam, exam.start_s), f"a rank {how}"
    is_taken = plan.has_drill and exam.context.remaining_s >= exam.start_s + plan.timeout_s
    exam.context.journal.covered(f"the drill with {part}", int(is_taken), 1)
    if not is_taken:
        return
    where = exam.directory / how
    found = strike(where, exam.chips, how, plan.timeout_s, START_LIMIT_S, lambda: exam.announce(part))
    exam.context.journal.checked("drill", int(not found.trouble))
    exam.context.journal.measured(
        check="drill",
        struck=found.struck,
        how=how,
        timeout_s=found.timeout_s,
        detected_s={str(rank): round(seconds, 3) for rank, seconds in found.detected_s.items()},
        silent=found.silent,
        words={str(rank): words[:300] for rank, words in found.words.items()},
    )
    if (finding := detection_finding(exam.context.exam, found)) is not None:
        parameters = {"how": how, "num_ranks": exam.num_ranks, "timeout_s": plan.timeout_s, "grace_s": GRACE_S}
        _report_shown(exam, finding, Check(loss_goes_unnoticed, parameters))


def _skew(exam: _Exam) -> None:
    plan = _plan(exam, exam.start_s)
    is_taken = plan.skew_s > 0.0 and exam.context.remaining_s >= exam.start_s + plan.skew_s
    exam.context.journal.covered("ranks that start apart", int(is_taken), 1, least=0.0)
    if not is_taken:
        return
    found = start_apart(
        exam.directory / "apart",
        exam.chips,
        plan.skew_s,
        START_LIMIT_S,
        lambda: exam.announce("ranks that start apart"),
    )
    exam.context.journal.checked("start skew", 1)
    exam.context.journal.measured(check="start skew", skew_s=found.skew_s, met_after_s=found.met_after_s)
    if (finding := skew_finding(exam.context.exam, found)) is not None:
        parameters = {"num_ranks": exam.num_ranks, "skew_s": found.skew_s, "timeout_s": found.timeout_s}
        _report_shown(exam, finding, Check(late_rank_is_lost, parameters))


def _report_shown(exam: _Exam, finding: Finding, check: Check) -> None:
    """A finding about what ranks of their own have just shown; a failure comes with a file that starts such ranks."""
    if finding.verdict == "FAIL":
        title = finding.message.partition(";")[0]
        slug = f"{finding.check} {finding.subject}"
        finding = replace(finding, reproducer=write_untried_reproducer(exam.context, slug, title, check))
    exam.context.journal.finding(finding)


def _report_single(exam: _Exam) -> None:
    """One device: its back end works alone, and nothing more can be said."""
    exam.context.journal.finding(
        Finding(
            exam=exam.context.exam,
            kind="links",
            verdict="PASS WITH LIMITS",
            subject=f"{exam.num_ranks} device of type {exam.context.chip.device.type}",
            check="pairs",
            message="there is one device of the kind here, so no link was examined; its collectives were, with one "
            "rank",
            measured=exam.num_ranks,
            limit=2,
            limit_source="a link has two ends",
            not_covered="links between devices",
        )
    )
    exam.context.journal.not_covered("between devices: there is one here")
