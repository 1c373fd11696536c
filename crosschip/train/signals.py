"""Ctrl-C and SIGTERM while training: the first asks for an orderly end, the second ends at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ["StopSignals", "catch_stop_signals", "give_stop_signals_back"]

SHOW_CURSOR = b"\x1b[?25h"  # a progress bar hides it, and gets no chance to bring it back


Handler = Callable[[int, FrameType | None], None]


def catch_stop_signals(handler: Handler) -> dict[int, Any]:
    """Let SIGINT and SIGTERM go to `handler`; returns what handled them before.

    Outside the main thread, where Python delivers no signals, nothing is caught.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}


def give_stop_signals_back(before: dict[int, Any]) -> None:
    """Undo `catch_stop_signals`."""
    for number, handler in before.items():
        signal.signal(number, handler)


class StopSignals:
    """Within the `with` block, `received` is the number of the first SIGINT or SIGTERM that came, else None."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._before = catch_stop_signals(self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        give_stop_signals_back(self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
            # os.write: print may be interrupted inside itself, and must not be entered twice.
            os.write(2, b"\nfinishing this step and saving; a second Ctrl-C ends at once\n")
            return
        if os.isatty(2):
            os.write(2, SHOW_CURSOR)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
