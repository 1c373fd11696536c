"""What one rank does in a sustained run: an all-reduce without a pause, with the bytes of each second noted."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from crosschip.qualify.exams.links.group import Group
from crosschip.qualify.exams.links.notes import Notes

__all__ = ["sustain"]

_ASK_EVERY_S = 0.25  # whether to go on
_TICK_S = 0.05


class _Pauses(threading.Thread):
    """The longest time for which this process stood still: as on a paused machine, which no count of waits shows."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.is_over = threading.Event()
        self._longest_s = 0.0

    def run(self) -> None:
        """Look at the clock again and again; a collective, which waits without the interpreter, does not hinder it."""
        before = time.monotonic()
        while not self.is_over.wait(_TICK_S):
            now = time.monotonic()
            self._longest_s = max(self._longest_s, now - before - _TICK_S)
            before = now

    def take(self) -> float:
        """The longest pause since the last call, in seconds."""
        longest_s, self._longest_s = self._longest_s, 0.0
        return longest_s


def sustain(step: dict[str, Any], group: Group, notes: Notes) -> None:
    """All-reduce `num_bytes` for `limit_s` seconds, and no longer than `end_s` after the ranks met.

    Rank 0's clock decides; each rank notes its seconds.
    """
    notes.add(now="sustained all_reduce")
    message = torch.zeros(max(1, step["num_bytes"] // 4), device=group.device)
    deadline = min(time.monotonic() + step["limit_s"], group.met_at + step["end_s"])
    batch = _batch(group, message)
    began = second_began = time.monotonic()
    waited = _host_wait_s()
    num_bytes = 0
    pauses = _Pauses()
    pauses.start()
    while group.agree(time.monotonic() < deadline):
        for _ in range(batch):
            dist.all_reduce(message)
            group.synchronize()
            num_bytes += message.numel() * 4
            now = time.monotonic()
            if now - second_began >= 1.0:
                now_waited = _host_wait_s()
                passed_s = now - second_began
                notes.add(
                    second_at_s=second_began - began,
                    num_bytes=num_bytes,
                    passed_s=passed_s,
                    host_wait=max(now_waited - waited, pauses.take()) / passed_s,
                )
                second_began, waited, num_bytes = now, now_waited, 0
    pauses.is_over.set()


def _batch(group: Group, message: torch.Tensor) -> int:
    """How many all-reduces fill the time between two questions."""
    dist.all_reduce(message)
    group.synchronize()
    started = time.monotonic()
    for _ in range(3):
        dist.all_reduce(message)
    group.synchronize()
    once_s = (time.monotonic() - started) / 3
    return group.agree_number(max(1, min(1000, int(_ASK_EVERY_S / max(once_s, 1e-6)))))


def _host_wait_s() -> float:
    """Seconds in which this process's threads were ready to run and had no core (Linux; elsewhere 0)."""
    total_ns = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total_ns += int(path.read_text(encoding="ascii").split()[1])
        except (OSError, IndexError, ValueError):  # a thread that has just ended, or a kernel without the count
            continue
    return total_ns / 1e9
