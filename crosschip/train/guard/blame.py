"""Several ranks are silent, and one of them is the cause: the others wait for it in a collective. Pure, no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["SilentRank", "blame", "innermost_frame", "main_thread"]

# Where a rank is that waits for others, by the files of its frames and by its operator's name.
_WAITING_FILES = re.compile(r"/torch/(distributed|futures)/|/crosschip/train/(outer|group)/")
_WAITING_OPERATORS = re.compile(
    r"c10d|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|broadcast|barrier|wait_tensor"
)
_WAITING_PHASES = ("averaging", "outer")
_FRAME = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)')


@dataclass(frozen=True)
class SilentRank:
    """What can be seen of a rank from outside. `state` is the kernel's letter, `stack` what `faulthandler` wrote.

    `operator` is the traced operator it is in, empty where none is known.
    """

    rank: int
    phase: str
    step: int
    silent_s: float
    state: str | None
    stack: str
    operator: str

    @property
    def waits_for_others(self) -> bool:
        """Whether it is seen in a collective, or in a phase that is nothing else."""
        if self.operator:
            return bool(_WAITING_OPERATORS.search(self.operator))
        return self.phase in _WAITING_PHASES or bool(_WAITING_FILES.search(main_thread(self.stack)))

    def place(self) -> str:
        """Where it hangs: the operator, the line of source, or that it was stopped."""
        if self.state in ("T", "t"):
            return "it was stopped from outside (SIGSTOP or a debugger)"
        parts = [f"in the operator {self.operator}"] if self.operator else []
        frame = innermost_frame(self.stack)
        if frame:
            parts.append(f"at {frame}")
        if self.state == "D":
            parts.append("inside the kernel, waiting for a disk or a driver")
        if not frame:
            parts.append("it did not answer with its stack")
        return ", ".join(parts)


def main_thread(stack: str) -> str:
    """The part of a dump that belongs to the main thread, which `faulthandler` writes last."""
    return stack.strip().rpartition("\n\n")[2]


def innermost_frame(stack: str) -> str:
    """The line of source where the main thread is, as `file:line in function`; empty without a dump."""
    found = _FRAME.search(main_thread(stack))
    return f"{found['file']}:{found['line']} in {found['function']}" if found else ""


def blame(ranks: Sequence[SilentRank]) -> SilentRank:
    """The rank that the others wait for: a stopped one, else one that is behind, else one in no collective, else the
    one that is silent for longest.
    """
    assert ranks
    furthest = max(each.step for each in ranks)
    return max(
        ranks,
        key=lambda each: (each.state in ("T", "t"), furthest - each.step, not each.waits_for_others, each.silent_s),
    )
