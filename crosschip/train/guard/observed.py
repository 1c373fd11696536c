"""What the guard is fed with, and what it says: the numbers of a step, a suspicion, an event. Pure, no torch."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Literal

__all__ = ["Event", "Kind", "StepNumbers", "Suspicion", "is_close", "is_same"]

Kind = Literal["non-finite", "zero-loss", "zero-gradient", "stuck-loss", "loss-spike", "gradient-spike"]

# Kernels that add in an order of their own each time differ by far less than this; a fault that matters by more.
ROUNDING = 1e-2


@dataclass(frozen=True)
class StepNumbers:
    """What a step has computed over all ranks, before any weight is touched."""

    loss: float
    gradient_norm: float
    mtp_loss: float | None = None

    @property
    def compared(self) -> tuple[float, ...]:
        """The numbers that a replay has to give again."""
        return (self.loss, self.gradient_norm, self.mtp_loss or 0.0)


@dataclass(frozen=True)
class Suspicion:
    """Why a step's numbers are not believed."""

    kind: Kind
    detail: str


@dataclass(frozen=True)
class Event:
    """A line of `events.jsonl`: what happened, in words, and what was done about it."""

    step: int
    event: str
    detail: str
    action: str

    def line(self) -> str:
        """The same for a terminal."""
        return f"step {self.step}: {self.event}: {self.detail}; {self.action}"


def is_same(one: float, other: float) -> bool:
    """Equal to the last bit; any NaN equals any other."""
    return struct.pack("<d", one) == struct.pack("<d", other) or (math.isnan(one) and math.isnan(other))


def is_close(one: float, other: float) -> bool:
    """Equal but for what another order of summing explains."""
    if not (math.isfinite(one) and math.isfinite(other)):
        return is_same(one, other)
    return abs(one - other) <= ROUNDING * max(abs(one), abs(other))
