"""A `crosschip train` as a user starts it: under way in a process, asked and struck from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
LIMIT_S = 500.0  # only against hanging


class Training:
    """A `crosschip train` under way in a session of its own."""

    def __init__(self, recipe: Path, out: Path, num_ranks: int, *arguments: str) -> None:
        self.out = out
        self.said = out.with_name(f"{out.name}-{time.monotonic_ns()}.txt")
        command = [sys.executable, "-m", "crosschip", "train", str(recipe), "--out", str(out)]
        command += ["--nproc", str(num_ranks), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with self.said.open("w") as file:
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)

    def metrics(self, stage: str = "pretrain") -> list[dict[str, float]]:
        return lines(self.out / "train" / stage / "metrics.jsonl")

    def events(self, stage: str = "pretrain") -> dict[str, dict[str, Any]]:
        """The last event of each kind."""
        return {str(line["event"]): line for line in lines(self.out / "train" / stage / "events.jsonl")}

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: len(self.metrics()) >= step)

    def end(self) -> tuple[int, str]:
        """Exit code, and what was said."""
        return self.process.wait(LIMIT_S), self.said.read_text()

    def ranks(self) -> dict[int, int]:
        """Process id of each rank."""
        found = {}
        for agent in children(self.process.pid):
            for pid in children(agent):
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                found |= {int(item[5:]): pid for item in environment if item.startswith(b"RANK=")}
        return found

    def wait_until(self, is_so: Callable[[], bool], while_it_runs: bool = True) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not is_so():
            assert not while_it_runs or self.process.poll() is None, self.said.read_text()
            assert time.monotonic() < deadline, self.said.read_text()
            time.sleep(0.05)


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log, which may be growing."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def settings(*overrides: str) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]
