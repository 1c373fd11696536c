"""A rank without a core is told from one that hangs: real processes on one core, real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from crosschip.train.guard.heartbeat import Beat
from crosschip.train.guard.starved import CoreWaits, core_waits_s

BUSY = "while True: pass"


@pytest.fixture
def crowd() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Five busy processes on one core."""
    core = min(os.sched_getaffinity(0))
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(5)]
    try:
        for process in processes:
            os.sched_setaffinity(process.pid, {core})
        time.sleep(0.5)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def beat_of(pid: int, beat_at: float) -> Beat:
    return Beat(0, pid, 0, "pretrain", "forward-backward", 5, 50, beat_at, 1.0, "", False, None)


@pytest.mark.skipif(not core_waits_s(os.getpid()), reason="this kernel does not count waits for cores")
def test_time_without_a_core_is_not_silence(crowd: list[subprocess.Popen[bytes]]) -> None:
    waits, began = CoreWaits(), time.monotonic()
    beat = beat_of(crowd[0].pid, began - 0.6)
    waits.look([beat], began)
    time.sleep(1.5)
    now = time.monotonic()
    assert beat.is_overdue(now)
    assert waits.since(beat) > 0.5 * (now - began)  # four fifths, were the machine this test's own
    assert waits.since(replace(beat, num_beats=51)) == 0.0  # of the next beat nothing is known yet


@pytest.mark.skipif(not core_waits_s(os.getpid()), reason="this kernel does not count waits for cores")
def test_a_rank_that_others_wait_for_gets_no_core(crowd: list[subprocess.Popen[bytes]]) -> None:
    waits, began = CoreWaits(), time.monotonic()
    waiting = replace(beat_of(os.getpid(), began - 0.6), rank=1)
    waits.look([beat_of(crowd[0].pid, began - 0.1), waiting], began)
    time.sleep(1.5)
    assert waits.since(waiting) > 0.5 * (time.monotonic() - began)


@pytest.mark.skipif(not core_waits_s(os.getpid()), reason="this kernel does not count waits for cores")
def test_a_rank_that_is_stopped_waits_for_no_core(crowd: list[subprocess.Popen[bytes]]) -> None:
    crowd[0].send_signal(signal.SIGSTOP)
    time.sleep(0.2)
    waits, began = CoreWaits(), time.monotonic()
    beat = beat_of(crowd[0].pid, began - 0.6)
    waits.look([beat], began)
    time.sleep(1.2)
    assert waits.since(beat) < 0.05
    assert beat.is_overdue(time.monotonic() - waits.since(beat))
