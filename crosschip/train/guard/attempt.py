"""One start of the training: watched until nothing of it is left. No torch here."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from crosschip.errors import EXIT_FAIL
from crosschip.train.guard.allowances import SLACK_S, START
from crosschip.train.guard.blame import SilentRank, blame
from crosschip.train.guard.heartbeat import DIRECTORY, FIRST_S, TRACED_STEPS, Beat, read_beats, stack_file
from crosschip.train.guard.interruption import Interruption
from crosschip.train.guard.processes import DeathWatch, end_all, num_oom_kills, process_state, start_marked
from crosschip.train.guard.restarts import INTERRUPTED, Ended, classify_death, first_failure
from crosschip.train.guard.starved import CoreWaits
from crosschip.train.signals import STOP_SIGNALS

__all__ = ["Attempt", "Launch"]

_POLL_S = 0.1
_HELD_UP_S = 1.0  # a poll that takes this long says that this process stood still
_STACK_S = 1.0  # how long a rank has to write its stack
_GRACE_S = 3.0  # how long the other ranks have to say something after the first has failed
_END_S = 60.0  # how long processes may take to die of SIGKILL; a driver can hold them


@dataclass(frozen=True)
class Launch:
    """What to start: a process, or a launcher of `num_ranks` ranks. `environment` is the whole of it."""

    argv: Sequence[str]
    environment: Mapping[str, str]
    num_ranks: int = 1


class Attempt:
    """Start, watch, end. `start_allowance_s` is how long the ranks may take to their first beat."""

    def __init__(self, launch: Launch, heartbeats: Path, start_allowance_s: float, interruption: Interruption) -> None:
        self._launch = launch
        self._heartbeats = heartbeats
        self._start_allowance_s = start_allowance_s
        self._interruption = interruption
        self._mark = uuid.uuid4().hex
        self._beats: list[Beat] = []
        self._is_handed_on = False
        self._failed_at: float | None = None
        self._core_waits = CoreWaits()
        self._oom_kills = num_oom_kills()

    def first_s(self) -> dict[str, float]:
        """The longest that a rank's first pass has taken, by the stage in which the attempt has ended."""
        return {beat.stage: max(each.first_s for each in self._beats) for beat in self._beats if beat.first_s}

    def run(self, traced_steps: int, first_s: Mapping[str, float]) -> Ended:
        """Come back when the training has ended, by itself or by this process, and no process of it is left.

        `first_s` is what earlier attempts have told.
        """
        environment = {
            **self._launch.environment,
            DIRECTORY: str(self._heartbeats),
            TRACED_STEPS: str(traced_steps),
            FIRST_S: json.dumps(dict(first_s)),
        }
        process = start_marked(self._launch.argv, environment, self._mark)
        try:
            with DeathWatch() as deaths:
                ended = self._watch(process, deaths)
        finally:
            left = end_all(process, self._mark, _END_S)
        if left:
            stuck = f"{ended.detail}; and processes {left} do not die of SIGKILL, as a driver holds them"
            ended = dataclasses.replace(ended, detail=stuck, exit_code=EXIT_FAIL, is_final=True)
        return ended

    def _watch(self, process: subprocess.Popen[bytes], deaths: DeathWatch) -> Ended:
        started = looked = not_before = time.monotonic()
        while True:
            deaths.wait(_POLL_S)
            now = time.monotonic()
            if now - looked > _HELD_UP_S:  # the machine was paused: so were the ranks
                not_before = now + (now - looked) + SLACK_S
            looked = now
            self._beats = read_beats(self._heartbeats, self._beats)
            deaths.watch((beat.rank, beat.pid) for beat in self._beats)
            deaths.wait(0.0)  # a rank that has died since its first beat; after the next line nobody knows of what
            launcher = process.poll()
            if launcher is not None or self._has_failed(deaths, now):
                return self._ended(process.pid, launcher, deaths)
            if self._interruption.is_urgent:
                return Ended("interrupted", "ended at once by a second signal", self._interruption.exit_code, True)
            self._hand_on_signal(process.pid)
            hung = None if deaths.deaths or now < not_before else self._hung(now, now - started)
            if hung is not None:
                return hung

    def _has_failed(self, deaths: DeathWatch, now: float) -> bool:
        """Whether a rank has failed so long ago that the others have to be ended."""
        good = (0, *INTERRUPTED)
        if all(self._code_of(death.rank, death.exit_code) in good for death in deaths.deaths):
            return False
        self._failed_at = self._failed_at or now
        return now - self._failed_at > _GRACE_S

    def _code_of(self, rank: int, seen: int | None) -> int | None:
        """The exit code that was seen; where that is good or nobody saw it, the one that the rank has announced.

        A rank that was interrupted may end with 0, so that its launcher does not take the others down meanwhile.
        """
        announced = next((beat.left_with for beat in self._beats if beat.rank == rank), None)
        return seen or (seen if announced is None else announced)

    def _hand_on_signal(self, launched: int) -> None:
        """Once, and to the ranks themselves: a launcher would take them down one after the other."""
        if self._interruption.received is None or self._is_handed_on:
            return
        self._is_handed_on = True
        for pid in {beat.pid for beat in self._beats} or {launched}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, self._interruption.received)

    def _ended(self, launched: int, launcher: int | None, deaths: DeathWatch) -> Ended:
        """How it ended, by the first rank that failed, else by the launcher."""
        codes = [
            (death.rank, launcher if death.pid == launched else self._code_of(death.rank, death.exit_code))
            for death in deaths.deaths
        ]
        rank, code = first_failure(codes, launcher)
        now_oom_kills = num_oom_kills()
        ran_out = None not in (self._oom_kills, now_oom_kills) and now_oom_kills != self._oom_kills
        is_announced = code is not None and code in {beat.left_with for beat in self._beats}
        kind, detail, is_final = classify_death(code, is_announced, ran_out)
        ended = Ended(kind, detail, EXIT_FAIL if code is None else code, is_final)
        if self._interruption.received is not None and code != 0:
            ended = self._after_signal(ended, rank)
        return self._located(rank, ended)

    def _after_signal(self, ended: Ended, rank: int | None) -> Ended:
        """The same where a signal was handed on: as orderly as it was, and final.

        A rank that dies of the signal while it is still beginning has nothing to save. Any other end is told as what
        it is: the ranks were training or saving.
        """
        known = [beat for beat in self._beats if rank in (None, beat.rank)]
        has_saved = any(beat.left_with in INTERRUPTED for beat in known)
        was_beginning = all(beat.phase == START for beat in known)
        if has_saved or (was_beginning and ended.exit_code in (*INTERRUPTED, *(-number for number in STOP_SIGNALS))):
            return dataclasses.replace(
                ended, event="interrupted", exit_code=self._interruption.exit_code, is_final=True
            )
        return dataclasses.replace(
            ended,
            event="killed" if ended.event == "interrupted" else ended.event,
            detail=f"after signal {self._interruption.received}, nothing was saved: {ended.detail}",
            exit_code=ended.exit_code if ended.exit_code > 0 else 128 - ended.exit_code,
            is_final=True,
        )

    def _hung(self, now: float, running_s: float) -> Ended | None:
        """The rank that hangs, when one is overdue or has not begun in time."""
        missing = set(range(self._launch.num_ranks)) - {beat.rank for beat in self._beats}
        if missing and running_s > self._start_allowance_s:
            detail = f"it has not begun within {self._start_allowance_s:.0f} s"
            return Ended("hang", detail, EXIT_FAIL, False, rank=min(missing), phase="start")
        self._core_waits.look(self._beats, now)
        overdue = [beat for beat in self._beats if beat.is_overdue(now)]
        if not any(beat.is_overdue(now - self._core_waits.since(beat)) for beat in overdue):
            return None
        culprit = blame([self._look_at(beat, now) for beat in self._beats])
        beat = next(each for each in self._beats if each.rank == culprit.rank)
        ended = Ended("hang", f"{beat.silence(now, overdue)}: {culprit.place()}", EXIT_FAIL, False)
        if beat.left_with is not None:  # all is done, and only the process does not go away
            ended = dataclasses.replace(ended, exit_code=beat.left_with, is_final=beat.left_with == 0)
        elif self._interruption.received is not None:
            ended = self._after_signal(ended, culprit.rank)
        return self._located(culprit.rank, ended)

    def _look_at(self, beat: Beat, now: float) -> SilentRank:
        state = process_state(beat.pid)
        answers = state not in ("T", "t", "Z", None)
        return SilentRank(
            rank=beat.rank,
            phase=beat.phase,
            step=beat.step,
            silent_s=beat.silent_s(now),
            state=state,
            stack=_ask_for_stack(self._heartbeats, beat) if answers else "",
            operator=beat.operator if beat.in_operator else "",
        )

    def _located(self, rank: int | None, ended: Ended) -> Ended:
        """The same, with what the beats know about the rank; without a rank, about the run."""
        known = [beat for beat in self._beats if rank in (None, beat.rank)]
        if not known:
            return dataclasses.replace(ended, rank=rank)
        beat = max(known, key=lambda each: each.step)
        phase = "" if rank is None else beat.phase
        return dataclasses.replace(ended, rank=rank, phase=phase, stage=beat.stage, step=beat.step)


def _ask_for_stack(heartbeats: Path, beat: Beat) -> str:
    """What the rank's signal handler writes, when it has written all; empty when it does not answer."""
    path = stack_file(heartbeats, beat.rank)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(beat.pid, signal.SIGUSR1)
    deadline = time.monotonic() + _STACK_S
    text = ""
    while time.monotonic() < deadline:
        time.sleep(0.05)
        with contextlib.suppress(OSError):
            before, text = text, path.read_text(encoding="utf-8", errors="replace")
            if text and text == before:
                break
    return text
