"""Ctrl-C and SIGTERM while training: the first asks for an orderly end, the second ends at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["StopSignals"]

SHOW_CURSOR = b"\x1b[?25h"  # a progress bar hides it, and gets no chance to bring it back


class StopSignals:
    """Within the `with` block, `received` is the number of the first SIGINT or SIGTERM that came, else None.

    Outside the main thread, where Python delivers no signals, nothing is installed.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

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
