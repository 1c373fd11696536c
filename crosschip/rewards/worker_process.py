"""A worker as its user sees it: started, asked, and killed when it is late."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from crosschip.errors import RecipeError
from crosschip.rewards.attempt import Attempt

__all__ = ["CheckerError", "WorkerLostError", "WorkerProcess"]

_START_S = 120.0  # to import what the checkers need, on a busy machine
_MAX_ANSWER_BYTES = 1 << 20
_MAX_LOG_BYTES = 1 << 20
_LOG_TAIL_BYTES = 400


class CheckerError(Exception):
    """A checker gave no reward: the reason, in words."""


class WorkerLostError(CheckerError):
    """The same, and the worker is of no use any more."""


class WorkerProcess:
    """A child process that has loaded some checkers and runs one at a time."""

    def __init__(self, names: Sequence[str], timeout_s: float) -> None:
        """Start it and wait until it is ready.

        A checker that cannot be loaded is a `RecipeError`, a process that does not come up is a `WorkerLostError`.
        """
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process runs)
        self._socket, theirs = socket.socketpair()
        self._unread, self._num_asked = b"", 0
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-m", "crosschip.rewards.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # an interrupt at the terminal is ours to handle
            )
        try:
            answer = self._exchange({"names": list(names), "timeout_s": timeout_s}, _START_S)
        except BaseException:
            self.kill()
            raise
        if refused := answer.get("refused"):
            self.kill()
            raise RecipeError(refused["problem"], refused["remedy"])
        self.gaps: tuple[str, ...] = tuple(answer["gaps"])

    @property
    def pid(self) -> int:
        """Its process id, which is that of its process group, too."""
        return self._process.pid

    def ask(self, name: str, attempt: Attempt, timeout_s: float) -> float:
        """What the checker says of the attempt; a `CheckerError` says why it says nothing."""
        task = {"name": name, "attempt": asdict(attempt), "timeout_s": timeout_s}
        answer = self._exchange(task, timeout_s)
        self._clip_log()
        if "raised" in answer:
            raise CheckerError(answer["raised"])
        return float(answer["reward"])

    def kill(self) -> None:
        """End it and its process group; a second call does nothing."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._socket.close()
        self._log.close()

    def _exchange(self, message: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        self._num_asked += 1
        try:
            self._check_silent()
            self._socket.settimeout(timeout_s)
            self._socket.sendall(json.dumps({"id": self._num_asked, **message}).encode() + b"\n")
            answer: dict[str, Any] = json.loads(self._line(deadline))
            if answer["id"] != self._num_asked:
                raise ValueError(f"it answered question {answer['id']} when it was asked question {self._num_asked}")
            return answer
        except TimeoutError:
            raise WorkerLostError(f"gave no answer within {timeout_s:g} s and was killed") from None
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise WorkerLostError(f"broke its worker process: {self._last_words(error)}") from error

    def _check_silent(self) -> None:
        """A `ValueError` for anything said that nobody has asked for: what comes next would answer another attempt."""
        self._socket.settimeout(0.0)
        with suppress(BlockingIOError):
            self._unread += self._socket.recv(1, socket.MSG_PEEK)
        if self._unread:
            raise ValueError("it said something unasked: a process that the checker forked writes into the same socket")

    def _line(self, deadline: float) -> bytes:
        while b"\n" not in self._unread:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            self._socket.settimeout(left_s)
            chunk = self._socket.recv(65_536)
            if not chunk:
                raise ConnectionError("it ended")
            self._unread += chunk
            if len(self._unread) > _MAX_ANSWER_BYTES:
                raise ValueError(f"an answer of more than {_MAX_ANSWER_BYTES} bytes")
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _last_words(self, error: Exception) -> str:
        """How the process ended and what it printed last."""
        try:
            status: int | None = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            status = None
        ended = str(error) if status is None else f"exit status {status}"
        if status is not None and status < 0:
            ended = f"killed by {signal.Signals(-status).name}"
        with suppress(OSError, ValueError):  # closed by another thread
            size = os.fstat(self._log.fileno()).st_size
            tail = os.pread(self._log.fileno(), _LOG_TAIL_BYTES, max(0, size - _LOG_TAIL_BYTES))
            ended += f"; it printed: {tail.decode('utf-8', 'replace').strip()}" if tail.strip() else ""
        return ended

    def _clip_log(self) -> None:
        """Forget what was printed; both processes share the place to write at, so it goes back for both."""
        with suppress(OSError, ValueError):  # closed by another thread
            if os.fstat(self._log.fileno()).st_size > _MAX_LOG_BYTES:
                self._log.seek(0)
                self._log.truncate()
