"""The supervisor: starts the training, watches the heartbeats of its ranks, ends what hangs, starts it again.

It is a process of its own without torch, beside the ranks and independent of their collectives' time-outs. Every remedy
is bounded: after `max_restarts` attempts without a new checkpoint it ends with a diagnosis.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from crosschip.errors import EXIT_FAIL, CrosschipError, RunDirectoryError
from crosschip.recipe import GuardSettings
from crosschip.train.guard.attempt import Attempt, Launch
from crosschip.train.guard.heartbeat import read_beats
from crosschip.train.guard.interruption import Interruption
from crosschip.train.guard.observed import Event
from crosschip.train.guard.processes import is_alive
from crosschip.train.guard.restarts import Ended, Restarts

__all__ = ["Launch", "NoProgressError", "SupervisedRun", "supervise", "wait_for_orphans"]

TRACED_STEPS_AFTER_HANG = 20
_LOCK = "supervisor.lock"  # among the heartbeats; held as long as somebody supervises
_ORPHANS_S = 15.0
_POLL_S = 0.1


class NoProgressError(CrosschipError):
    """Attempts that all ended without a new checkpoint."""

    exit_code = EXIT_FAIL


@dataclass(frozen=True)
class SupervisedRun:
    """What is supervised, as functions, so that this module knows neither the recipe nor checkpoints.

    `launch(attempt)` says what to start: attempt 0, and from 1 on with --resume. `heartbeats` is a directory on this
    machine. `committed()` is the number of steps that complete checkpoints hold, over all stages. `tell(stage, event)`
    writes an event to the log of a stage and to the terminal; the stage is empty when no rank has named one yet.
    """

    launch: Callable[[int], Launch]
    heartbeats: Path
    committed: Callable[[], int]
    tell: Callable[[str, Event], None]
    settings: GuardSettings
    go_on_with: str = "--resume"  # what a person types to go on after a stop


def supervise(run: SupervisedRun) -> int:
    """Run to the end, with as many restarts as progress is worth; returns the exit code of the training.

    The first stop signal (`train.signals`) is handed on to every rank for an orderly end, the second ends all at once.
    Where that end does not come in order, it is told, and the exit code is the real one instead of the signal's. When
    this process is killed, the kernel ends the ranks. Call it in the main thread.

    Raises:
        NoProgressError: more than `max_restarts` attempts in a row brought no new checkpoint.
        RunDirectoryError: ranks of an earlier run are still there, or another process supervises this one.
    """
    run.heartbeats.mkdir(parents=True, exist_ok=True)
    restarts = Restarts(run.settings.max_restarts, run.committed())
    number = traced_steps = 0
    first_s: dict[str, float] = {}
    with _supervising(run.heartbeats), Interruption() as interruption:
        while True:
            wait_for_orphans(run.heartbeats)
            attempt = Attempt(run.launch(number), run.heartbeats, run.settings.start_allowance_s, interruption)
            ended = attempt.run(traced_steps, first_s)
            first_s |= attempt.first_s()
            if ended.is_final:
                _tell_of_the_end(run, ended, interruption.received is not None)
                return ended.exit_code
            _go_on_or_stop(run, restarts, ended)
            interruption.wait(restarts.wait_s())
            if interruption.received is not None:
                return interruption.exit_code
            traced_steps = TRACED_STEPS_AFTER_HANG if ended.event == "hang" else 0
            number += 1


@contextmanager
def _supervising(heartbeats: Path) -> Iterator[None]:
    """Keep out whoever starts the same run meanwhile: its ranks would write the heartbeats that are read here.

    The run's own lock comes too late, as a rank takes it after its first beat.

    Raises:
        RunDirectoryError: another process supervises the run.
    """
    with (heartbeats / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunDirectoryError(
                f"another process trains in {heartbeats.parent} ({lock.name} is held)",
                f"wait for it or end it: fuser {lock.name} names it",
            ) from None
        yield


def _tell_of_the_end(run: SupervisedRun, ended: Ended, is_interrupted: bool) -> None:
    """What ended by itself has told of it, but no rank says that the save which a signal asked for is missing."""
    if ended.event == "hang" or (is_interrupted and ended.event not in ("interrupted", "finished")):
        run.tell(ended.stage, Event(ended.step, ended.event, _line(ended), f"ended with exit code {ended.exit_code}"))


def _go_on_or_stop(run: SupervisedRun, restarts: Restarts, ended: Ended) -> None:
    may_go_on = restarts.may_try_again(ended, run.committed())
    action = restarts.words() if may_go_on else "stopped"
    run.tell(ended.stage, Event(ended.step, ended.event, _line(ended), action))
    if not may_go_on:
        raise NoProgressError(restarts.diagnosis(), _remedy(ended, run.go_on_with))


def _line(ended: Ended) -> str:
    return f"{ended.where}: {ended.detail}"


def _remedy(ended: Ended, go_on_with: str) -> str:
    what = "mend what the rank says above"
    if ended.event == "hang":
        what = "show the vendor that line or operator; `crosschip qualify` examines the chip"
    elif ended.event == "out-of-memory":
        what = "lower batch_size or raise gradient_accumulation, or give the run more memory"
    return f"{what}; then go on with {go_on_with}"


def wait_for_orphans(heartbeats: Path, patience_s: float = _ORPHANS_S) -> None:
    """Wait for ranks of an earlier run, whose supervisor was killed, to end; then clear the directory.

    Raises:
        RunDirectoryError: one of them is still there after `patience_s`.
    """
    deadline = time.monotonic() + patience_s
    beats = read_beats(heartbeats)
    while left := [beat for beat in beats if is_alive(beat.pid, beat.process_start)]:
        if time.monotonic() > deadline:
            told = ", ".join(f"rank {beat.rank} (process {beat.pid})" for beat in left)
            raise RunDirectoryError(
                f"{told} of an earlier run is still there ({heartbeats})",
                f"wait for it or end it: kill {' '.join(str(beat.pid) for beat in left)}",
            )
        time.sleep(_POLL_S)
    for pattern in ("heartbeat-*", "stack-*"):
        for path in heartbeats.glob(pattern):
            path.unlink()
