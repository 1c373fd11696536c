"""How an attempt at training ended, whether it may be tried again, and when that has been tried enough. Pure."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from crosschip.errors import EXIT_BAD_USAGE, EXIT_FAIL, EXIT_OK
from crosschip.train.signals import STOP_SIGNALS

__all__ = ["INTERRUPTED", "Ended", "Restarts", "classify_death", "first_failure"]

Kind = Literal["finished", "interrupted", "refused", "hang", "killed", "crash", "exception", "out-of-memory"]

INTERRUPTED = tuple(128 + number for number in STOP_SIGNALS)  # how a loop ends that was asked to
_LONGEST_WAIT_S = 30.0


@dataclass(frozen=True)
class Ended:
    """How an attempt ended. `is_final`: it is not tried again, and the supervisor ends with `exit_code`.

    `rank` and `phase` say where, as far as that is known; `detail` is a sentence.
    """

    event: Kind
    detail: str
    exit_code: int
    is_final: bool
    rank: int | None = None
    phase: str = ""
    stage: str = ""
    step: int = 0

    @property
    def where(self) -> str:
        """Rank and phase in words."""
        rank = "the launcher" if self.rank is None else f"rank {self.rank}"
        return f"{rank} in {self.phase}" if self.phase else rank


def first_failure(deaths: Sequence[tuple[int, int | None]], launcher: int | None) -> tuple[int | None, int | None]:
    """Which rank failed first and with what exit code, from ranks and codes in the order in which they ended.

    A rank that has only lost the others ends with `EXIT_FAIL`, and one that a launcher took down with SIGTERM: another
    failure is the cause. A code is None when nobody saw it. Without a failed rank the launcher's code counts, which is
    None while it runs.
    """
    failed = [(rank, code) for rank, code in deaths if code not in (EXIT_OK, None)]
    if failed:
        return min(failed, key=lambda each: each[1] in (EXIT_FAIL, -signal.SIGTERM))
    unseen = [rank for rank, code in deaths if code is None]
    if launcher == EXIT_OK or not unseen:
        return None, launcher
    return unseen[0], launcher


def classify_death(exit_code: int | None, is_announced: bool, ran_out_of_memory: bool) -> tuple[Kind, str, bool]:
    """The kind of end, in words, and whether it is final.

    `EXIT_FAIL` is a verdict where the rank has announced that it ends with it. `EXIT_BAD_USAGE` always is: nothing
    changes when it is started again.
    """
    if exit_code is None:
        return "killed", "it is gone, and nobody saw how", False
    if exit_code == EXIT_OK:
        return "finished", "it has ended its work", True
    if exit_code in INTERRUPTED:
        return "interrupted", f"it ended by itself after signal {exit_code - 128}", True
    if exit_code < 0 or exit_code - 128 in set(signal.Signals):  # as the process's parent sees it, and as a shell does
        return _killed_by(-exit_code if exit_code < 0 else exit_code - 128, ran_out_of_memory)
    if exit_code == EXIT_BAD_USAGE or (exit_code == EXIT_FAIL and is_announced):
        return "refused", f"it ended with exit code {exit_code}, and says why above", True
    return "exception", f"it ended with exit code {exit_code}, and says why above", False


def _killed_by(number: int, ran_out_of_memory: bool) -> tuple[Kind, str, bool]:
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    if number == signal.SIGKILL and ran_out_of_memory:
        return "out-of-memory", f"the kernel killed it because memory ran out ({name})", False
    if number in (signal.SIGKILL, *STOP_SIGNALS):
        return "killed", f"it was killed from outside ({name})", False
    return "crash", f"it died of {name}", False


class Restarts:
    """Counts the attempts that ended without progress; progress is a checkpoint that was not there before."""

    def __init__(self, most: int, committed: int) -> None:
        self._most = most
        self._committed = committed
        self._in_vain: list[Ended] = []

    @property
    def num_in_vain(self) -> int:
        """Attempts without progress since the last progress."""
        return len(self._in_vain)

    def may_try_again(self, ended: Ended, committed: int) -> bool:
        """Count an attempt that ended; `committed` is the number of steps that checkpoints now hold."""
        if committed > self._committed:
            self._committed = committed
            self._in_vain.clear()
        self._in_vain.append(ended)
        return len(self._in_vain) <= self._most

    def wait_s(self) -> float:
        """Seconds before the next attempt: none after a first failure, then doubling."""
        return min(_LONGEST_WAIT_S, 2.0 ** (len(self._in_vain) - 2)) if len(self._in_vain) > 1 else 0.0

    def words(self) -> str:
        """The attempt that comes next, as the event says it."""
        return (
            f"restarting after committed step {self._committed} ({len(self._in_vain)} of {self._most} without progress)"
        )

    def diagnosis(self) -> str:
        """What was tried, and how each attempt ended."""
        ends = Counter(f"{each.event} of {each.where}" for each in self._in_vain)
        told = "; ".join(f"{count} times {end}" if count > 1 else f"once {end}" for end, count in ends.most_common())
        last = self._in_vain[-1]
        return (
            f"{len(self._in_vain)} attempts in a row ended without a new checkpoint after step {self._committed}: "
            f"{told}. The last: {last.where}, step {last.step}: {last.detail}"
        )
