"""What a drill does to processes and files of a running training, from outside. Linux. No torch."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from crosschip.checkpoints import complete_checkpoints, read_verdict

__all__ = [
    "cut_newest_checkpoint",
    "descendants",
    "disturb_link",
    "disturbed_s",
    "flip_byte_of_newest_checkpoint",
    "process_running",
    "send",
]

_DISTURBED_S = 25.0  # how long a link is slow, or loses packets
_CUT_S = 2.5  # shorter than groups wait for one that says nothing
_SLOW_STILL_S, _SLOW_MOVING_S = 0.29, 0.01
_LEAST_CHECKPOINTS = 2  # one to damage, and one to go on from
_RESEND_S = 0.3  # TCP sends again after 0.2 s, and after twice that when it is lost again


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


def disturbed_s(fault: str) -> float:
    """Seconds that a fault of a link lasts."""
    return _CUT_S if fault == "link-cut" else _DISTURBED_S


def disturb_link(pid: int, fault: str) -> bool:
    """Hold the process that exchanges still as the link of `fault` would; False when it is gone.

    At both ends that looks as a link does over which no bytes come: connections stay open, and nothing is lost.
    """
    rhythm = {"link-cut": [(_CUT_S, 0.0)], "slow-link": _slow(), "lossy-link": _lossy()}[fault]
    if not send(pid, signal.SIGSTOP):
        return False
    threading.Thread(target=_hold_still, args=(pid, rhythm), daemon=True).start()
    return True


def _slow() -> Iterator[tuple[float, float]]:
    until = time.monotonic() + _DISTURBED_S
    while time.monotonic() < until:
        yield _SLOW_STILL_S, _SLOW_MOVING_S


def _lossy() -> Iterator[tuple[float, float]]:
    until, chance = time.monotonic() + _DISTURBED_S, random.Random(0)
    while time.monotonic() < until:
        yield _RESEND_S, chance.expovariate(1.0 / _RESEND_S)


def _hold_still(pid: int, rhythm: Iterable[tuple[float, float]]) -> None:
    """Stop and continue a process by pairs of seconds, stopped and moving; in the end it goes on."""
    try:
        for still_s, moving_s in rhythm:
            if not send(pid, signal.SIGSTOP):
                return
            time.sleep(still_s)
            send(pid, signal.SIGCONT)
            time.sleep(moving_s)
    finally:
        send(pid, signal.SIGCONT)


def _largest_file_of_newest(stage_directory: Path) -> Path | None:
    """That of the newest good checkpoint; None without another good one, which training can go on from."""
    good = [path for path in complete_checkpoints(stage_directory) if not read_verdict(path)]
    if len(good) < _LEAST_CHECKPOINTS:
        return None
    return max((file for file in good[-1].rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def cut_newest_checkpoint(stage_directory: Path) -> Path | None:
    """Cut the largest file of the newest checkpoint in half; None when there are not two good ones."""
    file = _largest_file_of_newest(stage_directory)
    if file is not None:
        os.truncate(file, file.stat().st_size // 2)
    return file


def flip_byte_of_newest_checkpoint(stage_directory: Path) -> Path | None:
    """Change a byte in the middle of the newest checkpoint's largest file; None when there are not two good ones."""
    file = _largest_file_of_newest(stage_directory)
    if file is not None:
        with file.open("r+b") as opened:
            opened.seek(file.stat().st_size // 2)
            byte = opened.read(1)
            opened.seek(-1, os.SEEK_CUR)
            opened.write(bytes([byte[0] ^ 0x10]))
    return file
