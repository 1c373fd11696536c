"""Events from other threads, kept until the loop writes them down."""

from __future__ import annotations

import queue

from crosschip.errors import printable

__all__ = ["EventQueue"]


class EventQueue:
    """(event, detail, action), as `events.jsonl` has them."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[tuple[str, str, str]] = queue.SimpleQueue()

    def put(self, event: str, detail: str, action: str) -> None:
        """Something happened, and something was done about it."""
        self._events.put((event, printable(detail), printable(action)))

    def taken(self) -> list[tuple[str, str, str]]:
        """What has happened since the last call."""
        found = []
        while not self._events.empty():
            found.append(self._events.get())
        return found
