"""Temporary directories go with the block, and those of killed processes with the next one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from crosschip.handoff.scratch import scratch_directory

KILLED = """
import os, signal, sys
from pathlib import Path
from crosschip.handoff.scratch import scratch_directory
with scratch_directory(Path(sys.argv[1]), "big") as place:
    (place / "weights").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_swept_and_what_is_in_use_stays(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    (left,) = tmp_path.iterdir()
    assert (left / "weights").is_file()
    with scratch_directory(tmp_path, "big") as first:
        assert not left.exists()
        (first / "weights").touch()
        with scratch_directory(tmp_path, "big") as second:
            assert first != second
            assert (first / "weights").is_file(), "another process, or this one, still reads it"
        with scratch_directory(tmp_path, "other"):
            assert first.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_nothing_else_is_swept(tmp_path: Path) -> None:
    for name in (".big-mine", "big-1.held", ".bigger-1.held"):
        (tmp_path / name).mkdir()
    with scratch_directory(tmp_path, "big"):
        pass
    assert len(os.listdir(tmp_path)) == 3
