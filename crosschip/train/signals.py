"""Ctrl-C, SIGTERM and a closed terminal while training: the first asks for an orderly end, the next one ends at once.

What ends a whole job (`scancel`, systemd, a time limit) gives its signal to every process of it, and supervisors and
launchers hand theirs on: copies of one request, which must not count as a second one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from crosschip.train.guard.processes import SUPERVISOR

__all__ = ["ONE_REQUEST_S", "STOP_SIGNALS", "StopSignals", "catch_stop_signals", "give_stop_signals_back"]

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ONE_REQUEST_S = 2.0  # what comes so soon after the first signal is a copy of it
SHOW_CURSOR = b"\x1b[?25h"  # a progress bar hides it, and gets no chance to bring it back


Handler = Callable[[int, FrameType | None], None]


def catch_stop_signals(handler: Handler) -> dict[int, Any]:
    """Let `STOP_SIGNALS` go to `handler`; returns what handled them before.

    Outside the main thread, where Python delivers no signals, nothing is caught; and no SIGHUP that is ignored, as
    `nohup` wants it.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    is_hangup_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    numbers = [number for number in STOP_SIGNALS if not (number == signal.SIGHUP and is_hangup_ignored)]
    return {number: signal.signal(number, handler) for number in numbers}


def give_stop_signals_back(before: dict[int, Any]) -> None:
    """Undo `catch_stop_signals`."""
    for number, handler in before.items():
        signal.signal(number, handler)


def _tell_at_once(words: bytes) -> None:
    """By the system: `print` may be interrupted inside itself, and must not be entered twice."""
    if sys.stderr is not None:  # else it was closed, and its number may be another file's
        with contextlib.suppress(OSError):  # who listened may have ended by the same Ctrl-C
            os.write(2, words)


class StopSignals:
    """Within the `with` block, `received` is the number of the first of `STOP_SIGNALS` that came, else None.

    Another one, `ONE_REQUEST_S` later or more, ends the process at once. Not below a supervisor, which kills its ranks
    itself when a second signal comes: a rank may be in a long C call, and learns late when a copy of the first came.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._received_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._before = catch_stop_signals(self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        give_stop_signals_back(self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._received_at = number, time.monotonic()
            _tell_at_once(b"\nfinishing this step and saving; another Ctrl-C ends at once\n")
            return
        if SUPERVISOR in os.environ or time.monotonic() - self._received_at < ONE_REQUEST_S:
            return
        if os.isatty(2):
            os.write(2, SHOW_CURSOR)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
