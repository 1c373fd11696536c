"""One process at a time on a directory that was handed off: the certificate of two at once would be that of one."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crosschip.errors import HandoffError

__all__ = ["held_alone", "locked"]


@contextmanager
def held_alone(directory: Path) -> Iterator[None]:
    """Hold a directory, where it is there, until the block ends, whatever ends it.

    Raises:
        HandoffError: another process holds it.
    """
    if not directory.exists():
        yield
        return
    problem = f"another process hands off to {directory} or certifies it: what one of the two finds would be lost"
    with locked(directory, problem):
        yield


@contextmanager
def locked(directory: Path, problem: str) -> Iterator[int]:
    """The descriptor of a directory that this process alone holds until the block ends, whatever ends it.

    Raises:
        HandoffError: another process holds it, which is the `problem`.
    """
    held = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HandoffError(problem, "wait for it, or give another directory") from None
        yield held
    finally:
        os.close(held)
