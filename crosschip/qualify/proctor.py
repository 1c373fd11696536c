"""Runs one task of a qualification in a child process and watches it. No torch here.

A child that crashes, hangs or is killed for memory says something about the chip; the parent never goes down with it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from crosschip.qualify.environment import examination_environment
from crosschip.qualify.journal import Journal, JournalReader, JournalState, read_journal
from crosschip.qualify.stem import ForkedProcess, Stem
from crosschip.rundir import read_json, write_json

__all__ = ["EXIT_RAISED", "PART_LIMIT_S", "Child", "Ended", "run_child", "start_child"]

How = Literal["complete", "refused", "raised", "crash", "hang", "budget"]

PART_LIMIT_S = 60.0  # a part of an exam takes seconds; one that takes this long does not come back
EXIT_RAISED = 70  # the child met an exception that it did not expect, and wrote it down
_POLL_S = 0.05
_LAST_LINES = 15


@dataclass(frozen=True)
class Ended:
    """How a child ended. `now` is the part it was in, `result` what it wrote, `detail` a sentence."""

    how: How
    detail: str = ""
    now: str | None = None
    result: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Child:
    """A process that has imported what a task needs, or soon will have, and waits for its job."""

    process: subprocess.Popen[bytes] | ForkedProcess
    log: Path

    @property
    def waits(self) -> bool:
        """Whether it is still there and has no job yet."""
        assert self.process.stdin is not None
        return not self.process.stdin.closed and self.process.poll() is None

    def give(self, job: Path) -> None:
        """Hand over the job's file. A child that has died in the meantime is seen when it is watched."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{job}\n".encode())
            self.process.stdin.close()

    def end(self) -> None:
        """End it and all it started; it leads a process group of its own."""
        if self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()  # what has not yet begun ends without a job


def start_child(
    directory: Path,
    environment: dict[str, str] | None = None,
    prepare: Sequence[str] = (),
    stem: Stem | None = None,
) -> Child:
    """Start a child that waits for `run_child`. Imports take seconds, which are another task's if it starts early.

    `prepare` is the subject that it loads beforehand and the module of the exam. A `stem`, whose environment it gets,
    saves it the rest.
    """
    log_path = directory / f"{1 + sum(1 for _ in directory.glob('*.log')):02d}.log"
    with log_path.open("wb") as log:
        if stem is not None:
            with contextlib.suppress(OSError):  # the stem is gone: without it, then
                return Child(stem.divide(prepare, log), log_path)
        process = subprocess.Popen(
            [sys.executable, "-m", "crosschip.qualify.child", *prepare],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=examination_environment({**os.environ, **(environment or {})}),
            start_new_session=True,
        )
    return Child(process, log_path)


def run_child(
    job: dict[str, Any],
    directory: Path,
    deadline_s: float,
    environment: dict[str, str] | None = None,
    child: Child | None = None,
) -> Ended:
    """Run a job (`task` and what it needs) in a child until it ends, a part hangs, or the deadline is over.

    `directory` gets the job, its result and its log. `child` is one that was started before, in the environment that
    is wanted. `refused` is a `CrosschipError` of the child, `raised` any other exception, `crash` every other way to
    die, `hang` a part beyond `PART_LIMIT_S`, `budget` the deadline.
    """
    number = 1 + sum(1 for _ in directory.glob("*.job.json"))
    job_path = directory / f"{number:02d}-{job['task']}.job.json"
    result_path = job_path.with_suffix(".result.json")
    if "journal" in job:
        Journal(Path(job["journal"])).begun()
    write_json(job_path, {**job, "result": str(result_path)})
    if child is None or not child.waits:
        child = start_child(directory, environment)
    child.give(job_path)
    try:
        stopped = _watch(child.process, job, deadline_s)
    finally:
        child.end()
    code = -signal.SIGKILL if child.process.returncode is None else child.process.returncode
    return _how_it_ended(code, stopped, job, result_path, child.log)


def _watch(child: subprocess.Popen[bytes] | ForkedProcess, job: dict[str, Any], deadline_s: float) -> How | None:
    """Wait for the child; says why it has to be ended, or None when it ended by itself."""
    started = time.monotonic()
    journal = JournalReader(Path(job["journal"]), job["exam"]) if "journal" in job else None
    while child.poll() is None:
        if time.monotonic() - started > deadline_s:
            return "budget"
        if journal is not None and _hangs(journal.read(), job["part_limit_s"]):
            return "hang"
        time.sleep(_POLL_S)
    return None


def _hangs(state: JournalState, limit_s: float) -> bool:
    return state.now is not None and state.now_at is not None and time.monotonic() - state.now_at > limit_s


def _how_it_ended(code: int, stopped: How | None, job: dict[str, Any], result: Path, log: Path) -> Ended:
    now = read_journal(Path(job["journal"]), job["exam"]).now if "journal" in job else None
    written: dict[str, Any] = read_json(result) if result.exists() else {}
    if stopped is not None:
        limit = "the deadline of the task" if stopped == "budget" else f"{job['part_limit_s']:.0f} s"
        return Ended(stopped, f"did not come back within {limit}", now)
    if "refused" in written:
        return Ended("refused", written["refused"]["problem"], now, written)
    if "raised" in written:
        return Ended("raised", f"{written['raised']['type']}: {written['raised']['message']}", now, written)
    if code == 0 and result.exists():
        return Ended("complete", result=written)
    return Ended("crash", _death(code) + _last_words(log), now)


def _death(code: int) -> str:
    if code >= 0:
        return f"ended the process with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    if name == "SIGKILL":
        return "the process was killed (SIGKILL), as the system does when memory runs out"
    return f"the process died of {name}"


def _last_words(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return "; its last words: " + " | ".join(lines[-_LAST_LINES:])[-1500:] if lines else ""
