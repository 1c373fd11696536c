"""The training's side of the process that reads checkpoints back (`verify`)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from crosschip.train.checkpoint.loss_check import LossQuestion
from crosschip.train.checkpoint.verdict import Verdict

__all__ = ["COMMAND", "Verifier", "VerifyJob"]

COMMAND = (sys.executable, "-m", "crosschip.train.checkpoint.verify", "--serve")
_END_S = 10.0  # for the process to end by itself once its input is closed
LIMIT_S = 1800.0  # for an answer, at a low priority beside a training; a process that hangs never gives one
_TIMES_LONGEST = 5.0  # so many times as long as the longest answer so far it may take in any case
_PASSED_OVER = "passed over: reading back takes longer than the time between two saves"


@dataclass(frozen=True)
class VerifyJob:
    """A checkpoint to read back, the question about its loss, and the batch in the safetensors format."""

    step: int
    path: Path
    question: LossQuestion
    batch: bytes


class Verifier:
    """Asks the process about one checkpoint after the other, in a thread; `done` hears each verdict there.

    Where checkpoints come faster than they are read, the newest is taken next, and older ones are passed over: their
    verdict is `unknown`.

    The process is started with the first job, once, as importing costs it seconds. It holds no chip, and ends itself
    when this process ends, however that happens. One that does not answer in time is killed, and the verdict is
    `unknown`.
    """

    def __init__(self, done: Callable[[VerifyJob, Verdict], None]) -> None:
        self._done = done
        self._jobs: queue.Queue[VerifyJob | None] = queue.Queue()
        self._current: VerifyJob | None = None
        self._unanswered: list[VerifyJob] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._closing = False
        self._longest_s = 0.0
        self._thread = threading.Thread(target=self._work, name="checkpoint-verifier", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """Of the process, where it was started."""
        return None if self._process is None else self._process.pid

    @property
    def reads(self) -> set[int]:
        """The step whose checkpoint is being read, if there is one."""
        job = self._current
        return set() if job is None else {job.step}

    def submit(self, job: VerifyJob) -> None:
        """Ask about a checkpoint; returns at once."""
        self._unanswered.append(job)
        self._jobs.put(job)

    def close(self) -> list[VerifyJob]:
        """End the process; return the jobs that stay without an answer."""
        self._closing = True
        self._jobs.put(None)
        process = self._process
        if process is not None:
            assert process.stdin is not None
            with contextlib.suppress(OSError):  # it is gone already
                process.stdin.close()
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._thread.join()
        unanswered, self._unanswered = self._unanswered, []
        return unanswered

    def _work(self) -> None:
        while (job := self._next()) is not None and not self._closing:
            verdict = self._ask(job)
            self._current = None
            self._answered(job, verdict)

    def _next(self) -> VerifyJob | None:
        """Wait for a job; the newest of those that wait, and None at the end."""
        job = self._jobs.get()
        while job is not None and not self._jobs.empty():
            newer = self._jobs.get()
            if newer is not None:
                self._answered(job, Verdict("unknown", _PASSED_OVER, None, 0.0))
            job = newer
        self._current = job
        return job

    def _answered(self, job: VerifyJob, verdict: Verdict) -> None:
        if not self._closing:
            self._unanswered.remove(job)
            self._done(job, verdict)

    def _ask(self, job: VerifyJob) -> Verdict:
        limit_s, started = max(LIMIT_S, _TIMES_LONGEST * self._longest_s), time.monotonic()
        deadline = threading.Timer(limit_s, self._kill)
        deadline.daemon = True
        deadline.start()
        try:
            verdict = self._answer(job)
        finally:
            deadline.cancel()
        if verdict.verdict == "unknown" and time.monotonic() - started >= limit_s:
            told = f"the process that reads checkpoints back did not answer within {limit_s:.0f} s and was killed"
            return dataclasses.replace(verdict, detail=told)
        self._longest_s = max(self._longest_s, time.monotonic() - started)
        return verdict

    def _kill(self) -> None:
        process = self._process
        if process is not None:
            process.kill()

    def _answer(self, job: VerifyJob) -> Verdict:
        try:
            process = self._started()
            assert process.stdin is not None
            assert process.stdout is not None
            head = {
                "path": str(job.path),
                "question": dataclasses.asdict(job.question),
                "num_bytes": len(job.batch),
            }
            process.stdin.write(json.dumps(head).encode() + b"\n" + job.batch)
            process.stdin.flush()
            line = process.stdout.readline()
        except (OSError, ValueError) as error:  # ValueError: its input was closed by `close` meanwhile
            line, problem = b"", f": {error}"
        else:
            problem = ""
        if line.endswith(b"\n"):
            return Verdict(**json.loads(line))
        return Verdict("unknown", f"the process that reads checkpoints back {self._how_it_ended()}{problem}", None, 0.0)

    def _how_it_ended(self) -> str:
        """Of a process that no longer answers; the next job gets another one."""
        process, self._process = self._process, None
        if process is None:
            return "could not be started"
        if not self._closing:
            process.kill()  # one that closed its output and goes on is of no use
        return f"has ended with code {process.wait()}"

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            environment = {
                **os.environ,
                "CUDA_VISIBLE_DEVICES": "",
                "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # it reads on the CPU, and the chip belongs to the training
                "OMP_WAIT_POLICY": "PASSIVE",
            }
            self._process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is the training's to handle
            )
        return self._process
