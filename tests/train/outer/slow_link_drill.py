"""Two groups of `crosschip train`, each in a network namespace, whose link really becomes slow. Not a test itself."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosschip.train.drill.score import ALARMS
from tests.qualify.exams.links.namespaces import ADDRESS_A, MASTER_PORT, run, shaped_link
from tests.train.launched import ROOT, lines

RATE_MBIT, DELAY_MS = 100, 5.0
POLL_S = 0.2
LIMIT_S = 900.0  # only against hanging


@dataclass(frozen=True)
class Outcome:
    """What came of it. `event` is the first that tells of the link, `latency_s` after it became slow.

    `alarms_before` were told while the link was as it should be, `steps_after` made when it was so again.
    """

    event: dict[str, Any]
    latency_s: float
    alarms_before: list[dict[str, Any]]
    steps_before: int
    steps_slow: int
    steps_after: int


def drill_slow_link(
    recipe: Path, directory: Path, settings: Sequence[str], slow_mbit: float, num_clean_steps: int
) -> Outcome:
    """Train two groups over 100 Mbit/s, let the link become slow until that is told, and well again.

    Raises:
        AssertionError: a group ended, or nothing was told in `LIMIT_S`.
    """
    with shaped_link(RATE_MBIT, DELAY_MS) as nodes, _lighthouse(nodes[0]), _groups(recipe, directory, settings, nodes):
        stages = [directory / f"group-{number}" / "train" / "pretrain" for number in (0, 1)]

        def steps() -> int:
            return min(len(lines(stage / "metrics.jsonl")) for stage in stages)

        def alarms() -> list[dict[str, Any]]:
            found = [event for stage in stages for event in lines(stage / "events.jsonl")]
            return [event for event in found if event["event"] in ALARMS]

        _wait(lambda: steps() >= num_clean_steps, directory)
        before, alarms_before = steps(), alarms()
        _shape(nodes, slow_mbit)
        struck = time.monotonic()
        _wait(lambda: len(alarms()) > len(alarms_before), directory)
        latency_s = time.monotonic() - struck
        event = next(each for each in alarms() if each not in alarms_before)
        slow = steps()
        _shape(nodes, RATE_MBIT)
        _wait(lambda: steps() >= slow + num_clean_steps, directory)
        return Outcome(event, latency_s, alarms_before, before, slow - before, steps() - slow)


def _shape(nodes: Sequence[str], rate_mbit: float) -> None:
    for node in nodes:
        run("ip", "netns", "exec", node, "tc", "qdisc", "change", "dev", "eth0", "root", "tbf",
            "rate", f"{rate_mbit * 1000:.0f}kbit", "burst", "10kb", "limit", "8mb")  # fmt: skip


@contextlib.contextmanager
def _lighthouse(node: str) -> Iterator[None]:
    words = ["--bind", f"{ADDRESS_A}:{MASTER_PORT}"]
    with _started(["ip", "netns", "exec", node, sys.executable, "-m", "crosschip.train.outer.lighthouse", *words]) as p:
        assert p.stdout is not None
        p.stdout.readline()
        yield


@contextlib.contextmanager
def _groups(recipe: Path, directory: Path, settings: Sequence[str], nodes: Sequence[str]) -> Iterator[None]:
    words = ["groups.num_groups=2", f"groups.lighthouse=http://{ADDRESS_A}:{MASTER_PORT}", *settings]
    overrides = [part for word in words for part in ("--set", word)]
    with contextlib.ExitStack() as stack:
        for number, node in enumerate(nodes):
            command = [sys.executable, "-m", "crosschip", "train", str(recipe), "--group", str(number), *overrides]
            command += ["--out", str(directory / f"group-{number}")]
            log = stack.enter_context((directory / f"group-{number}.log").open("wb"))
            stack.enter_context(_started(["ip", "netns", "exec", node, *command], log))
        yield


@contextlib.contextmanager
def _started(command: Sequence[str], output: Any = subprocess.PIPE) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.kill()  # `ip netns exec` becomes its command; the ranks follow their supervisor
        process.wait()


def _wait(is_so: Callable[[], bool], directory: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not is_so():
        told = "\n".join(path.read_text(errors="replace")[-2000:] for path in directory.glob("*.log"))
        assert time.monotonic() < deadline, told
        time.sleep(POLL_S)
