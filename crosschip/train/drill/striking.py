"""What a drill does to processes and files of a running training, from outside. Linux. No torch."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from crosschip.rundir import is_complete

__all__ = ["cut_newest_checkpoint", "descendants", "flip_byte_of_newest_checkpoint", "process_running", "send"]


def descendants(pid: int) -> Iterator[int]:
    """Every process below `pid`."""
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield int(child)
                yield from descendants(int(child))


def process_running(module: str, below: int) -> int | None:
    """The process below another one that runs `python -m MODULE`; None when there is none."""
    for pid in descendants(below):
        with contextlib.suppress(OSError):
            if module.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                return pid
    return None


def send(pid: int, number: signal.Signals) -> bool:
    """Send a signal; False when the process is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _largest_file_of_newest(stage_directory: Path) -> Path | None:
    complete = [path for path in sorted(stage_directory.glob("checkpoints/step-*")) if is_complete(path)]
    if not complete:
        return None
    return max((file for file in complete[-1].rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def cut_newest_checkpoint(stage_directory: Path) -> Path | None:
    """Cut the largest file of the newest checkpoint in half; None when there is no checkpoint."""
    file = _largest_file_of_newest(stage_directory)
    if file is not None:
        os.truncate(file, file.stat().st_size // 2)
    return file


def flip_byte_of_newest_checkpoint(stage_directory: Path) -> Path | None:
    """Change one byte in the middle of the largest file of the newest checkpoint; None when there is no checkpoint."""
    file = _largest_file_of_newest(stage_directory)
    if file is not None:
        with file.open("r+b") as opened:
            opened.seek(file.stat().st_size // 2)
            byte = opened.read(1)
            opened.seek(-1, os.SEEK_CUR)
            opened.write(bytes([byte[0] ^ 0x10]))
    return file
