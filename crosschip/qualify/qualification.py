"""One qualification from beginning to end: find the chip, record the subject, examine, write the report. No torch here.

Whatever the chip does, a report comes out of it: a chip that is missing, dies or hangs leaves one that says so and
holds everything measured up to then. The report is written anew after each exam.
"""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crosschip.errors import QualifyError
from crosschip.qualify.children import Children
from crosschip.qualify.finding import ExamRecord, Finding, Verdict
from crosschip.qualify.journal import part_of, read_journal
from crosschip.qualify.losses import drop_unused, loss_finding, names_a_call
from crosschip.qualify.proctor import Ended
from crosschip.qualify.programme import TIER_S, Exam, Request
from crosschip.qualify.report_document import ReportHead, report_document, reproducers_of
from crosschip.rundir import write_json

__all__ = ["DefectError", "qualify", "record_trace_document"]


class DefectError(Exception):
    """An exam that went wrong on the CPU as well: the fault is ours and says nothing about the chip."""


MISSING = "ChipMissingError"  # what a child calls a chip whose name is right and that is not here
_LEAST_BUDGET_S = 6.0  # with a child's start
_IDENTIFY_LIMIT_S = 120.0
_START_S = 30.0  # for importing torch, a plug-in and the subject
_TRACE_LIMIT_S = 300.0
_BUNDLE_LIMIT_S = 60.0
_BUNDLE_FILES = "golden-files.json"
_TRIES = 3  # of one exam, each without the parts that the earlier ones died in


@dataclass
class _Qualification:
    """A qualification under way."""

    request: Request
    directory: Path  # for jobs, journals and the trace
    tell: Callable[[str], None]
    started: float = field(default_factory=time.monotonic)
    began_at: float = field(default_factory=time.time)
    identity: dict[str, Any] = field(default_factory=dict)
    trace: dict[str, Any] = field(default_factory=dict)
    records: list[ExamRecord] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)
    complete: bool = False
    lost_s: float = 0.0  # on a chip that did not come back before the first exam: no exam is the shorter for it

    def __post_init__(self) -> None:
        self.children = Children(self.directory, self.request.origin, self.request.chip)

    @property
    def remaining_s(self) -> float:
        limit = self.request.time_s or TIER_S[self.request.tier]
        return limit + self.lost_s - (time.monotonic() - self.started)

    @property
    def is_overdue(self) -> bool:
        """Whether the time was up longer ago than a part may take that does not come back."""
        return self.remaining_s < -self.request.part_limit_s


