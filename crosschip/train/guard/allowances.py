"""How long a rank may be silent: three times what the phase usually takes, and some seconds. Pure policy, no torch."""

from __future__ import annotations

import statistics
from collections import deque

__all__ = ["COMPUTING", "FACTOR", "SLACK_S", "START", "Allowances"]

FACTOR = 3.0
SLACK_S = 3.4  # a hang is to be told within five: the rest is for looking, for a stack, and for ending the ranks
START = "start"  # loading, tokenising, compiling: it never takes as long as the time before
COMPUTING = "forward-backward"  # the first one may compile, and takes about as long in every process

_REMEMBERED = 15
# Of a first one beside that of the process before: it may have to compile again, or have its operators traced.
_FIRST_FACTOR = 5.0
_LEAST_FIRST_S = 30.0


class Allowances:
    """Learns how long each phase takes, from the beats that begin them.

    A phase is allowed `FACTOR` times its median or a step's, whichever is longer, and `slack_s`: within a step work
    moves from one phase to the next, as when a rank waits for another. `start_allowance_s` holds for what was never
    seen, but not for the first `COMPUTING` where the process before, which was restarted, has told how long its own
    took. `first_s` is how long that was in this stage, 0 while it is not over.
    """

    def __init__(self, start_allowance_s: float, slack_s: float = SLACK_S) -> None:
        self._start_allowance_s = start_allowance_s
        self._slack_s = slack_s
        self._phases: dict[str, deque[float]] = {}
        self._steps: deque[float] = deque(maxlen=_REMEMBERED)
        self._phase: tuple[str, float] | None = None  # which one is going on, and since when
        self._step: tuple[int, float] | None = None
        self._first_before_s = 0.0
        self.first_s = 0.0

    def forget(self, first_before_s: float = 0.0) -> None:
        """Another stage begins, with other steps: nothing was seen of it but `first_s` in the process before."""
        self.first_s, self._first_before_s = 0.0, first_before_s
        self._phases.clear()
        self._steps.clear()
        self._phase = self._step = None

    def begin(self, phase: str, step: int, now: float, known_s: float = 0.0) -> float:
        """A phase begins at `now`, in seconds of any clock; returns the seconds until the next has to begin.

        `known_s` is how long something in it may take that it does not always hold: a write that is waited for.
        """
        if self._phase is not None:
            before, since = self._phase
            if before == COMPUTING and not self.first_s:
                self.first_s = now - since
            self._phases.setdefault(before, deque(maxlen=_REMEMBERED)).append(now - since)
        self._phase = (phase, now)
        if phase == START:
            self._step = None
        elif self._step is None or self._step[0] != step:
            if self._step is not None and self._step[0] == step - 1:
                self._steps.append(now - self._step[1])
            self._step = (step, now)
        return self._allowed(phase) + known_s

    def _allowed(self, phase: str) -> float:
        seen = self._phases.get(phase)
        if phase == COMPUTING and not seen and self._first_before_s:
            first_s = max(_LEAST_FIRST_S, _FIRST_FACTOR * self._first_before_s) + self._slack_s
            return min(first_s, self._start_allowance_s)
        if phase == START or not seen or not self._steps:
            return self._start_allowance_s
        usual = max(statistics.median(seen), statistics.median(self._steps))
        return FACTOR * usual + self._slack_s
