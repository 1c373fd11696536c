"""A process ends when the one that started it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.train.group.conftest import ROOT

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(child.pid, flush=True)
time.sleep(600)
"""
CHILD = "import time; {watch}; print('ready', flush=True); time.sleep(600)"
WATCH = "from crosschip.orphans import end_with_parent; end_with_parent()"


def ends(pid: int, limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        with open(f"/proc/{pid}/stat") as stat:
            if stat.read().rpartition(")")[2].split()[0] == "Z":
                return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(("watch", "limit_s", "ended"), [(WATCH, 60.0, True), ("pass", 1.0, False)])
def test_the_child_of_a_killed_process_ends(watch: str, limit_s: float, ended: bool) -> None:
    """The second case is the control: without watching its parent, it lives on."""
    command = [sys.executable, "-c", PARENT, CHILD.format(watch=watch)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert parent.stdout is not None
    said = [parent.stdout.readline().strip() for _ in range(2)]
    child = int(next(line for line in said if line != "ready"))
    try:
        parent.kill()
        parent.wait()
        assert ends(child, limit_s) == ended
    finally:
        if not ended:
            os.kill(child, signal.SIGKILL)


def test_a_parent_that_is_gone_already_is_noticed() -> None:
    code = "from crosschip.orphans import end_with_parent; end_with_parent(1 << 22)"
    ended = subprocess.run([sys.executable, "-c", code], check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert ended.returncode == -signal.SIGKILL


def test_neither_launching_nor_watching_imports_torch() -> None:
    modules = ("launch", "layout", "rank", "agent")
    code = (
        f"import sys, {', '.join(f'crosschip.train.group.{name}' for name in modules)}; print('torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert ended.stdout.strip() == "False"
