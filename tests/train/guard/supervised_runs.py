"""What the tests of the supervisor ask about processes and about what became of a training."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from crosschip.train.guard.observed import Event
from crosschip.train.guard.processes import MARK

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(HERE.parents[2]), "OMP_NUM_THREADS": "1"}


def processes_of(directory: Path) -> list[int]:
    """Living processes that train in `directory`, by their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
            state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            is_marked = MARK.encode() in (entry / "environ").read_bytes()
        except OSError:
            continue
        if str(directory).encode() in command and is_marked and state not in "ZX":
            found.append(int(entry.name))
    return found


def committed_steps(directory: Path) -> int:
    path = directory / "committed-0"
    return int(path.read_text()) if path.exists() else 0


@dataclass
class Supervised:
    """`events` as (stage, event); `attempts` as (step resumed from, steps with traced operators)."""

    directory: Path
    exit_code: int | None = None
    events: list[tuple[str, Event]] = field(default_factory=list)

    @property
    def attempts(self) -> list[tuple[int, int]]:
        lines = (self.directory / "attempts-0").read_text().splitlines()
        return [(int(line.split()[0]), int(line.split()[1])) for line in lines]
