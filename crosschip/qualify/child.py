"""The process in which one task of a qualification runs: `python -m crosschip.qualify.child [SUBJECT [EXAM]]`.

It imports what a task needs, then reads the path of its job from standard input; without one it ends. With
`--stem DESCRIPTOR` it is a stem, whose children are such processes (`stem`).

Tasks: `identify` finds the chip and says what it is, `check_bundle` holds a golden bundle against the subject's files,
`trace` records the subject's calls, `exam` examines, `write_end` writes what ended a process as a reproducer. What
comes out is written to the job's result file; an exam writes its journal as it goes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crosschip.errors import ChipError, CrosschipError, QualifyError
from crosschip.orphans import end_with_parent
from crosschip.qualify.proctor import EXIT_RAISED
from crosschip.qualify.programme import EXAMS
from crosschip.qualify.stem import divide_on_demand
from crosschip.rundir import read_json, write_json

__all__ = ["main"]

_LEAST_S = 2.0


def _identify(job: dict[str, Any]) -> dict[str, Any]:
    """Load the subject, find the chip, say what it is and in which dtype the subject would be computed there.

    Without `computes` nothing is computed on the chip, and an open dtype is fp32.
    """
    from crosschip.chips import find_chip, fingerprint
    from crosschip.qualify.subjects.subject import load_subject, working_dtype

    subject = load_subject(job["origin"])
    try:
        chip = find_chip(job["chip_spec"], computes=False)
    except ChipError as error:
        raise _classified(error, job["chip_spec"]) from None
    setting = subject.dtype_setting(job["role"])
    dtype = working_dtype(chip, "float32" if setting == "auto" and not job["computes"] else setting)
    return {
        "chip": chip.name,
        "model_name": chip.model_name,
        "fingerprint": fingerprint(chip, job["computes"]),
        "compute_dtype": str(dtype).removeprefix("torch."),
        "dtype_is_open": setting == "auto",
        "subject": subject.name,
    }


class ChipMissingError(ChipError):
    """The name is right and there is no such chip here."""


def _classified(error: ChipError, wanted: str) -> CrosschipError:
    """Tell a name that makes no sense from a chip that is not here, and both from one that does not work."""
    import torch

    from crosschip.chips import list_accelerators
    from crosschip.chips.faults import faults_from

    kind = wanted.partition(":")[0]
    try:
        if kind == "sim":
            faults_from(wanted)
            return error
        torch.device(wanted)
    except (CrosschipError, RuntimeError):
        return QualifyError(error.problem, error.remedy)
    here = list_accelerators()
    is_here = wanted in here or (any(name.startswith(f"{kind}:") for name in here) and ":" not in wanted)
    return error if is_here else ChipMissingError(error.problem, error.remedy)


def _check_bundle(job: dict[str, Any]) -> dict[str, Any]:
    from crosschip.qualify.exams.golden.exam import check_bundle

    return check_bundle(job["origin"], Path(job["golden"]))


def _trace(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    from crosschip.qualify.subjects.subject import load_subject
    from crosschip.qualify.tracing.record import record_trace

    dtype = getattr(torch, job["compute_dtype"])
    return {"trace": record_trace(load_subject(job["origin"]), job["role"], dtype).document()}


def _exam(job: dict[str, Any]) -> dict[str, Any]:
    from crosschip.chips import find_chip
    from crosschip.qualify.exams.context import ExamContext
    from crosschip.qualify.journal import Journal
    from crosschip.qualify.subjects.subject import load_subject
    from crosschip.qualify.tracing.trace import Trace

    journal = Journal(Path(job["journal"]))
    context = ExamContext(
        exam=job["exam"],
        chip=find_chip(job["chip_spec"], computes=False),
        chip_spec=job["chip_spec"],
        role=job["role"],
        tier=job["tier"],
        subject=load_subject(job["origin"]),
        trace=Trace.from_document(read_json(Path(job["trace"]))),
        journal=journal,
        budget_s=_left_of(job),
        reproducers=Path(job["reproducers"]),
        seed=job["seed"],
        skip=frozenset(job["skip"]),
        died_in=frozenset(job.get("died_in", ())),
        only=job.get("only"),
        golden=Path(job["golden"]) if job.get("golden") else None,
        golden_files=Path(job["golden_files"]) if job.get("golden_files") else None,
        planned_chips=job.get("planned_chips"),
    )
    importlib.import_module(job["module"]).examine(context)
    return {}


def _left_of(job: dict[str, Any]) -> float:
    """What the start of this process has left of the exam's time, in seconds; on a busy machine a start takes long."""
    started_s = time.monotonic() - job.get("given_at", time.monotonic())
    return max(_LEAST_S, float(job["budget_s"]) - started_s)


def _write_end(job: dict[str, Any]) -> dict[str, Any]:
    """Write a reproducer of what ended an exam's process, without making it again."""
    from crosschip.qualify.reproducing.ends import reproducer_of_an_end
    from crosschip.qualify.tracing.trace import Trace

    trace = Trace.from_document(read_json(Path(job["trace"])))
    told = {key: job[key] for key in ("exam", "now", "how", "detail", "chip", "seed")}
    return {"reproducer": reproducer_of_an_end(Path(job["directory"]), trace=trace, **told)}


_TASKS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "identify": _identify,
    "check_bundle": _check_bundle,
    "trace": _trace,
    "exam": _exam,
    "write_end": _write_end,
}


def _end_first() -> None:
    """Be the first that the system ends when memory runs out (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _prepare(origin: str | None, module: str | None) -> None:
    """Import what takes seconds: the rooms, the subject, an exam. What fails meanwhile fails again in the task."""
    with contextlib.suppress(Exception):
        # torch imports its compiler with the first gradient or optimizer step, in the middle of what is measured.
        importlib.import_module("torch._dynamo")
        importlib.import_module("crosschip.qualify.exams.context")
        subjects = importlib.import_module("crosschip.qualify.subjects.subject")
        if module:
            importlib.import_module(module)
        if origin:
            subjects.load_subject(origin)


def main() -> None:
    """Wait for a job and run it; a stem's children do so, too."""
    arguments: list[str] = sys.argv[1:]
    end_with_parent()
    if arguments[:1] == ["--stem"]:
        for exam in EXAMS:
            _prepare(None, exam.job_module())
        arguments = divide_on_demand(int(arguments[1]))
        end_with_parent()
    _end_first()
    origin, module, *_ = [*arguments, None, None]
    _prepare(origin, module)
    path = sys.stdin.readline().strip()
    if path:
        _run(json.loads(Path(path).read_text(encoding="utf-8")))


def _run(job: dict[str, Any]) -> None:
    result = Path(job["result"])
    try:
        document = _TASKS[job["task"]](job)
    except CrosschipError as error:
        kind = type(error).__name__
        write_json(result, {"refused": {"type": kind, "problem": error.problem, "remedy": error.remedy}})
    except Exception as error:
        text = traceback.format_exc()
        write_json(result, {"raised": {"type": type(error).__name__, "message": str(error), "traceback": text}})
        sys.exit(EXIT_RAISED)
    else:
        write_json(result, document)


if __name__ == "__main__":
    main()
