"""Groups as real processes, a lighthouse, and what they wrote."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from crosschip.train.outer.lighthouse import Lighthouse
from tests.train.outer.group_process import Options

ROOT = Path(__file__).parents[3]
HANG_S = 120.0


def wait_until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {HANG_S:.0f} s for {what}"
        time.sleep(0.05)


class Group:
    """A process of `group_process.py`."""

    def __init__(self, options: Options) -> None:
        self.options, self.out = options, Path(options.out)
        self._read_from = self.out.stat().st_size if self.out.exists() else 0
        with self.out.with_suffix(".err").open("a") as errors:
            self.process = subprocess.Popen(
                options.arguments(),
                cwd=ROOT,
                stdout=errors,
                stderr=errors,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            )

    def lines(self) -> list[dict[str, Any]]:
        if not self.out.exists():
            return []
        with self.out.open() as file:
            file.seek(self._read_from)
            return [json.loads(line) for line in file.read().splitlines(keepends=True) if line.endswith("\n")]

    def steps(self) -> dict[int, dict[str, Any]]:
        return {line["step"]: line for line in self.lines() if "step" in line}

    def events(self) -> list[str]:
        return [line["event"] for line in self.lines() if "event" in line]

    def last_step(self) -> int:
        return max(self.steps(), default=0)

    @property
    def sidecar(self) -> int:
        return int(next(line["sidecar"] for line in self.lines() if "sidecar" in line))

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: self.last_step() >= step or self.process.poll() is not None, f"step {step} of {self.out}")
        assert self.last_step() >= step, self.told()

    def told(self) -> str:
        return "\n".join(
            f"{path}: {path.read_text()}" for path in (self.out.with_suffix(".err"), self.out.with_suffix(".log"))
        )

    def wait(self) -> int:
        try:
            return self.process.wait(HANG_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running: {self.told()}") from None

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def lighthouse() -> Iterator[Lighthouse]:
    made = Lighthouse()
    yield made
    made.close()


@pytest.fixture
def start(tmp_path: Path, lighthouse: Lighthouse) -> Iterator[Callable[..., Group]]:
    """`start(group=0, steps=10, ...)`: a group that trains; all are ended after the test."""
    started: list[Group] = []

    def begin(**words: Any) -> Group:
        name = f"group-{words['group']}-{words.get('rank', 0)}.jsonl"
        words = {"out": str(tmp_path / name), "lighthouse": lighthouse.address, **words}
        group = Group(Options(**words))
        started.append(group)
        return group

    yield begin
    for group in started:
        if group.process.poll() is None:
            group.process.send_signal(signal.SIGCONT)
            group.kill()
    for pid in {line["sidecar"] for group in started for line in group.lines() if "sidecar" in line}:
        wait_until_gone(pid)  # with its trainer


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def wait_until_gone(pid: int) -> None:
    wait_until(lambda: is_gone(pid), f"process {pid} to be gone")
