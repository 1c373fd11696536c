"""A training whose terminal is closed: the kernel gives SIGHUP to it, and what it says has no place to go any more."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train.launched import LIMIT_S, ROOT, lines, settings

_LONG = settings("train.steps=100000", "train.sample_every=100000", "train.validate_every=100000")
_TERMINAL_OF_ITS_OWN = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


def _start_in_terminal(recipe: Path, out: Path, num_ranks: int, *before: str) -> tuple[subprocess.Popen[bytes], int]:
    """A training as the leader of a terminal's session; and our end of the terminal."""
    ours, its = pty.openpty()
    train = [sys.executable, "-m", "crosschip", "train", str(recipe), "--out", str(out), "--nproc", str(num_ranks)]
    command = [sys.executable, "-c", _TERMINAL_OF_ITS_OWN, *before, *train, *_LONG]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdin=its, stdout=its, stderr=its, env=environment, cwd=out.parent, start_new_session=True
    )
    os.close(its)
    os.set_blocking(ours, False)
    return process, ours


def _wait_for_steps(process: subprocess.Popen[bytes], terminal: int, metrics: Path, num_steps: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while len(lines(metrics)) < num_steps:
        assert process.poll() is None
        assert time.monotonic() < deadline
        with contextlib.suppress(OSError):  # there is nothing now, or nobody writes to it, as under nohup
            while os.read(terminal, 1 << 16):  # one that nobody reads would be full
                pass
        time.sleep(0.05)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_closed_terminal_ends_it_in_order(pretraining: Path, tmp_path: Path, num_ranks: int) -> None:
    stage = tmp_path / "run/train/pretrain"
    process, terminal = _start_in_terminal(pretraining, tmp_path / "run", num_ranks)
    try:
        _wait_for_steps(process, terminal, stage / "metrics.jsonl", 3)
        os.close(terminal)
        assert process.wait(LIMIT_S) == 128 + signal.SIGHUP
    finally:
        process.kill()
        process.wait()
    last = len(lines(stage / "metrics.jsonl"))
    assert (stage / f"checkpoints/step-{last:08d}/COMPLETE").exists()
    assert [line["detail"] for line in lines(stage / "events.jsonl") if line["event"] == "interrupted"] == ["signal 1"]


def test_under_nohup_it_goes_on(pretraining: Path, tmp_path: Path) -> None:
    stage = tmp_path / "run/train/pretrain"
    process, terminal = _start_in_terminal(pretraining, tmp_path / "run", 1, "/usr/bin/nohup")
    try:
        _wait_for_steps(process, terminal, stage / "metrics.jsonl", 3)
        os.close(terminal)
        process.send_signal(signal.SIGHUP)  # as some shells do once more
        seen = len(lines(stage / "metrics.jsonl"))
        deadline = time.monotonic() + LIMIT_S
        while len(lines(stage / "metrics.jsonl")) < seen + 20:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
