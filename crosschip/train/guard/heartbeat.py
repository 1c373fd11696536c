"""The heartbeat: a small mapped file in which a rank says what it is doing, and that the supervisor reads.

It is written by the training loop itself and by no thread, so that a loop that is stuck looks stuck, also where the
interpreter's lock is free and a thread would go on beating. A beat costs microseconds. No torch here.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import signal
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from crosschip.train.guard.allowances import SLACK_S, START, Allowances
from crosschip.train.guard.processes import SUPERVISOR, follow_supervisor, process_start

__all__ = ["DIRECTORY", "FIRST_S", "TRACED_STEPS", "Beat", "Heartbeat", "open_heartbeat", "read_beats", "stack_file"]

DIRECTORY = "CROSSCHIP_HEARTBEATS"  # the environment's name for the directory; it is set by the supervisor
FIRST_S = "CROSSCHIP_FIRST_S"  # JSON: by stage, the seconds of the first `COMPUTING` in the process before
TRACED_STEPS = "CROSSCHIP_TRACED_STEPS"  # how many steps from the start have their operators traced

SIZE = 4096
_MAGIC = b"CHIPBT01"
_HEAD = struct.Struct("<8sqqq")  # magic, rank, process id, its start time
# step, number of beats, when (monotonic), seconds until the next has to come, exit code (-1: none yet), stage, phase,
# seconds of the first pass
_BODY = struct.Struct("<qqddq32s32sd")
_COUNTER = struct.Struct("<Q")  # odd while the body is being written
_COUNTER_AT = _HEAD.size
_BODY_AT = _COUNTER_AT + _COUNTER.size
_OPERATOR = struct.Struct("<B119s")  # whether it has not come back yet, and its name
_OPERATOR_AT = _BODY_AT + _BODY.size
_NOT_LEFT = -1


@dataclass(frozen=True)
class Beat:
    """A rank's last beat. `beat_at` is in seconds of the machine's monotonic clock.

    `operator` is the last one that was called, where operators are traced, and `in_operator` says that it has not come
    back. `left_with` is the exit code with which the rank has said that it ends. `first_s`: see `Allowances`.
    """

    rank: int
    pid: int
    process_start: int
    stage: str
    phase: str
    step: int
    num_beats: int
    beat_at: float
    allowance_s: float
    operator: str
    in_operator: bool
    left_with: int | None
    first_s: float = 0.0

    def silent_s(self, now: float) -> float:
        """Seconds since the beat."""
        return now - self.beat_at

    def is_overdue(self, now: float) -> bool:
        """Whether the next beat should have come."""
        return self.silent_s(now) > self.allowance_s

    def silence(self, now: float, overdue: Sequence[Beat]) -> str:
        """How long it is silent; where only others are overdue, which wait for this rank, how long one of those is."""
        if self in overdue or not overdue:
            return f"silent for {self.silent_s(now):.1f} s, {self.allowance_s:.1f} s allowed"
        waiting = overdue[0]
        others = f"rank {waiting.rank} waits for it, {waiting.silence(now, overdue)}"
        return f"silent for {self.silent_s(now):.1f} s ({others})"


class Heartbeat:
    """The writing side. Without a file the beats go nowhere. `first_s`: see `FIRST_S`."""

    def __init__(
        self,
        path: Path | None,
        rank: int,
        start_allowance_s: float,
        slack_s: float = SLACK_S,
        first_s: Mapping[str, float] | None = None,
    ) -> None:
        self._first_s = first_s or {}
        self._map = _mapped(path)
        self._allowances = Allowances(start_allowance_s, slack_s)
        self._counter = self._num_beats = 0
        self._stage = b""
        self._exit_code = _NOT_LEFT
        pid = os.getpid()
        self.beat(START, 0)
        # The magic number comes last: a reader never takes a file that is being made for a rank's.
        _HEAD.pack_into(self._map, 0, _MAGIC, rank, pid, process_start(pid) or 0)

    def stage(self, name: str) -> None:
        """Name the stage that the beats from now on belong to; how long its phases take is not known yet."""
        self._stage = name.encode()
        self._allowances.forget(self._first_s.get(name, 0.0))

    def beat(self, phase: str, step: int, known_s: float = 0.0) -> None:
        """A phase of a step begins: `data`, `forward-backward`, `averaging`, `update`, `validation`, `save`, ...

        `known_s`: see `Allowances.begin`.
        """
        now = time.monotonic()
        allowance_s = self._allowances.begin(phase, step, now, known_s)
        self._num_beats += 1
        self._write(step, now, allowance_s, phase)

    def renew(self, more_s: float = 0.0) -> None:
        """The phase goes on, with the same time again and `more_s` seconds: something is seen to live, be it another
        process that is waited for."""
        step, _, _, allowance_s, _, _, phase, _ = _BODY.unpack_from(self._map, _BODY_AT)
        self._num_beats += 1
        self._write(step, time.monotonic(), allowance_s + more_s, _text(phase))

    def leave(self, exit_code: int, allowance_s: float = 60.0) -> None:
        """Say that the process ends with this exit code, for which it has `allowance_s` seconds."""
        self._exit_code = exit_code
        self._num_beats += 1
        step = _BODY.unpack_from(self._map, _BODY_AT)[0]
        self._write(step, time.monotonic(), allowance_s, "end")

    def enter_operator(self, name: bytes) -> None:
        """An operator is called."""
        _OPERATOR.pack_into(self._map, _OPERATOR_AT, 1, name)

    def leave_operator(self) -> None:
        """It has come back."""
        self._map[_OPERATOR_AT] = 0

    def _write(self, step: int, now: float, allowance_s: float, phase: str) -> None:
        self._counter += 2
        _COUNTER.pack_into(self._map, _COUNTER_AT, self._counter - 1)
        _BODY.pack_into(
            self._map,
            _BODY_AT,
            step,
            self._num_beats,
            now,
            allowance_s,
            self._exit_code,
            self._stage,
            phase.encode(),
            self._allowances.first_s,
        )
        _COUNTER.pack_into(self._map, _COUNTER_AT, self._counter)


def _mapped(path: Path | None) -> mmap.mmap:
    if path is None:
        return mmap.mmap(-1, SIZE)
    path.unlink(missing_ok=True)  # an orphan of an earlier run may still write into the old file
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        # Blocks of its own: a write into a mapped hole ends the process (SIGBUS) once the disk is full.
        os.posix_fallocate(descriptor, 0, SIZE)
        return mmap.mmap(descriptor, SIZE)
    finally:
        os.close(descriptor)


def stack_file(directory: Path, rank: int) -> Path:
    """Where a rank's Python stack comes when it gets SIGUSR1."""
    return directory / f"stack-{rank}"


