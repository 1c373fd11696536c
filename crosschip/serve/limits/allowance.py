"""How often and how much at a time: policy alone, its clock is handed in."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

__all__ = ["Allowance", "Refusal"]


@dataclass(frozen=True)
class Refusal:
    """Why a request must not begin now, and when to try again."""

    reason: str  # a word for metrics
    message: str
    retry_after_s: int


@dataclass
class Allowance:
    """What one key may do. A bucket holds at most a minute's requests, but at least one, and fills evenly.

    A request is counted when its head has come, and takes its place when it is there whole: between the two it waits
    for its own sender, which must not keep others out.
    """

    requests_per_minute: float | None = None
    max_concurrent: int | None = None
    under_way: int = 0
    _tokens: float = field(init=False)
    _filled_at_s: float | None = None

    def __post_init__(self) -> None:
        self._tokens = self._capacity

    @property
    def _capacity(self) -> float:
        return max(1.0, self.requests_per_minute or 1.0)

    def count(self, now_s: float) -> Refusal | None:
        """Count a request, or say why it must not begin: the rate, or that no place is free as it is."""
        if (refusal := self._no_place()) is not None:
            return refusal
        if self.requests_per_minute is not None:
            self._fill(now_s, self.requests_per_minute / 60)
            if self._tokens < 1.0:
                wait_s = (1.0 - self._tokens) / (self.requests_per_minute / 60)
                message = f"this key may send {self.requests_per_minute:g} requests a minute, and has sent them"
                return Refusal("rate", message, max(1, math.ceil(wait_s)))
            self._tokens -= 1.0
        return None

    def begin(self) -> Refusal | None:
        """Begin a request that was counted, which `end` must end; or say why not, and count it no more."""
        if (refusal := self._no_place()) is not None:
            self._tokens = min(self._capacity, self._tokens + 1.0)
            return refusal
        self.under_way += 1
        return None

    def end(self) -> None:
        """A request that was begun has ended, however."""
        assert self.under_way > 0
        self.under_way -= 1

    def _no_place(self) -> Refusal | None:
        if self.max_concurrent is None or self.under_way < self.max_concurrent:
            return None
        message = f"{self.under_way} requests of this key are under way, which is as many as it may have"
        return Refusal("concurrency", message, 1)

    def _fill(self, now_s: float, per_s: float) -> None:
        passed_s = 0.0 if self._filled_at_s is None else max(0.0, now_s - self._filled_at_s)
        self._filled_at_s = now_s
        self._tokens = min(self._capacity, self._tokens + passed_s * per_s)
