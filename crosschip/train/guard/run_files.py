"""The files of a run as the supervisor needs them, without the rooms that read and write them with torch."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

from crosschip.rundir import is_complete
from crosschip.train.guard.observed import Event

__all__ = ["EventLog", "committed_steps", "logged_steps", "newest_stage"]

_NAME = re.compile(r"step-(\d{8,})")
_TAIL = 4096  # bytes at the end of a log, more than its longest line


def committed_steps(train_directory: Path) -> int:
    """The steps that complete checkpoints hold, over all stages; it only grows while a run makes progress."""
    newest: dict[Path, int] = {}
    for path in train_directory.glob("*/checkpoints/step-*"):
        match = _NAME.fullmatch(path.name)
        if match and is_complete(path):
            newest[path.parent] = max(int(match[1]), newest.get(path.parent, 0))
    return sum(newest.values())


def logged_steps(train_directory: Path) -> int:
    """The steps that the logs hold, over all stages: progress of a group that others heal after a fault."""
    return sum(_last_step(path) for path in train_directory.glob("*/metrics.jsonl"))


def _last_step(metrics: Path) -> int:
    """The step of the last whole line."""
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - _TAIL))
        lines = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"}\n")]
    return int(json.loads(lines[-1])["step"]) if lines else 0


def newest_stage(train_directory: Path) -> str:
    """The stage that was logged last; empty when none was."""
    logs = list(train_directory.glob("*/metrics.jsonl"))
    return max(logs, key=lambda path: path.stat().st_mtime).parent.name if logs else ""


class EventLog:
    """Appends events to `STAGE/events.jsonl`, beside a rank that appends to the same file, and says them.

    An event before the first stage has a directory is said only.
    """

    def __init__(self, train_directory: Path, say: Callable[[str], None]) -> None:
        self._train_directory = train_directory
        self._say = say

    def __call__(self, stage: str, event: Event) -> None:
        """Write and say one."""
        self._say(event.line())
        directory = self._train_directory / stage
        if not stage or not directory.is_dir():
            return
        # One write of one line, at the end whoever wrote last: lines of two processes do not mix.
        with (directory / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(event), ensure_ascii=False) + "\n")
