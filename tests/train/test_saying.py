"""A training whose listener is gone: the pipe or terminal behind stderr is closed, or its disk is full."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train.launched import lines, settings

_LONG = settings("train.steps=4000", "train.sample_every=4000", "train.validate_every=4000")
_TWO_LINES = (
    "import sys; from crosschip.train.saying import say\nsay('first'); say('second')\n"
    "print('done', flush=True); sys.exit(130)"
)


def test_ctrl_c_saves_although_who_listened_ended_first(pretraining: Path, tmp_path: Path) -> None:
    """As in `crosschip train ... 2>&1 | tee LOG`, where Ctrl-C goes to tee as well."""
    train = tmp_path / "run/train/pretrain"
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "crosschip", "train", str(pretraining), "--out", str(tmp_path / "run"), *_LONG]
    process = subprocess.Popen(command, stdout=writing, stderr=writing, start_new_session=True)
    os.close(writing)
    try:
        while not lines(train / "metrics.jsonl"):
            assert process.poll() is None
            time.sleep(0.05)
        os.close(reading)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 128 + signal.SIGINT
    finally:
        process.kill()
        process.wait()
    last = len(lines(train / "metrics.jsonl"))
    assert (train / f"checkpoints/step-{last:08d}/COMPLETE").exists()


@pytest.mark.parametrize("stderr", ["pipe", "/dev/full"])
def test_a_line_that_nobody_gets_is_left_out_and_the_exit_code_stays(stderr: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    given = writing if stderr == "pipe" else os.open(stderr, os.O_WRONLY)
    ended = subprocess.run([sys.executable, "-c", _TWO_LINES], stdout=subprocess.PIPE, stderr=given, check=False)
    assert (ended.stdout, ended.returncode) == (b"done\n", 130)


def test_a_training_without_a_stderr_trains(pretraining: Path, tmp_path: Path) -> None:
    """As a daemon is started: `crosschip train ... 2>&-`."""
    command = [sys.executable, "-m", "crosschip", "train", str(pretraining), "--out", str(tmp_path / "run")]
    ended = subprocess.run(["sh", "-c", f"{shlex.join(command)} 2>&-"], capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.returncode) == ("", 0)
    assert (tmp_path / "run/train/pretrain/checkpoints/step-00000010/COMPLETE").exists()
