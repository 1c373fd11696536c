"""Long work of rank 0 before a stage's first step, as the supervisor sees it: rank 0 beats, and the others wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from crosschip.train.group.world import PATIENCE, World
from crosschip.train.guard.allowances import START
from crosschip.train.guard.heartbeat import Heartbeat

__all__ = ["made_by_rank_zero", "rank_zero_begins"]

Made = TypeVar("Made")


def made_by_rank_zero(world: World, heartbeat: Heartbeat, make: Callable[[], Made]) -> Made:
    """As `World.from_rank_zero`, for work that takes long; `make` has to beat now and then."""
    _begin(world, heartbeat)
    made = world.from_rank_zero(make)
    heartbeat.beat(START, 0)
    return made


@contextmanager
def rank_zero_begins(world: World, heartbeat: Heartbeat) -> Iterator[None]:
    """As `World.rank_zero_first`, for work that takes long; what is in the block has to beat now and then."""
    _begin(world, heartbeat)
    with world.rank_zero_first():
        heartbeat.beat(START, 0)
        yield


def _begin(world: World, heartbeat: Heartbeat) -> None:
    """A rank that waits cannot beat: it may be silent for as long as the wait may take, and rank 0 may not."""
    heartbeat.beat(START, 0, 0.0 if world.rank == 0 else PATIENCE.total_seconds())
