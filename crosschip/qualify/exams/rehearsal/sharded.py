"""The rehearsal with FSDP2: the small subject trained by two processes, each on a chip of the kind.

A single process never asks DTensor how an operator is split over ranks, so a vendor's operator without a sharding rule
shows up only here: on the first day of the real training, or now. What raises is tried on CPUs as well: what fails
there, too, is our defect and not the chip's.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from crosschip.qualify.environment import examination_environment
from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.peers import ON_HOST, chips_alike
from crosschip.qualify.finding import Finding
from crosschip.qualify.subjects.transformer_workload import TransformerWorkload
from crosschip.rundir import read_json

__all__ = ["NUM_RANKS", "SHARDED", "rehearse_sharded", "train_sharded"]

NUM_RANKS = 2
SHARDED = "rehearsal with FSDP2"  # the part's name
_NUM_STEPS = 3
_TIMEOUT_S = 60.0  # of a collective
_START_S = 120.0  # for processes to import torch on a busy machine
_LEAST_S = 20.0  # two imports of torch and three small steps on a machine that is not busy
_WHAT = "training by several ranks with FSDP2"
_POLL_S = 0.05
_ALIVE_EVERY_S = 5.0
_GRACE_S = 2.0  # for the other rank to say its part, too
_UNKNOWN = re.compile(r"Operator (\S+) does not have a sharding strategy registered")


def rehearse_sharded(context: ExamContext) -> None:
    """Let two ranks train, and report what they raise."""
    origin, dtype = context.subject.origin, context.trace.compute_dtype
    on_cpu = context.subject.workload(torch.device("cpu"), torch.float32, context.seed, small=True)
    if not isinstance(on_cpu, TransformerWorkload):
        context.journal.not_covered(f"{_WHAT}: the subject is not crosschip's own transformer")
        return
    chips = [context.chip_spec] * NUM_RANKS if context.chip.device.type in ON_HOST else chips_alike(context)[:NUM_RANKS]
    if len(chips) < NUM_RANKS:
        context.journal.not_covered(f"{_WHAT}: this machine has one chip of the kind")
        return
    if context.remaining_s < _LEAST_S:
        context.journal.not_covered(f"{_WHAT}: there was no time")
        return
    alive = lambda: context.journal.now(SHARDED)  # noqa: E731  # the ranks have a deadline of their own
    answers = train_sharded(chips, origin, dtype, context.seed, alive)
    context.journal.checked("train step with FSDP2", NUM_RANKS * _NUM_STEPS)
    trouble = _first_trouble(answers)
    if trouble is None:
        return
    on_cpus = train_sharded(["cpu"] * NUM_RANKS, origin, dtype, context.seed, alive)
    if _is_late(on_cpus):
        if _is_late(answers):
            context.journal.not_covered(f"{_WHAT}: this machine is too busy, CPUs did not get there either")
            return
    elif wrong := _first_trouble(on_cpus):
        raise RuntimeError(f"the rehearsal with FSDP2 fails on CPUs, too: {wrong}")
    beside = "two on CPUs were too slow to tell" if _is_late(on_cpus) else "two on CPUs do not"
    context.journal.finding(_finding(context, trouble, beside, answers))


def train_sharded(
    chips: Sequence[str], origin: str, dtype: str, seed: int, alive: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """Train on these chips, a rank on each; what each has answered: `losses`, what it `raised`, how it `died`, `late`.

    `alive` is called every few seconds meanwhile.

    A rank that was ended because another one had failed has an empty answer.
    """
    limit_s = _START_S + 2 * _TIMEOUT_S
    with tempfile.TemporaryDirectory(prefix="crosschip-fsdp2-") as name:
        answers = [Path(name) / f"rank-{rank}.json" for rank in range(len(chips))]
        logs = [answer.with_suffix(".log") for answer in answers]
        job = {"origin": origin, "dtype": dtype, "seed": seed, "num_steps": _NUM_STEPS, "timeout_s": _TIMEOUT_S}
        job |= {"parent": os.getpid(), "limit_s": limit_s}
        port = _free_port()
        processes = [
            _start(rank, chips, port, {**job, "chip_spec": chip}, answers[rank], logs[rank])
            for rank, chip in enumerate(chips)
        ]
        try:
            _wait(processes, limit_s, alive)
            unanswered = {"late": True} if not any(process.returncode for process in processes) else {}
            silent = [process.poll() is None for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [
            unanswered if is_silent else _answer(answer, log, process)
            for answer, log, process, is_silent in zip(answers, logs, processes, silent, strict=True)
        ]


def _start(
    rank: int, chips: Sequence[str], port: int, job: dict[str, Any], answer: Path, log: Path
) -> subprocess.Popen[bytes]:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(chips), "MASTER_PORT": port}
    environment = {**os.environ, **{key: str(value) for key, value in place.items()}, "MASTER_ADDR": "127.0.0.1"}
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    command = [sys.executable, "-m", "crosschip.qualify.exams.rehearsal.sharded_rank", json.dumps(job), str(answer)]
    with log.open("wb") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=examination_environment({**environment, "OMP_NUM_THREADS": "1"}),
        )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _wait(processes: Sequence[subprocess.Popen[bytes]], limit_s: float, alive: Callable[[], None]) -> None:
    """Until all have ended; once one has failed the others have a moment, as they wait for it in vain."""
    deadline, told_at = time.monotonic() + limit_s, -_ALIVE_EVERY_S
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        if any(process.returncode for process in processes):
            deadline = min(deadline, time.monotonic() + _GRACE_S)
        if time.monotonic() - told_at > _ALIVE_EVERY_S:
            told_at = time.monotonic()
            alive()
        time.sleep(_POLL_S)


def _answer(answer: Path, log: Path, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    if answer.exists():
        found: dict[str, Any] = read_json(answer)
        return found
    said = log.read_text(encoding="utf-8", errors="replace").strip()[-500:]
    return {"died": f"a rank ended with code {process.returncode} and no answer; its last words: {said or 'none'}"}


def _is_late(answers: Sequence[dict[str, Any]]) -> bool:
    return any("late" in answer for answer in answers)


def _first_trouble(answers: Sequence[dict[str, Any]]) -> str | None:
    return next((found for found in map(_trouble, answers) if found is not None), None)


def _trouble(answer: dict[str, Any]) -> str | None:
    """What is wrong with a rank, in words."""
    if "raised" in answer:
        return f"{answer['raised']}: {answer['message']} (at {answer['place']})"
    if "died" in answer:
        return str(answer["died"])
    if "late" in answer:
        return f"it hangs: no answer within {_START_S + 2 * _TIMEOUT_S:.0f} s"
    losses = answer.get("losses", [])
    return None if all(map(math.isfinite, losses)) else f"the losses are {losses}"


def _finding(context: ExamContext, trouble: str, beside: str, answers: list[dict[str, Any]]) -> Finding:
    missing = next((found[1] for each in answers if (found := _UNKNOWN.search(str(each.get("message", ""))))), None)
    told = f"DTensor has no sharding rule for {missing}: " if missing else ""
    return Finding(
        exam=context.exam,
        kind="software",
        verdict="FAIL",
        subject=missing or "a train step with FSDP2",
        check="fsdp2",
        message=f"{told}{NUM_RANKS} ranks that train one model with FSDP2 fail, and {beside}: {trouble}",
        measured=trouble,
        limit=f"{_NUM_STEPS} steps, as on CPUs",
        limit_source="the same steps of two ranks on CPUs",
        critical=True,
        severity=1000.0,
        details={"ranks": answers},
    )
