"""A thread's team of OpenMP threads goes with it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from crosschip.chips import in_passing_thread

COUNTS = """
import os, threading, time, torch
from crosschip.chips import in_passing_thread

torch.set_num_threads(2)
numbers = torch.ones(1 << 20)

def compute():
    return (numbers * 2).sum().item()

def num_threads():
    return len(os.listdir("/proc/self/task"))

before = num_threads()
value = in_passing_thread(compute)()
deadline = time.monotonic() + 20
while num_threads() > before and time.monotonic() < deadline:  # they end soon after
    time.sleep(0.05)
passed = num_threads()
lasting = threading.Event()
thread = threading.Thread(target=lambda: (compute(), lasting.set(), threading.Event().wait()), daemon=True)
thread.start()
lasting.wait()
print(value, passed - before, num_threads() - before)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="the system does not list a process's threads")
def test_nothing_of_it_is_left() -> None:
    done = subprocess.run([sys.executable, "-c", COUNTS], capture_output=True, text=True, check=True)
    value, passed, lasting = done.stdout.split()
    assert float(value) == 2.0 * (1 << 20)
    assert int(passed) == 0
    assert int(lasting) >= 2, "a thread that goes on keeps its team: the reason for all this"


def test_what_is_raised_comes_out() -> None:
    def fail(number: int) -> int:
        raise ValueError(f"{number} in {threading.current_thread().name}")

    with pytest.raises(ValueError, match="3 in crosschip-passing"):
        in_passing_thread(fail)(3)
