"""Engines as processes: started, watched and ended, whatever they do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from crosschip.engines import STILL_STARTING, EngineCommand, engine_command, running_engine
from crosschip.errors import EngineError

# Writes its own number and its child's, as an engine with workers does, and never answers.
SILENT = (
    "import os, pathlib, subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "pathlib.Path(sys.argv[1], 'pids').write_text(f'{os.getpid()} {child.pid}')\n"
    "time.sleep(600)\n"
)


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(*pids: int) -> None:
    until = time.monotonic() + 30
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < until, "an engine outlived its rehearsal"
        time.sleep(0.05)


def python(program: str) -> EngineCommand:
    return EngineCommand((sys.executable, "-c", program, "{model}", "{port}"))


def test_an_engine_that_ends_says_how_and_what_it_printed(tmp_path: Path) -> None:
    for program, how in (("print('no such layer'); exit(3)", "exit code 3"), ("import os; os.abort()", "SIGABRT")):
        with running_engine(python(program), tmp_path, tmp_path / "log", 60.0) as engine:
            assert not engine.is_up
            assert how in engine.ended
    with running_engine(python("print('no such layer'); exit(3)"), tmp_path, tmp_path / "log", 60.0) as engine:
        assert engine.read_log() == "no such layer\n"


def test_an_engine_that_never_answers_is_ended_with_its_children(tmp_path: Path) -> None:
    with running_engine(python(SILENT), tmp_path, tmp_path / "log", 2.0) as engine:
        assert engine.ended.startswith(STILL_STARTING)
        engine_pid, child_pid = map(int, (tmp_path / "pids").read_text().split())
        assert is_running(engine_pid)
    wait_until_gone(engine_pid, child_pid)


def test_an_engine_does_not_outlive_a_killed_rehearsal(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys; from crosschip.engines import EngineCommand, running_engine\n"
        f"place = pathlib.Path({str(tmp_path)!r})\n"
        f"command = EngineCommand((sys.executable, '-c', {SILENT!r}, '{{model}}'))\n"
        "with running_engine(command, place, place / 'log', 300.0): pass\n"
    )
    rehearsal = subprocess.Popen([sys.executable, "-c", program])
    until = time.monotonic() + 60
    while not (tmp_path / "pids").exists() or len((tmp_path / "pids").read_text().split()) < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    engine_pid, child_pid = map(int, (tmp_path / "pids").read_text().split())
    rehearsal.send_signal(signal.SIGKILL)
    rehearsal.wait()
    wait_until_gone(engine_pid)
    os.kill(child_pid, signal.SIGKILL)  # what an engine's own workers do without it is the engine's matter


@pytest.mark.parametrize(
    ("engine", "more", "message"),
    [
        ("vllm", {}, "--engine-python"),
        ("llamacpp", {}, "--engine-python"),
        ("sglang", {}, "not known here"),
        ("command", {}, "with {model} and {port}"),
        ("command", {"template": "serve {model}"}, "with {model} and {port}"),
        ("vllm", {"python": Path("/nowhere/python")}, "is no program"),
    ],
)
def test_what_cannot_be_started_is_refused_with_the_remedy(
    engine: str, more: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROSSCHIP_ENGINES", str(tmp_path))  # where there are none
    with pytest.raises(EngineError) as refused:
        engine_command(engine, **more)
    assert message in str(refused.value)


def test_commands_of_engines_in_environments_of_their_own_need_nothing_of_crosschip() -> None:
    for engine in ("vllm", "llamacpp", "transformers"):
        words = engine_command(engine, Path(sys.executable), max_length=512).filled(Path("/m"), 8001)
        assert words[0] == sys.executable
        assert "crosschip" not in words
        assert "8001" in words
