"""How far the asking is: a line every few seconds and at the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["AnswersTold", "Tell"]

TELL_EVERY_S = 5.0
_TELLING_SHARE = 0.05  # of all answers, from which on the time left is told

Tell = Callable[[str], None]


@dataclass
class AnswersTold:
    """Counts answers, and says how many are there, how many are right, and how long the rest will take."""

    total: int
    tell: Tell
    num_done: int = 0
    num_right: int = 0

    def __post_init__(self) -> None:
        self._begun = self._last = time.monotonic()

    def count(self, right: bool) -> None:
        """One answer more."""
        self.num_done += 1
        self.num_right += right
        now = time.monotonic()
        is_last = self.num_done == self.total
        if not is_last and now - self._last < TELL_EVERY_S:
            return
        self._last = now
        spent = now - self._begun
        left = spent / self.num_done * (self.total - self.num_done)
        # The first answers to end say little about the others.
        rest = f"; about {left:.0f} s left" if self.num_done >= self.total * _TELLING_SHARE else ""
        rest = f"; in {spent:.1f} s" if is_last else rest
        self.tell(f"{self.num_done} of {self.total} answers, {self.num_right} right{rest}")
