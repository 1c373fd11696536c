"""SIGINT and SIGTERM to the supervisor, which are not for itself. No torch here."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

__all__ = ["Interruption"]

_POLL_S = 0.1


class Interruption:
    """Within the `with` block, `received` is the first signal's number, and `is_urgent` says that another came.

    Outside the main thread, where Python delivers no signals, none is caught.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.is_urgent = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.is_urgent = self.received is not None
        self.received = self.received or number

    @property
    def exit_code(self) -> int:
        """As a shell counts it."""
        assert self.received is not None
        return 128 + self.received

    def wait(self, seconds: float) -> None:
        """Wait, or until a signal has come."""
        deadline = time.monotonic() + seconds
        while self.received is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
