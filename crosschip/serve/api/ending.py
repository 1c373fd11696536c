"""Ending a server: at the first signal it drains, a while later it breaks off, and in any case the process is over."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

__all__ = ["CUT_OFF_S", "GRACE_S", "EndingServer"]

logger = logging.getLogger("crosschip.serve")

GRACE_S = 5.0  # after what is under way was broken off: for last events and their clients
CUT_OFF_S = 15.0  # after that same moment: for threads that compute, tokenise or wait for another server


class EndingServer(uvicorn.Server):
    """Ends at SIGTERM or SIGINT; `at_signal` is called then, and `break_off` `drain_s` later.

    `CUT_OFF_S` after that the process ends with 1, whatever its threads still wait for: Python itself waits for each,
    and a chip that hangs or a grammar that takes minutes would keep it alive.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        drain_s: float,
        break_off: Callable[[], None],
        at_signal: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(config)
        self._drain_s, self._at_signal, self._break_off = drain_s, at_signal, break_off
        self._timers: list[threading.Timer] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to end (uvicorn)."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets=sockets)

    def call_in_loop(self, act: Callable[[], None]) -> None:
        """Call it where the server answers, from any thread; where it does not answer yet or any more, not at all."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(act)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal (uvicorn)."""
        if not self._timers:
            self._at_signal()
            self._later(self._drain_s, self._break_off)
            self._later(self._drain_s + CUT_OFF_S, _cut_off)
        super().handle_exit(sig, frame)

    @contextmanager
    def ending_at_signals(self) -> Iterator[None]:
        """Signals count from here on, also before the server runs, and the process is over in time until here.

        A server that has ended raises the signals that it took once more (uvicorn); here they have done their work.
        """
        caught = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(number, self.handle_exit) for number in caught]
        try:
            yield
        finally:
            for number, handler in zip(caught, before, strict=True):
                signal.signal(number, handler)
            for timer in self._timers:
                timer.cancel()

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        timer = threading.Timer(seconds, act)
        timer.daemon = True
        timer.start()
        self._timers.append(timer)


def _cut_off() -> None:
    waiting = [each.name for each in threading.enumerate() if each is not threading.current_thread()]
    logger.error("cut off: these threads did not end in time: %s", ", ".join(waiting))
    os._exit(1)
