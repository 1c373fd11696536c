"""When which fault strikes whom: exponentially distributed times, and every fault once before any comes again. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from crosschip.train.drill.catalogue import DrillFault

__all__ = ["Strike", "strikes"]


@dataclass(frozen=True)
class Strike:
    """`fault` strikes `group`'s `rank`, `after_s` seconds after the one before (or the first step)."""

    fault: DrillFault
    group: int
    rank: int
    after_s: float


def strikes(
    faults: Sequence[DrillFault], num_groups: int, num_ranks: int, mean_between_s: float, seed: int
) -> Iterator[Strike]:
    """Strikes without end. Times between them are exponential with that mean; order and victims are by chance.

    Each fault comes once in a shuffled round, and then the next round begins: in a drill of finite length no fault is
    left out by chance.
    """
    chance = random.Random(seed)
    while True:
        for fault in chance.sample(list(faults), len(faults)):
            yield Strike(
                fault,
                group=chance.randrange(num_groups),
                rank=chance.randrange(num_ranks),
                after_s=chance.expovariate(1.0 / mean_between_s),
            )
