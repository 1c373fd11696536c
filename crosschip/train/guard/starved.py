"""Ranks that are silent because they get no core: time in the kernel's run queue is no sign of a hang. No torch here.

A machine that is busy with other work lets a rank wait for a core, and three times a step's usual length is over soon.
Linux counts for each thread how long it was ready to run and did not (`/proc/PID/task/TID/schedstat`). A rank that is
stopped, waits for a lock, a device or another rank is not in that queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crosschip.train.guard.heartbeat import Beat

__all__ = ["CoreWaits", "core_waits_s", "own_wait_s"]

_LOOK_AFTER_S = 0.5  # of silence: a rank that beats is not looked at


def core_waits_s(pid: int) -> dict[str, float]:
    """Seconds that each thread of a process has waited for a core so far; empty where the system does not tell."""
    found = {}
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        waited_s = _waited_s(path)
        if waited_s is not None:
            found[path.parent.name] = waited_s
    return found


def own_wait_s() -> float:
    """Seconds that the calling thread has waited for a core so far; 0 where the system does not tell."""
    return _waited_s(Path("/proc/thread-self/schedstat")) or 0.0


def _waited_s(schedstat: Path) -> float | None:
    """What a thread's file tells; None where it has ended, or the system does not tell."""
    try:
        return int(schedstat.read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return None


class CoreWaits:
    """How long the ranks have waited for a core since a rank's last beat, or nearly since then.

    It is those of all ranks: one that gets no core holds up the others, who wait for it in a collective.
    """

    def __init__(self) -> None:
        self._at_beat: dict[int, tuple[int, dict[str, float]]] = {}  # rank to its beat's number and all threads' waits
        self._pids: list[int] = []

    def look(self, beats: Sequence[Beat], now: float) -> None:
        """Take note of where the waits of silent ranks begin; to be called every now and then, with all ranks."""
        self._pids = [beat.pid for beat in beats]
        newly_silent = [
            beat
            for beat in beats
            if beat.silent_s(now) > _LOOK_AFTER_S and self._at_beat.get(beat.rank, (-1,))[0] != beat.num_beats
        ]
        if newly_silent:
            waits = self._waits_s()
            self._at_beat.update({beat.rank: (beat.num_beats, waits) for beat in newly_silent})

    def since(self, beat: Beat) -> float:
        """Seconds that the thread which waited most has waited since the beat, in any rank."""
        noted = self._at_beat.get(beat.rank)
        if noted is None or noted[0] != beat.num_beats:
            return 0.0
        return max((waited - noted[1].get(thread, waited) for thread, waited in self._waits_s().items()), default=0.0)

    def _waits_s(self) -> dict[str, float]:
        return {thread: waited for pid in self._pids for thread, waited in core_waits_s(pid).items()}
