"""A set of ranks as child processes, started, watched and ended for sure by the exam. No torch."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from crosschip.qualify.environment import examination_environment
from crosschip.qualify.exams.links.notes import NotesReader
from crosschip.qualify.exams.links.rank_process import GO
from crosschip.rundir import write_json

__all__ = ["Death", "Ranks"]

_POLL_S = 0.05
_LAST_WORDS = 600  # characters of a dead rank's log


@dataclass(frozen=True)
class Death:
    """A rank that did not end well: what it raised or how its process died, what it was doing, when."""

    rank: int
    how: str
    during: str
    at: float


@dataclass
class Ranks:
    """Ranks 0, 1, ... on these chips. Used as a context, at whose end none of them is left.

    They stay in the exam's process group, so that whoever ends the exam ends them; and each follows its parent's death.
    `limit_s` is the longest that any may live.
    """

    directory: Path
    chips: Sequence[str]
    limit_s: float
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    readers: list[NotesReader] = field(default_factory=list)

    def __enter__(self) -> Ranks:
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            for rank in range(len(self.chips)):
                self._start(rank)
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()

    def _start(self, rank: int) -> None:
        notes, job = self.directory / f"rank-{rank}.jsonl", self.directory / f"rank-{rank}.job.json"
        write_json(
            job,
            {
                "rank": rank,
                "num_ranks": len(self.chips),
                "chip_spec": self.chips[rank],
                "directory": str(self.directory),
                "notes": str(notes),
                "parent": os.getpid(),
                "limit_s": self.limit_s,
            },
        )
        with (self.directory / f"rank-{rank}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "crosschip.qualify.exams.links.rank_process", str(job)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=examination_environment({**os.environ, "OMP_NUM_THREADS": "1"}),
            )
        self.processes.append(process)
        self.readers.append(NotesReader(notes))

    def end(self) -> None:
        """Kill what is left, stopped ranks too."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        for process in self.processes:
            process.wait()

    def go(self, steps: Sequence[dict[str, Any]], timeout_s: float, delays_s: Sequence[float] | None = None) -> None:
        """Let the ranks begin; `delays_s` says how much later each does."""
        delays = list(delays_s or [0.0] * len(self.chips))
        write_json(self.directory / GO, {"steps": list(steps), "timeout_s": timeout_s, "delays_s": delays})

    def signal(self, rank: int, number: signal.Signals) -> float:
        """Send a signal to a rank; the time at which it was sent."""
        os.kill(self.processes[rank].pid, number)
        return time.monotonic()

    def notes(self, rank: int) -> list[dict[str, Any]]:
        """What a rank has noted so far."""
        return self.readers[rank].read()

    def having(self, key: str) -> list[dict[str, Any]]:
        """The notes of all ranks with this key; `rank` is added to each."""
        return [{**note, "rank": rank} for rank in range(len(self.chips)) for note in self.notes(rank) if key in note]

    def all_have(self, key: str, among: Sequence[int] | None = None) -> bool:
        """Whether each rank has noted something under this key."""
        ranks = range(len(self.chips)) if among is None else among
        return all(any(key in note for note in self.notes(rank)) for rank in ranks)

    def wait(self, until: Callable[[], bool], limit_s: float, tick: Callable[[], None] = lambda: None) -> bool:
        """Wait until something holds; False when the time is over before. `tick` is called meanwhile."""
        deadline = time.monotonic() + limit_s
        while not until():
            if time.monotonic() > deadline:
                return False
            tick()
            time.sleep(_POLL_S)
        return True

    def deaths(self) -> list[Death]:
        """The ranks that have ended without having done all, the earliest first."""
        found = []
        for rank, process in enumerate(self.processes):
            code = process.poll()
            notes = self.notes(rank)
            raised = [note for note in notes if "raised" in note]
            if raised:
                how = f"{raised[0]['raised']}: {raised[0]['message']}"
                found.append(Death(rank, how, self.doing(rank), raised[0]["at"]))
            elif code is not None and not any("ended" in note for note in notes):
                found.append(Death(rank, self._death(rank, code), self.doing(rank), time.monotonic()))
        return sorted(found, key=lambda each: each.at)

    def doing(self, rank: int) -> str:
        """What a rank said it was doing last."""
        now = [note["now"] for note in self.notes(rank) if "now" in note]
        return str(now[-1]) if now else "starting"

    def is_over(self, among: Sequence[int] | None = None) -> bool:
        """Whether these ranks have all ended, or any rank has ended badly."""
        ranks = range(len(self.chips)) if among is None else among
        return bool(self.deaths()) or all(self.processes[rank].poll() is not None for rank in ranks)

    def _death(self, rank: int, code: int) -> str:
        log = (self.directory / f"rank-{rank}.log").read_text(encoding="utf-8", errors="replace").strip()
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return how + (f"; its last words: {log[-_LAST_WORDS:]}" if log else "")
