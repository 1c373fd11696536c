"""Processes seen from outside: starting them so that none outlives its supervisor, ending all of them, and how each
ended. Linux; what another system does not tell is None. No torch here.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from crosschip.orphans import PARENT, end_with_parent

__all__ = [
    "MARK",
    "SUPERVISOR",
    "Death",
    "DeathWatch",
    "end_all",
    "follow_supervisor",
    "is_alive",
    "num_oom_kills",
    "process_start",
    "process_state",
    "start_marked",
    "this_process",
]

MARK = "CROSSCHIP_SUPERVISED"  # every process that a supervisor has started, directly or not, inherits its mark
SUPERVISOR = "CROSSCHIP_SUPERVISOR"  # who that is: process id and start time

_POLL_S = 0.02


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the name, which may hold any character; the first is field 3 of proc(5)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None


def process_start(pid: int) -> int | None:
    """The kernel's start time of a process, so that a reused process id is not taken for it."""
    fields = _stat(pid)
    return None if fields is None else int(fields[19])


def process_state(pid: int) -> str | None:
    """The kernel's letter: R runs, S sleeps, D waits for a disk or a driver, T stopped, Z dead; None when gone."""
    fields = _stat(pid)
    return None if fields is None else fields[0]


def is_alive(pid: int, start: int) -> bool:
    """Whether the process that was started then is still there and not dead."""
    fields = _stat(pid)
    return fields is not None and int(fields[19]) == start and fields[0] not in "ZX"


def this_process() -> str:
    """This process as `SUPERVISOR` has it."""
    return f"{os.getpid()}:{process_start(os.getpid())}"


def follow_supervisor(supervisor: str) -> None:
    """Let this process end when its parent ends; call it in each rank, which may have a launcher between.

    A supervisor that is gone already ends it at once. The launcher ends with the supervisor in the same way.
    """
    end_with_parent()
    pid, start = supervisor.split(":")
    if start != "None" and not is_alive(int(pid), int(start)):
        os.kill(os.getpid(), signal.SIGKILL)


def start_marked(argv: Sequence[str], environment: Mapping[str, str], mark: str) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, so that a terminal's Ctrl-C reaches it through the supervisor only.

    It ends when the thread that started it ends: start it from the main thread.
    """
    parent = os.getpid()
    return subprocess.Popen(
        list(argv),
        env={**environment, MARK: mark, SUPERVISOR: this_process(), PARENT: str(parent)},
        start_new_session=True,
        preexec_fn=functools.partial(end_with_parent, parent),
    )


def _marked(mark: str) -> list[int]:
    """Every living process with the mark. A launcher may give its ranks sessions of their own, the mark stays."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            carries = wanted in (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # gone meanwhile, or somebody else's
            continue
        if carries and process_state(int(entry.name)) not in ("Z", "X", None):
            found.append(int(entry.name))
    return found


def end_all(process: subprocess.Popen[bytes], mark: str, patience_s: float) -> list[int]:
    """Kill the process and all that carry its mark; returns those still there after `patience_s` (stuck in a driver).

    None is asked: a held interpreter lock, a stopped process and a full pipe all ignore a polite signal.
    """
    deadline = time.monotonic() + patience_s
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    while True:
        process.poll()  # takes away the dead
        left = _marked(mark)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not left and process.poll() is not None:
            return []
        if time.monotonic() > deadline:
            return left
        time.sleep(_POLL_S)


def num_oom_kills() -> int | None:
    """How many processes the kernel has killed because memory ran out, on this machine or in this container."""
    counts = []
    for path, name in (("/proc/vmstat", "oom_kill"), ("/sys/fs/cgroup/memory.events", "oom_kill")):
        with contextlib.suppress(OSError, ValueError):
            for line in Path(path).read_text(encoding="ascii").splitlines():
                key, value = line.split()
                if key == name:
                    counts.append(int(value))
    return sum(counts) if counts else None


@dataclass(frozen=True)
class Death:
    """How a rank ended: its exit code, negative for a signal's number; None when nobody saw it in time."""

    rank: int
    pid: int
    exit_code: int | None


class DeathWatch:
    """Sees each rank's death at once, also below a launcher that takes the dead away and keeps the reason to itself.

    `deaths` are in the order in which they were seen.
    """

    def __init__(self) -> None:
        self.deaths: list[Death] = []
        self._watched: dict[int, tuple[int, int]] = {}  # descriptor -> rank, process id
        self._known: set[int] = set()

    def __enter__(self) -> DeathWatch:
        return self

    def __exit__(self, *error: object) -> None:
        for descriptor in self._watched:
            os.close(descriptor)

    def watch(self, ranks: Iterable[tuple[int, int]]) -> None:
        """Watch these (rank, process id) as well; those that are watched already are passed over."""
        for rank, pid in ranks:
            if pid in self._known:
                continue
            self._known.add(pid)
            try:
                self._watched[os.pidfd_open(pid)] = (rank, pid)
            except ProcessLookupError:
                self.deaths.append(Death(rank, pid, None))
            except (AttributeError, OSError):  # a kernel before 5.3: the launcher's exit code has to do
                continue

    def wait(self, timeout_s: float) -> None:
        """Wait until one dies, at most that long."""
        poll = select.poll()
        for descriptor in self._watched:
            poll.register(descriptor, select.POLLIN)
        for descriptor, _ in poll.poll(timeout_s * 1000.0):
            rank, pid = self._watched.pop(descriptor)
            os.close(descriptor)
            self.deaths.append(Death(rank, pid, _exit_code_of_dead(pid)))


def _exit_code_of_dead(pid: int) -> int | None:
    """Of a process that has died and was not taken away by its parent yet."""
    fields = _stat(pid)
    if fields is None or fields[0] not in "ZX" or len(fields) < 50:
        return None
    return os.waitstatus_to_exitcode(int(fields[49]))
