"""What an exam is given."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from crosschip.chips import Chip
from crosschip.qualify.finding import Role, Tier
from crosschip.qualify.journal import IN_OPERATOR, Journal
from crosschip.qualify.subjects.same_draws import SameDraws, draws_numbers
from crosschip.qualify.subjects.subject import Subject, Workload
from crosschip.qualify.tracing.trace import Trace

__all__ = ["ExamContext"]


@dataclass
class ExamContext:
    """One exam on one chip. `skip` holds parts that an earlier try has finished or died in, `only` the one to take."""

    exam: str
    chip: Chip
    chip_spec: str  # what a fresh process hands to `find_chip`
    role: Role
    tier: Tier
    subject: Subject
    trace: Trace
    journal: Journal
    budget_s: float  # end by yourself within this, and say what was not covered
    reproducers: Path  # the directory for reproducers
    seed: int = 0
    skip: frozenset[str] = frozenset()
    died_in: frozenset[str] = frozenset()  # those of `skip` in which an earlier try ended
    only: str | None = None
    golden: Path | None = None  # a golden bundle to replay
    golden_files: Path | None = None  # how the subject's files differ from the recorded ones, where that is known
    planned_chips: int | None = None  # of the run that is planned
    started: float = field(default_factory=time.monotonic)

    @property
    def remaining_s(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget_s - (time.monotonic() - self.started)

    def workload(self, device: torch.device, dtype: torch.dtype, seed: int, small: bool) -> Workload:
        """The subject's steps, to be compared with themselves or another device's: they draw the same numbers."""
        workload = self.subject.workload(device, dtype, seed, small=small)
        return SameDraws(workload, seed) if draws_numbers(self.trace) else workload

    def wants(self, part: str) -> bool:
        """Whether a part is to be taken: no earlier try finished it or died in it, and no other one is asked for."""
        if any(_names(each, part) for each in self.skip):
            return False
        return self.only is None or _names(self.only, part)

    def part(self, what: str, run: Callable[[], None]) -> None:
        """Run a part of the exam once, if it is to be taken."""
        if not self.wants(what):
            return
        self.journal.now(what)
        run()
        self.journal.done(what)


def _names(said: str, part: str) -> bool:
    return said == part or said.startswith(f"{part}{IN_OPERATOR}")
