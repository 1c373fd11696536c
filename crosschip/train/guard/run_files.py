"""The files of a run as the supervisor needs them, without the rooms that read and write them with torch."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from crosschip.checkpoints import complete_checkpoints, step_of
from crosschip.errors import RunDirectoryError
from crosschip.rundir import RunDirectory
from crosschip.train.guard.observed import Event

__all__ = [
    "EventLog",
    "check_directory",
    "committed_steps",
    "cut_torn_line",
    "last_logged_step",
    "logged_steps",
    "newest_stage",
    "record_of",
    "unreadable_lines",
]

_TAIL = 4096  # bytes at the end of a log, more than most lines
_NAMED_LINES = 5  # so many lines that cannot be read are told by number


def check_directory(run: RunDirectory, resume: bool) -> None:
    """Refuse to begin over an existing run's results, or to resume where no run ever was.

    Raises:
        RunDirectoryError: names the run directory.
    """
    if resume and not run.path.is_dir():
        raise RunDirectoryError(f"there is no run at {run.path} to go on with", "leave out --resume to begin it")
    if not resume and _has_results(run):
        raise RunDirectoryError(
            f"{run.path} already holds results of a run",
            "add --resume to go on with it, or give another --out; nothing is overwritten",
        )


def _has_results(run: RunDirectory) -> bool:
    """Whether a run has trained at least one step here, or was evaluated."""
    stages = list((run.path / "train").glob("*"))
    stepped = any(f.stat().st_size for stage in stages for f in stage.glob("metrics.jsonl"))
    return stepped or any(any(stage.glob("checkpoints/*")) for stage in stages) or run.evaluation.exists()


def committed_steps(train_directory: Path) -> int:
    """The steps that complete checkpoints hold, over all stages; it only grows while a run makes progress."""
    complete = (complete_checkpoints(stage) for stage in train_directory.glob("*"))
    return sum(step_of(checkpoints[-1]) or 0 for checkpoints in complete if checkpoints)


def logged_steps(train_directory: Path) -> int:
    """The steps that the logs hold, over all stages: progress of a group that others heal after a fault."""
    return sum(last_logged_step(path) for path in train_directory.glob("*/metrics.jsonl"))


def last_logged_step(metrics: Path) -> int:
    """The step of the last whole line that can be read; 0 where there is none."""
    if not metrics.exists():
        return 0
    size = tail = metrics.stat().st_size
    with metrics.open("rb") as file:
        tail = min(size, _TAIL)
        while True:
            file.seek(size - tail)
            lines = file.read().splitlines(keepends=True)
            for line in reversed(lines if tail == size else lines[1:]):
                record = record_of(line.decode(errors="replace")) if line.endswith(b"\n") else None
                if record is not None:
                    return int(record["step"])
            if tail == size:
                return 0
            tail = min(size, 2 * tail)  # a line that is longer than that


def record_of(line: str) -> dict[str, Any] | None:
    """What a whole line of a log holds; None when it is no record of a step, as after a byte of it has changed."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # the second: nested too deep
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def unreadable_lines(log: Path, numbers: Sequence[int], step: int) -> Event:
    """The event about lines of a log that are no records: how many, and where."""
    first = ", ".join(map(str, numbers[:_NAMED_LINES])) + (", ..." if len(numbers) > _NAMED_LINES else "")
    lines = f"{len(numbers)} lines" if len(numbers) > 1 else "1 line"
    told = f"{lines} of {log} cannot be read: line {first}"
    return Event(step, "unreadable-log", told, "left out; the disk or the memory of this machine may be failing")


def cut_torn_line(path: Path) -> None:
    """Drop the end of a log after its last whole line, which a full disk or a power cut has left.

    The next line would go on in the middle of it, and no reader could read either.
    """
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = size = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - _TAIL)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)


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
        path = directory / "events.jsonl"
        cut_torn_line(path)
        # One write of one line, at the end whoever wrote last: lines of two processes do not mix.
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(event), ensure_ascii=False) + "\n")
