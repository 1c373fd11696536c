"""Whether the lighthouse is still the same one: a connection to it that is held open, and tells at once when it ends.

A manager of torchft does not notice that its lighthouse has died, and waits for an answer that will not come; and a new
lighthouse counts its quorums from 1 again, so that a quorum's number says nothing any more.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

__all__ = ["LighthouseWatch"]

_TRY_EVERY_S = 0.2


class LighthouseWatch:
    """Watches `http://HOST:PORT` from a thread of its own. `times_lost` counts how often it went away."""

    def __init__(self, lighthouse: str, connect_s: float, tell: Callable[[str], None]) -> None:
        parts = urlsplit(lighthouse)
        self._address = (parts.hostname, parts.port)
        self._connect_s, self._tell = connect_s, tell
        self.times_lost = 0
        self.is_there = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(self._address, self._connect_s) as held:
                held.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                held.settimeout(None)
                self._tell_when_back()
                self.is_there.set()
                with contextlib.suppress(OSError):
                    while held.recv(1):  # nothing is ever sent; this returns when the other side is gone
                        pass
                self.times_lost += 1
                self.is_there.clear()
                self._tell("the lighthouse is gone")
            time.sleep(_TRY_EVERY_S)

    def _tell_when_back(self) -> None:
        if self.times_lost:
            self._tell("the lighthouse is back")
