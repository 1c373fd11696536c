"""The logs of a running training, followed from outside: lines as they come, also those that a resume cuts away."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crosschip.train.launching import group_directory

__all__ = ["FollowedFile", "GroupLog", "SeenEvent", "SeenStep", "average_each_step", "stage_logs"]


@dataclass(frozen=True)
class SeenEvent:
    """A line of `events.jsonl`; `at` is when it was seen, in seconds of the monotonic clock."""

    at: float
    group: int
    step: int
    event: str
    detail: str
    action: str


@dataclass(frozen=True)
class SeenStep:
    """A line of `metrics.jsonl`. `num_groups` took part in it; losses are compared to the last bit."""

    at: float
    group: int
    step: int
    loss: float
    gradient_norm: float
    seconds: float
    skipped: bool
    num_groups: int


class FollowedFile:
    """The lines of a file that others append to, cut, and replace."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = -1
        self._offset = 0

    def new_lines(self) -> Iterator[dict[str, Any]]:
        """Whole lines since the last call.

        A file that was replaced by a shorter copy of itself, as a resume does, is followed on from its new end: what
        it holds was seen before.
        """
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            inode, size = self._stat(file.fileno())
            if inode != self._inode and self._inode != -1:
                self._offset = min(self._offset, size)
            self._inode = inode
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                with contextlib.suppress(ValueError):  # a line that a crash has torn in the middle of the file
                    yield json.loads(line)

    @staticmethod
    def _stat(descriptor: int) -> tuple[int, int]:
        found = os.fstat(descriptor)
        return found.st_ino, found.st_size


@dataclass
class GroupLog:
    """All that one group has logged in one stage, in the order in which it was seen."""

    directory: Path
    group: int
    steps: list[SeenStep] = field(default_factory=list)
    events: list[SeenEvent] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._metrics = FollowedFile(self.directory / "metrics.jsonl")
        self._events = FollowedFile(self.directory / "events.jsonl")

    def look(self) -> None:
        """Take up what is new."""
        now = time.monotonic()
        for line in self._metrics.new_lines():
            self.steps.append(
                SeenStep(
                    now,
                    self.group,
                    line["step"],
                    line["loss"],
                    line["gradient_norm"],
                    line["seconds"],
                    bool(line.get("skipped")),
                    int(line.get("groups", 1)),
                )
            )
        for line in self._events.new_lines():
            self.events.append(SeenEvent(now, self.group, line["step"], line["event"], line["detail"], line["action"]))


def stage_logs(run_directory: Path, stage: str, num_groups: int) -> list[GroupLog]:
    """The logs of a stage's groups, on a machine that holds all of them."""
    return [GroupLog(group_directory(run_directory, group) / "train" / stage, group) for group in range(num_groups)]


def average_each_step(steps: Sequence[SeenStep]) -> bool:
    """Whether groups average each step: then all log the mean loss of all, else each its own, of other data."""
    losses: defaultdict[int, dict[int, float]] = defaultdict(dict)
    for step in steps:
        losses[step.step].setdefault(step.group, step.loss)
    common = [set(of_groups.values()) for of_groups in losses.values() if len(of_groups) > 1]
    return any(len(different) == 1 for different in common)