def open_heartbeat(start_allowance_s: float, slack_s: float = SLACK_S) -> Heartbeat:
    """This rank's heartbeat, in the directory that the supervisor has named; without a supervisor one that nobody sees.

    Under a supervisor the process also ends when the supervisor does, and answers SIGUSR1 with its stack, which works
    while a C call holds the interpreter's lock. Call it early, in the main thread. The other arguments are those of
    `Allowances`.
    """
    rank = int(os.environ.get("RANK", "0"))
    named = os.environ.get(DIRECTORY)
    if named is None:
        return Heartbeat(None, rank, start_allowance_s)
    directory = Path(named)
    if SUPERVISOR in os.environ:
        follow_supervisor(os.environ[SUPERVISOR])
    # Kept open as long as the process lives: the handler writes to the descriptor.
    faulthandler.register(signal.SIGUSR1, file=stack_file(directory, rank).open("w"), all_threads=True)
    first_s = json.loads(os.environ.get(FIRST_S, "{}"))
    return Heartbeat(directory / f"heartbeat-{rank}", rank, start_allowance_s, slack_s, first_s)


def read_beats(directory: Path, before: Sequence[Beat] = ()) -> list[Beat]:
    """The last beat of every rank that has one, by rank.

    For a rank that was killed or stopped while it wrote, it is the beat that was read `before`.
    """
    found = {beat.rank: beat for beat in before}
    for path in directory.glob("heartbeat-*"):
        beat = _read(path)
        if beat is not None:
            found[beat.rank] = beat
    return [found[rank] for rank in sorted(found)]


def _read(path: Path) -> Beat | None:
    """One rank's; None while the file is being made, or when no whole beat was seen in a few tries."""
    for _ in range(5):
        try:
            data, again = path.read_bytes(), path.read_bytes()
        except OSError:
            return None
        if min(len(data), len(again)) < SIZE or data[:8] != _MAGIC:
            return None
        counters = [_COUNTER.unpack_from(each, _COUNTER_AT)[0] for each in (data, again)]
        if counters[0] == counters[1] and counters[0] % 2 == 0:  # nobody has written in between
            return _decoded(data)
    return None


def _decoded(data: bytes) -> Beat:
    _, rank, pid, start = _HEAD.unpack_from(data)
    step, num_beats, beat_at, allowance_s, exit_code, stage, phase, first_s = _BODY.unpack_from(data, _BODY_AT)
    in_operator, operator = _OPERATOR.unpack_from(data, _OPERATOR_AT)
    return Beat(
        rank=rank,
        pid=pid,
        process_start=start,
        stage=_text(stage),
        phase=_text(phase),
        step=step,
        num_beats=num_beats,
        beat_at=beat_at,
        allowance_s=allowance_s,
        operator=_text(operator),
        in_operator=bool(in_operator),
        left_with=None if exit_code == _NOT_LEFT else exit_code,
        first_s=first_s,
    )


def _text(padded: bytes) -> str:
    return padded.rstrip(b"\0").decode(errors="replace")
