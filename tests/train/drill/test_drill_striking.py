"""What a drill does to processes and files: a real process that is held still as a link would hold it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crosschip.rundir import COMPLETE, write_json
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


def make_checkpoint(stage: Path, step: int, verdict: str | None = None) -> Path:
    """One of two files, the larger of which is its tensors."""
    path = stage / f"checkpoints/step-{step:08d}"
    path.mkdir(parents=True)
    (path / "tensors").write_bytes(bytes(1000))
    (path / COMPLETE).touch()
    if verdict is not None:
        write_json(path / "verified.json", {"verdict": verdict, "detail": "as told"})
    return path / "tensors"


@pytest.mark.parametrize("damage", [striking.cut_newest_checkpoint, striking.flip_byte_of_newest_checkpoint])
def test_the_last_good_checkpoint_is_left_alone(tmp_path: Path, damage: Callable[[Path], Path | None]) -> None:
    first = make_checkpoint(tmp_path, 20)
    assert damage(tmp_path) is None, "there is no other to go on from"
    make_checkpoint(tmp_path, 40, verdict="wrong")
    (tmp_path / "checkpoints/step-00000050").mkdir()  # being written
    assert damage(tmp_path) is None
    newest = make_checkpoint(tmp_path, 60, verdict="right")
    assert damage(tmp_path) == newest
    assert newest.read_bytes() != bytes(1000)
    assert first.read_bytes() == bytes(1000)
