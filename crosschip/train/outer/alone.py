"""One group that trains alone, in the form of several: nothing is exchanged, and nothing is waited for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from crosschip.train.outer.groups import GroupEvent, GroupSums, Traffic
from crosschip.train.outer.placement import Place, Slice

__all__ = ["AloneGroup"]


class AloneGroup:
    """See `groups.Groups`."""

    back_to = "the last good checkpoint"
    averages_each_step = False

    def __init__(self) -> None:
        self.traffic = Traffic()
        self.place = Place(0, 1, 1)

    def before_step(self) -> Place:
        """The whole step is this group's."""
        return self.place

    def give_up_when(self, shall_stop: Callable[[], bool]) -> None:
        """Nobody is waited for."""

    def average_gradients(self, num_tokens: int, numbers: Sequence[float]) -> GroupSums:
        """They are the mean already."""
        return GroupSums(num_tokens, tuple(numbers))

    def after_update(self, num_tokens: int, updated: bool = True) -> None:
        """Nobody is told."""

    def seen(self, sequences: int, taken: Slice) -> tuple[int, int]:
        """The sequences that a step's loss is about: all of them."""
        return taken.start, taken.count

    def take_common(self) -> bool:
        """There is nothing that is common to several."""
        return False

    def save(self, stage_directory: Path, step: int) -> None:
        """The checkpoint has everything."""

    def resume(self, stage_directory: Path, step: int) -> None:
        """There is nobody to meet."""

    def finish(self) -> None:
        """There is nobody to be equal to."""

    def new_events(self) -> list[GroupEvent]:
        """Nothing happens between groups."""
        return []

    def close(self) -> None:
        """Nothing is open."""
