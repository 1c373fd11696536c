"""What a drill does to processes: a real one that is held still as a link would hold it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from crosschip.train.drill import striking
from crosschip.train.guard.processes import process_state


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    started = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    yield started
    started.kill()
    started.wait()


def states(pid: int, seconds: float) -> list[bool]:
    """Whether the process was stopped, at every centisecond or so."""
    found, until = [], time.monotonic() + seconds
    while time.monotonic() < until:
        found.append(process_state(pid) == "T")
        time.sleep(0.01)
    return found


@pytest.mark.parametrize("fault", ["link-cut", "slow-link", "lossy-link"])
def test_the_process_is_held_still_and_goes_on_in_the_end(
    process: subprocess.Popen[bytes], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(striking, "_DISTURBED_S", 1.5)
    monkeypatch.setattr(striking, "_CUT_S", 1.0)
    assert striking.disturb_link(process.pid, fault)
    seen = states(process.pid, 1.0)
    assert any(seen)
    if fault == "lossy-link":
        assert not all(seen)
    deadline = time.monotonic() + 30.0
    while process_state(process.pid) == "T" or any(states(process.pid, 0.5)):
        assert time.monotonic() < deadline, "it is still held"


def test_a_process_that_is_gone_is_not_struck(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    assert not striking.disturb_link(process.pid, "link-cut")
