"""Stop signals to the supervisor, which are not for itself. No torch here."""

from __future__ import annotations

import time
from types import FrameType
from typing import Any

from crosschip.train.signals import ONE_REQUEST_S, catch_stop_signals, give_stop_signals_back

__all__ = ["Interruption"]

_POLL_S = 0.1


class Interruption:
    """Within the `with` block, `received` is the first signal's number, and `is_urgent` says that another came,
    `ONE_REQUEST_S` later or more.

    One within another tells the outer one of what came.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.is_urgent = False
        self._received_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        self._before = catch_stop_signals(self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        give_stop_signals_back(self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._received_at = number, time.monotonic()
        elif time.monotonic() - self._received_at >= ONE_REQUEST_S:
            self.is_urgent = True
        outer = getattr(self._before.get(number), "__self__", None)
        if isinstance(outer, Interruption):
            outer._handle(number, frame)

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
