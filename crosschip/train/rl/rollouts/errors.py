"""What ends a stage because of its rollouts, and what is wrong with a single answer."""

from __future__ import annotations

from typing import Literal

from crosschip.errors import EXIT_FAIL, CrosschipError, printable

__all__ = ["MAY_PASS", "BadAnswer", "Fault", "RolloutError"]

# garbage: an answer that cannot be true. wrong version: of other weights than were published. unreachable: no
# connection, or one that broke. slow: none in time. failed: the engine says so (5xx). refused: the engine says that the
# request is wrong. busy: it has too much to do.
Fault = Literal["garbage", "wrong version", "unreachable", "slow", "failed", "refused", "busy"]
MAY_PASS: tuple[Fault, ...] = ("unreachable", "slow", "busy")
"""After these an engine may be well again, and is looked for when new weights go out."""


class RolloutError(CrosschipError):
    """No engine answers any more, or what they answer cannot be judged; the last checkpoint is still there."""

    exit_code = EXIT_FAIL


class BadAnswer(Exception):
    """An engine's answer that is not used, and why."""

    def __init__(self, fault: Fault, reason: str) -> None:
        self.fault: Fault = fault
        self.reason = printable(reason)  # an engine's words may hold anything
        super().__init__(f"{fault}: {self.reason}")
