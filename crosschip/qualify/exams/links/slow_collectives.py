"""Which collectives are far slower than the others over the same links. Pure policy: no torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from crosschip.qualify.finding import Finding

__all__ = ["SLOW_RATIO", "SlowCollective", "find_slow_collectives", "slow_collective_finding"]

# Over eight ranks a ring's all_reduce has 14 steps where others have 7 or 3, and moves twice as much. What goes through
# the host or falls back to one message after the other is slower by more than that: the limit is an operator's.
SLOW_RATIO = 20.0
_LEAST_OTHERS = 3


@dataclass(frozen=True)
class SlowCollective:
    """A collective whose fastest message of a size takes `ratio` times as long as the others' median."""

    collective: str
    num_bytes: int
    time_s: float
    typical_s: float

    @property
    def ratio(self) -> float:
        """How much slower it is."""
        return self.time_s / self.typical_s


def find_slow_collectives(
    times: Mapping[str, Mapping[int, Sequence[float]]], host_wait_s: float = 0.0
) -> list[SlowCollective]:
    """Each collective that is too slow, at the size where it is slowest among the others; the slowest first.

    `times` are those of the repeats in seconds, by collective and by size in bytes. `host_wait_s` is for how long a
    rank may wait for a core that it shares, on top.
    """
    found: dict[str, SlowCollective] = {}
    for collective, sizes in times.items():
        for num_bytes, repeats in sizes.items():
            others = [
                min(each[num_bytes]) for name, each in times.items() if name != collective and each.get(num_bytes)
            ]
            if not repeats or len(others) < _LEAST_OTHERS:
                continue
            slow = SlowCollective(collective, num_bytes, min(repeats), statistics.median(others))
            known = found.get(collective)
            if slow.time_s > SLOW_RATIO * slow.typical_s + host_wait_s and (known is None or slow.ratio > known.ratio):
                found[collective] = slow
    return sorted(found.values(), key=lambda each: -each.ratio)


def slow_collective_finding(exam: str, slow: SlowCollective, num_ranks: int, is_needed: bool) -> Finding:
    """A slow collective as a finding: a failure where the role needs it, else a limit."""
    return Finding(
        exam=exam,
        kind="links",
        verdict="FAIL" if is_needed else "PASS WITH LIMITS",
        subject=f"{slow.collective} of {slow.num_bytes} bytes",
        check="collectives",
        message=f"the fastest {slow.collective} of {slow.num_bytes} bytes over {num_ranks} ranks takes "
        f"{slow.time_s * 1e3:.3g} ms, {slow.ratio:.3g} times as long as the median of the other collectives "
        f"({slow.typical_s * 1e3:.3g} ms)",
        measured=slow.ratio,
        limit=SLOW_RATIO,
        limit_source="the other collectives over the same links; the steps and bytes of good algorithms differ less",
        critical=is_needed,
        severity=slow.ratio,
    )
