"""Long work of rank 0 outside of a step's computing, as the supervisor sees it: rank 0 beats, and the others wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from crosschip.train.group.world import PATIENCE, World
from crosschip.train.guard.allowances import START
from crosschip.train.guard.heartbeat import Heartbeat

__all__ = ["made_by_rank_zero", "rank_zero_begins"]

Made = TypeVar("Made")


def made_by_rank_zero(
    world: World, heartbeat: Heartbeat, make: Callable[[], Made], phase: str = START, step: int = 0
) -> Made:
    """As `World.from_rank_zero`, for work that takes long; `make` has to beat now and then, or to renew the beat."""
    _begin(world, heartbeat, phase, step)
    made = world.from_rank_zero(make)
    heartbeat.beat(phase, step)
    return made


@contextmanager
def rank_zero_begins(world: World, heartbeat: Heartbeat) -> Iterator[None]:
    """As `World.rank_zero_first`, for work that takes long; what is in the block has to beat now and then."""
    _begin(world, heartbeat, START, 0)
    with world.rank_zero_first():
        heartbeat.beat(START, 0)
        yield


def _begin(world: World, heartbeat: Heartbeat, phase: str, step: int) -> None:
    """A rank that waits cannot beat: it may be silent for as long as the wait may take, and rank 0 may not."""
    heartbeat.beat(phase, step, 0.0 if world.rank == 0 else PATIENCE.total_seconds())
