"""What the training loop asks of replica groups, whichever way they train together.

groups.resume(directory, step)                 meet the others
place = groups.before_step()                   who takes part, and so which sequences are this group's
...forward and backward...
sums = groups.average_gradients(tokens, ...)   may raise StepNotCommitted: do the step again
...clip, update, move the position...
groups.after_update(tokens, updated)
groups.finish()                                after the last step: every group has the same parameters
groups.close()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from crosschip.train.outer.placement import Place, Slice

__all__ = ["GroupEvent", "GroupSums", "Groups", "Traffic", "change_of_place"]


@dataclass(frozen=True)
class GroupEvent:
    """A line for `events.jsonl`."""

    event: str
    detail: str
    action: str


def change_of_place(before: Place | None, place: Place) -> GroupEvent | None:
    """What to tell when other groups take part than before; None when all is as it was."""
    if place == before:
        return None
    return GroupEvent(
        "groups-changed" if before else "groups-met",
        f"{place.num_participants} of {place.num_groups} groups take part, this is number {place.rank}",
        "going on",
    )


@dataclass(frozen=True)
class GroupSums:
    """Trained tokens of all groups in a step, and the sums over them of the numbers that were handed in."""

    num_tokens: int
    numbers: tuple[float, ...]


@dataclass
class Traffic:
    """Bytes that this rank has sent to other groups, the seconds that exchanges took and that the trainer waited."""

    num_bytes_sent: int = 0
    exchange_s: float = 0.0
    waited_s: float = 0.0
    num_exchanges: int = 0


class Groups(Protocol):
    """See the module."""

    traffic: Traffic

    @property
    def back_to(self) -> str:
        """Where a roll-back leads, in words (see `take_common`)."""
        ...

    @property
    def averages_each_step(self) -> bool:
        """Whether `average_gradients` brings the groups' gradients together."""
        ...

    @property
    def place(self) -> Place:
        """This group's place among those that take part now."""
        ...

    def before_step(self) -> Place:
        """Get ready for the next step. The position may have moved: this group may have been healed by another.

        Raises:
            GivenUp: the stage is to stop (`give_up_when`), and other groups were waited for in vain.
        """
        ...

    def give_up_when(self, shall_stop: Callable[[], bool]) -> None:
        """Have `shall_stop` say whether the stage is to stop: then no wait for other groups goes on for long."""
        ...

    def average_gradients(self, num_tokens: int, numbers: Sequence[float]) -> GroupSums:
        """Between backward and the update: `num_tokens` this group trained, `numbers` to be summed over the groups.

        Raises:
            StepNotCommitted: do the step again, from `before_step` on; position and weights are as they were.
            GroupsError: the groups do not belong together.
        """
        ...

    def after_update(self, num_tokens: int, updated: bool = True) -> None:
        """After the update, when the position has been moved; `updated` is false where the step was skipped.

        Raises:
            GroupsError: the groups do not belong together.
        """
        ...

    def seen(self, sequences: int, taken: Slice) -> tuple[int, int]:
        """The sequences that the loss of a step is about, first and number, given where the step began."""
        ...

    def take_common(self) -> bool:
        """Go back to what the groups have in common, instead of to a checkpoint; False where nothing else is common."""
        ...

    def save(self, stage_directory: Path, step: int) -> None:
        """Put what a checkpoint of `step` does not hold into a file of its own."""
        ...

    def resume(self, stage_directory: Path, step: int) -> None:
        """Take up what was saved after `step`, if anything was, and meet the other groups. Before the first step."""
        ...

    def finish(self) -> None:
        """After the last step: the parameters are made equal over the groups."""
        ...

    def new_events(self) -> list[GroupEvent]:
        """What has happened since the last call."""
        ...

    def close(self) -> None:
        """Leave the groups."""
        ...