def qualify(request: Request, tell: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Examine and write the report to `request.report`; reproducers go beside it. Returns the report.

    `tell` gets a line whenever something begins.

    Raises:
        CrosschipError: the subject cannot be loaded, or the chip's name makes no sense.
        DefectError: an exam failed on the CPU as well, so that the fault is ours; the report is written all the same.
        KeyboardInterrupt: interrupted; the report holds what was measured up to then.
    """
    with tempfile.TemporaryDirectory(prefix="crosschip-qualify-") as directory, _terminated_as_interrupted():
        going = _Qualification(request, Path(directory), tell)
        try:
            _examine_all(going)
            going.complete = True
        finally:
            going.children.close()
            if going.records:
                write_json(request.report, _document(going))
        if going.defects:
            raise DefectError("; ".join(going.defects))
        return _document(going)


def record_trace_document(request: Request, tell: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Record the calls of the subject's step as it would run on the chip; the trace as a document.

    Raises:
        CrosschipError: the subject cannot be loaded or run, or the chip cannot be found.
    """
    with tempfile.TemporaryDirectory(prefix="crosschip-trace-") as directory, _terminated_as_interrupted():
        going = _Qualification(request, Path(directory), tell)
        try:
            ended = _identify(going)
            if ended.how != "complete":
                raise QualifyError(f"the chip {request.chip!r}: {ended.detail}", _remedy(ended))
            _trace(going)
            return going.trace
        finally:
            going.children.close()


def _examine_all(going: _Qualification) -> None:
    ended = _identify(going)
    _check_bundle(going)  # what cannot be used is refused, whether the chip is there or not
    if ended.how != "complete":
        _report_unusable_chip(going, ended)
        return
    programme = going.request.programme
    going.children.prepare(programme[0][0])
    _trace(going)
    # From here on the report is of this qualification, however it ends; one of an earlier one is no longer there.
    write_json(going.request.report, _document(going))
    for place, (exam, weight) in enumerate(programme):
        if going.is_overdue:
            going.records.append(ExamRecord(exam.name, not_covered=["everything: the time was up"], ended="not run"))
            continue
        share_s = going.remaining_s * weight / sum(each for _, each in programme[place:])
        then = programme[place + 1][0] if place + 1 < len(programme) else None
        _take_exam(going, exam, max(_LEAST_BUDGET_S, share_s), then)
        write_json(going.request.report, _document(going))


def _check_bundle(going: _Qualification) -> None:
    """Refuse a golden bundle that says nothing about the subject's weights. Large files take longer than there is time
    for here: then the exam does it."""
    request = going.request
    if request.golden is None:
        return
    going.tell(f"holding {request.golden} against the weights of {request.origin}")
    job = {"task": "check_bundle", "origin": request.origin, "golden": str(request.golden)}
    ended = going.children.run(job, _BUNDLE_LIMIT_S, alone=True)
    if ended.how == "refused":
        raise QualifyError(ended.result["refused"]["problem"], ended.result["refused"]["remedy"])
    if ended.how == "complete":
        write_json(going.directory / _BUNDLE_FILES, ended.result)


def _identify_job(request: Request, chip: str, computes: bool = True) -> dict[str, Any]:
    job = {"task": "identify", "origin": request.origin, "chip_spec": chip, "role": request.role}
    return {**job, "computes": computes}


def _identify_cpu(going: _Qualification) -> Ended:
    """The same for the CPU, as a control."""
    return going.children.run(_identify_job(going.request, "cpu"), _IDENTIFY_LIMIT_S, alone=True)


def _identify(going: _Qualification) -> Ended:
    request = going.request
    going.tell(f"finding the chip {request.chip}")
    going.children.prepare(None, alone=True)
    began = time.monotonic()
    limit_s = min(_IDENTIFY_LIMIT_S, _START_S + request.part_limit_s)
    ended = going.children.run(_identify_job(request, request.chip), limit_s)
    if ended.how not in ("complete", "refused"):
        going.lost_s = time.monotonic() - began
        # A first product can take the process down, or never come back; which operator that is, the exams say.
        going.tell("finding it without computing anything on it")
        unmeasured = going.children.run(_identify_job(request, request.chip, computes=False), _IDENTIFY_LIMIT_S)
        ended = unmeasured if unmeasured.how == "complete" else ended
    refused = ended.result.get("refused")
    if refused is not None and refused["type"] not in ("ChipError", MISSING):
        raise QualifyError(refused["problem"], refused["remedy"])
    going.identity = ended.result if ended.how == "complete" else {}
    return ended


def _trace(going: _Qualification) -> None:
    """Record on the honest simulated chip, in a process into which no plug-in is loaded."""
    request, dtype = going.request, going.identity["compute_dtype"]
    ended = _record(going, dtype)
    note = f"in {dtype}, in which the chip is fast, the subject's step fails on the CPU: examined in float32"
    if ended.how == "raised" and going.identity["dtype_is_open"] and dtype != "float32":
        in_dtype, ended = ended, _record(going, "float32")
        note += f" ({in_dtype.detail})"
        going.identity["compute_dtype"] = "float32"
    if ended.how == "refused":
        raise QualifyError(ended.result["refused"]["problem"], ended.result["refused"]["remedy"])
    if ended.how != "complete":
        shown = ended.result.get("raised", {}).get("traceback", "")
        raise QualifyError(
            f"the {request.role} step of {request.origin} fails on the simulated chip: {ended.detail}\n{shown}",
            "run the subject by itself on the CPU; its forward must make new tensors where its inputs are",
        )
    going.trace = ended.result["trace"]
    if going.identity["compute_dtype"] != dtype:
        going.trace["notes"].append(note)
    write_json(going.directory / "trace.json", going.trace)


def _record(going: _Qualification, dtype: str) -> Ended:
    request = going.request
    going.tell(f"recording {request.role} step of {going.identity['subject']} in {dtype}")
    job = {"task": "trace", "origin": request.origin, "role": request.role, "compute_dtype": dtype}
    return going.children.run(job, _TRACE_LIMIT_S, alone=True)


def _remedy(ended: Ended) -> str:
    return ended.result.get("refused", {}).get("remedy", "run `crosschip doctor`")


def _report_unusable_chip(going: _Qualification, ended: Ended) -> None:
    """The chip could not even be found: missing is inconclusive, dying on the first tensor is a failure.

    What goes wrong with the CPU as well is no chip's failure: a machine too busy to tell, or a subject that is broken.
    """
    control = Ended("complete") if ended.how == "refused" else _identify_cpu(going)
    if control.how not in ("complete", "budget"):
        raise QualifyError(
            f"{going.request.origin} cannot be loaded: {control.detail}", "run the subject by itself on the CPU first"
        )
    missing = ended.result.get("refused", {}).get("type") == MISSING
    verdict: Verdict = "INCONCLUSIVE" if missing or control.how == "budget" else "FAIL"
    finding = Finding(
        exam="software",
        kind="software" if ended.how in ("refused", "raised") else "stability",
        verdict=verdict,
        subject=f"chip {going.request.chip}",
        check="chip_found",
        message=f"the chip cannot be used: {ended.detail}",
        measured=ended.how,
        limit="a first tensor computed and read back",
        limit_source="without it nothing can be examined",
        critical=True,
        details={"remedy": _remedy(ended)},
        found_at=time.time(),
    )
    going.records.append(ExamRecord("software", [finding], {"chip_found": 1}, ended=ended.how))
    going.records += [
        ExamRecord(exam.name, not_covered=["everything: the chip cannot be used"], ended="not run")
        for exam, _ in going.request.programme
        if exam.name != "software"
    ]


def _take_exam(going: _Qualification, exam: Exam, budget_s: float, then: Exam | None) -> None:
    """Run one exam and keep what its journal says, whatever happens to it."""
    going.tell(f"{exam.name} (up to {budget_s:.0f} s)")
    began = time.monotonic()
    journal = going.directory / f"{exam.name}.journal.jsonl"
    losses: list[Finding] = []
    how = "interrupted"
    try:
        how = _try_exam(going, exam, journal, budget_s, losses, then)
    finally:
        state = read_journal(journal, exam.name)
        record = state.record
        record.findings += losses
        drop_unused(reproducers_of(going.request.report), state)
        record.not_covered += [f"{loss.subject}: the exam ended in it" for loss in losses]
        record.ended, record.time_s = how, time.monotonic() - began
        going.records.append(record)


def _try_exam(
    going: _Qualification, exam: Exam, journal: Path, budget_s: float, losses: list[Finding], then: Exam | None
) -> str:
    """Run the exam in a child, again without the part in question when it died in one; returns how it ended."""
    began = time.monotonic()
    died_in: set[str] = set()
    ended, is_ours = Ended("complete"), False
    for _ in range(_TRIES):
        left_s = max(_LEAST_BUDGET_S, budget_s - (time.monotonic() - began))
        job = _exam_job(going, exam, journal, left_s, died_in)
        ended = going.children.run(job, 2 * left_s + going.request.part_limit_s, then=then)
        if ended.how == "complete":
            break
        ours = _fails_on_cpu(going, exam, job, ended)
        if ours is not None:
            is_ours = True
            going.defects.append(f"the exam {exam.name}, in {ended.now or 'its beginning'}: {ours}")
        else:
            losses.append(loss_finding(exam.name, ended, _reproducer_of_the_end(going, exam, journal, ended)))
        if ended.now is None or ended.how in ("budget", "refused") or going.is_overdue:
            break
        died_in.add(ended.now)
    return "defect" if is_ours else ended.how


def _exam_job(
    going: _Qualification, exam: Exam, journal: Path, budget_s: float, died_in: set[str], chip: str | None = None
) -> dict[str, Any]:
    request = going.request
    return {
        "task": "exam",
        "exam": exam.name,
        "module": exam.job_module(),
        "chip_spec": chip or going.identity["chip"],
        "role": request.role,
        "tier": request.tier,
        "origin": request.origin,
        "trace": str(going.directory / "trace.json"),
        "journal": str(journal),
        "budget_s": budget_s,
        "given_at": time.monotonic(),
        "part_limit_s": request.part_limit_s,
        "reproducers": str(reproducers_of(request.report)),
        "seed": request.seed,
        "golden": None if request.golden is None else str(request.golden),
        "golden_files": str(going.directory / _BUNDLE_FILES),
        "planned_chips": request.planned_chips,
        "skip": sorted(read_journal(journal, exam.name).done | died_in),
        "died_in": sorted(died_in),
    }


def _reproducer_of_the_end(going: _Qualification, exam: Exam, journal: Path, ended: Ended) -> str | None:
    """A file that makes the work in which the child ended; None when no call can be told, or only time was up."""
    if ended.now is None or ended.how == "budget":
        return None
    ready = read_journal(journal, exam.name).ready.get(part_of(ended.now))
    if ready is not None or not names_a_call(ended.now):
        return ready
    job = {
        "task": "write_end",
        "exam": exam.name,
        "now": ended.now,
        "how": ended.how,
        "detail": ended.detail,
        "chip": going.identity["chip"],
        "seed": going.request.seed,
        "trace": str(going.directory / "trace.json"),
        "directory": str(reproducers_of(going.request.report)),
    }
    written = going.children.run(job, _IDENTIFY_LIMIT_S, alone=True)
    return written.result.get("reproducer")


def _fails_on_cpu(going: _Qualification, exam: Exam, job: dict[str, Any], ended: Ended) -> str | None:
    """Run the part that failed on the CPU: when it fails there as well, what went wrong; then the exam is broken."""
    if ended.how == "budget":
        return None
    journal = going.directory / f"{exam.name}.control.jsonl"
    journal.unlink(missing_ok=True)
    control = _exam_job(going, exam, journal, job["budget_s"], set(), chip="cpu")
    control |= {"skip": job["skip"], "only": ended.now, "reproducers": str(going.directory / "control")}
    again = going.children.run(control, 2 * job["budget_s"] + going.request.part_limit_s)
    if again.how in ("complete", "budget"):
        return None
    return again.result.get("raised", {}).get("traceback") or f"{again.how}: {again.detail}"


def _document(going: _Qualification) -> dict[str, Any]:
    request, identity = going.request, going.identity
    head = ReportHead(
        chip=identity.get("chip", request.chip),
        role=request.role,
        tier=request.tier,
        subject=identity.get("subject", request.origin),
        origin=request.origin,
        report=request.report,
        began_at=going.began_at,
        seed=request.seed,
        compute_dtype=identity.get("compute_dtype"),
        fingerprint=identity.get("fingerprint"),
        trace=going.trace,
        again=request.again,
    )
    return report_document(head, going.records, time.monotonic() - going.started, going.complete)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Inside, SIGTERM ends the work as Ctrl-C does, so that children are ended and the report is written."""
    if threading.current_thread() is not threading.main_thread():  # whose owner deals with signals
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
