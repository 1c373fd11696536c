"""What is done about an engine that gave a bad answer. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from crosschip.train.rl.rollouts.errors import Fault

__all__ = ["MOST_BAD_IN_A_ROW", "MOST_REFUSED_IN_A_ROW", "Measure", "Standing"]

MOST_BAD_IN_A_ROW = 3
MOST_REFUSED_IN_A_ROW = 3  # problems that others answered

# keep: go on. wait: it is well, and has too much to do. probe: give it nothing until it answers a small question.
# reload: have it load the published weights again. give up: it gets no more requests.
Measure = Literal["keep", "wait", "probe", "reload", "give up"]


@dataclass
class Standing:
    """How an engine did lately."""

    bad_in_a_row: int = 0
    wrong_in_a_row: int = 0
    refused_in_a_row: int = 0
    busy_since_s: float | None = None

    def note_good(self) -> None:
        """A good answer wipes out what was before."""
        self.bad_in_a_row = self.wrong_in_a_row = self.refused_in_a_row = 0
        self.busy_since_s = None

    def note_busy(self, now_s: float) -> float:
        """It has too much to do; returns for how many seconds it has said nothing else."""
        if self.busy_since_s is None:
            self.busy_since_s = now_s
        return now_s - self.busy_since_s

    def note_refused(self) -> Measure:
        """It refused a problem that another engine answered, so the problem was none."""
        self.refused_in_a_row += 1
        return "give up" if self.refused_in_a_row >= MOST_REFUSED_IN_A_ROW else "keep"

    def note_bad(self, fault: Fault, has_new_weights: bool = False) -> Measure:
        """One bad answer more. `has_new_weights`: the engine has loaded weights since it was asked, or is about to, so
        that an answer of the wrong version says nothing about it now."""
        if fault == "busy":
            return "wait"
        self.busy_since_s = None
        if fault == "wrong version":
            if has_new_weights:
                return "keep"
            self.wrong_in_a_row += 1
            return "reload" if self.wrong_in_a_row == 1 else "give up"
        self.bad_in_a_row += 1
        if self.bad_in_a_row >= MOST_BAD_IN_A_ROW and fault != "unreachable":
            return "give up"
        return "probe" if fault in ("unreachable", "slow", "failed") else "keep"
