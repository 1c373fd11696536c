"""The drill: a rank is killed or stopped in a collective, or starts late; what do the others notice, and when?"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from crosschip.qualify.exams.links.ranks import Death, Ranks

__all__ = ["GRACE_S", "Detection", "Skew", "start_apart", "strike"]

GRACE_S = 10.0  # beyond the time-out: watchdogs look once in a while, and a busy host is late
_ANNOUNCE_AFTER = 5  # all-reduces that went well before the strike
_NUM_BYTES = 1 << 16
_SETTLE_S = 0.2  # so that the strike comes in the middle


@dataclass(frozen=True)
class Detection:
    """What became of a strike. `detected_s` has a number for each survivor that noticed, by rank."""

    struck: int
    how: str  # "killed" or "stopped"
    timeout_s: float
    detected_s: dict[int, float]
    words: dict[int, str]
    silent: list[int]  # survivors that noticed nothing in time
    trouble: str = ""  # what kept the drill from being made

    @property
    def slowest_s(self) -> float | None:
        """When the last survivor noticed; None when one did not."""
        return None if self.silent or not self.detected_s else max(self.detected_s.values())


def strike(
    directory: Path, chips: Sequence[str], how: str, timeout_s: float, start_limit_s: float, tick: Callable[[], None]
) -> Detection:
    """Kill (`killed`) or stop (`stopped`) the last rank while all are in all-reduces with this time-out."""
    struck = len(chips) - 1
    survivors = list(range(struck))
    limit_s = start_limit_s + timeout_s + GRACE_S + 60.0
    with Ranks(directory, chips, limit_s) as ranks:
        nothing = Detection(struck, how, timeout_s, {}, {}, survivors)
        if not ranks.wait(lambda: ranks.all_have("ready") or ranks.is_over(), start_limit_s, tick):
            return _troubled(nothing, f"the ranks were not ready within {start_limit_s:.0f} s")
        ranks.go([{"do": "loop", "num_bytes": _NUM_BYTES, "announce_after": _ANNOUNCE_AFTER}], timeout_s)
        begun = ranks.wait(lambda: ranks.all_have("looping") or ranks.is_over(), start_limit_s, tick)
        if ranks.deaths() or not begun:
            died = ranks.deaths()
            return _troubled(nothing, died[0].how if died else f"no collective ended within {start_limit_s:.0f} s")
        time.sleep(_SETTLE_S)
        struck_at = ranks.signal(struck, signal.SIGKILL if how == "killed" else signal.SIGSTOP)

        def noticed() -> list[Death]:
            return [death for death in ranks.deaths() if death.rank in survivors]

        ranks.wait(lambda: len(noticed()) == len(survivors), timeout_s + GRACE_S, tick)
        deaths = noticed()
    detected = {death.rank: death.at - struck_at for death in deaths}
    silent = [rank for rank in survivors if rank not in detected]
    return Detection(struck, how, timeout_s, detected, {death.rank: death.how for death in deaths}, silent)


def _troubled(detection: Detection, trouble: str) -> Detection:
    return Detection(
        detection.struck, detection.how, detection.timeout_s, {}, {}, detection.silent, trouble=trouble[:500]
    )


@dataclass(frozen=True)
class Skew:
    """What became of ranks of which one started late."""

    late_rank: int
    skew_s: float
    timeout_s: float
    met_after_s: float | None  # from the first rank's start to the first collective's end; None when they never met
    deaths: list[Death]


def start_apart(
    directory: Path, chips: Sequence[str], skew_s: float, start_limit_s: float, tick: Callable[[], None]
) -> Skew:
    """Let the last rank meet the others `skew_s` later; the time-out is well beyond that."""
    late = len(chips) - 1
    timeout_s = skew_s + 60.0
    with Ranks(directory, chips, start_limit_s + timeout_s + 60.0) as ranks:
        ranks.wait(lambda: ranks.all_have("ready") or ranks.is_over(), start_limit_s, tick)
        ranks.go([{"do": "touch"}], timeout_s, [0.0] * late + [skew_s])
        started_at = time.monotonic()
        ranks.wait(lambda: ranks.all_have("met") or ranks.is_over(), skew_s + start_limit_s, tick)
        met = [note["at"] for note in ranks.having("met")]
        met_after_s = max(met) - started_at if len(met) == len(chips) else None
        return Skew(late, skew_s, timeout_s, met_after_s, ranks.deaths())
