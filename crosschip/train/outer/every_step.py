"""The trainer's side of averaging each step: fault-tolerant data parallelism over groups.

A step counts when all groups that take part have the mean gradient. When one dies in it, nobody has updated anything;
the others do the step again without it, with the sequences of the step divided anew, so that no data is lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from crosschip.train.outer.agreement import begun_anew, standing
from crosschip.train.outer.errors import SidecarLost, StepNotCommitted
from crosschip.train.outer.groups import GroupEvent, GroupSums, Traffic, change_of_place
from crosschip.train.outer.handle import SidecarHandle, TrainingTensors, read_donation
from crosschip.train.outer.memory import checksum_of
from crosschip.train.outer.messages import Average, Averaged, Join, Joined, View
from crosschip.train.outer.outer_files import newest_outer_step
from crosschip.train.outer.placement import Place, Slice
from crosschip.train.outer.training_state import FlatParameters, TrainingState

__all__ = ["EveryStep"]

_MEET_AGAIN_S = 0.2


class EveryStep:
    """See `groups.Groups`. `start` starts the sidecar; the loop moves the position after each committed step."""

    back_to = "the last good checkpoint"
    averages_each_step = True

    def __init__(
        self, start: Callable[[TrainingTensors], SidecarHandle], flat: FlatParameters, state: TrainingState
    ) -> None:
        self.handle = start(state.donate)
        self.traffic = Traffic()
        self._flat, self._state = flat, state
        self._events: list[GroupEvent] = []
        self._place: Place | None = None
        self._stands_at: int | None = None  # until a step is committed; None: at the step of its position
        self._is_checked = False  # whether the parameters were seen to equal the other groups'
        self._revived = False

    @property
    def place(self) -> Place:
        """This group's place in the last step."""
        assert self._place is not None, "before_step comes first"
        return self._place

    def before_step(self) -> Place:
        """Meet the other groups, and be healed by them when behind; the first time, wait for all that are planned."""
        began = time.monotonic()
        deadline = began + self.handle.config.limits.meeting_s
        while True:
            is_ready = self._place is not None or time.monotonic() > deadline
            joined = self._join(is_ready)
            if joined.may_begin:
                self._take_place(joined.view)
                return self.place
            self.handle.give_up_in_vain(began)
            if not is_ready:
                time.sleep(_MEET_AGAIN_S)

    def give_up_when(self, shall_stop: Callable[[], bool]) -> None:
        """From now on, wait in vain no longer than a few seconds where it is true."""
        self.handle.shall_stop = shall_stop

    def _join(self, is_ready: bool) -> Joined:
        stands_at = standing(self._state.position.step) if self._stands_at is None else self._stands_at
        try:
            joined = self.handle.call(Join(stands_at, is_ready), Joined, may_give_up=True)
        except SidecarLost as error:
            self._revive(error)
            joined = self.handle.call(Join(stands_at, is_ready), Joined, may_give_up=True)
        view = joined.view
        if view.donation is not None:
            behind = self._state.position.step
            self._state.load(read_donation(self.handle.memory, view.donation), view.donation.position)
            self.handle.memory.forget_state()
            self._is_checked, self._stands_at = False, view.max_step
            self._tell("healed", f"this group was at step {behind}", f"took over step {self._state.position.step}")
        return joined

    def _take_place(self, view: View) -> None:
        place = Place(view.rank, view.num_participants, self.handle.config.member.num_groups)
        change = change_of_place(self._place, place)
        if change is not None:
            self._events.append(change)
            self._is_checked = False
        self._place = place

    def average_gradients(self, num_tokens: int, numbers: Sequence[float]) -> GroupSums:
        """Replace the gradients, each the mean over this group's tokens, by the mean over all groups' tokens."""
        memory = self.handle.memory
        checksum = 0
        if not self._is_checked:
            self._flat.write(memory.exchange)
            checksum = checksum_of(memory.exchange)
        self._flat.write_gradients(memory.exchange)
        started = time.monotonic()
        command = Average(self._state.position.step, num_tokens, tuple(map(float, numbers)), checksum)
        try:
            done = self.handle.call(command, Averaged)
        except SidecarLost as error:
            self._revive(error)
            raise StepNotCommitted(error.problem) from None
        self._count(done, time.monotonic() - started)
        if not done.committed:
            self._tell("step-not-committed", done.reason, "the step is done again")
            raise StepNotCommitted(done.reason)
        self._is_checked, self._revived, self._stands_at = True, False, None
        if self.place.num_participants > 1:
            self._flat.read_gradients(memory.exchange)
        return GroupSums(done.num_tokens, done.numbers)

    def _count(self, done: Averaged, waited_s: float) -> None:
        self.traffic.num_bytes_sent += done.num_bytes_sent
        self.traffic.exchange_s += done.seconds
        self.traffic.waited_s += waited_s
        self.traffic.num_exchanges += 1

    def _revive(self, error: SidecarLost) -> None:
        """Start a new sidecar, once: a second death without a committed step between is not by chance."""
        if self._revived or self.handle.config.member.size > 1:
            raise error
        self._tell("sidecar-lost", error.problem, "a new one is started and the step is done again")
        self._revived = True
        self.handle.restart()

    def after_update(self, num_tokens: int, updated: bool = True) -> None:
        """Nothing is left to do but to look after the sidecar."""
        try:
            self.handle.serve()
        except SidecarLost as error:
            self._revive(error)

    def seen(self, sequences: int, taken: Slice) -> tuple[int, int]:
        """All groups' sequences: the loss is the mean over them."""
        return sequences, taken.taken_by_all

    def take_common(self) -> bool:
        """All that the groups have is common, and as it was before the step."""
        return False

    def save(self, stage_directory: Path, step: int) -> None:
        """The checkpoint has everything."""

    def resume(self, stage_directory: Path, step: int) -> None:
        """The first step meets the others; beside a checkpoint of DiLoCo with what one of them has, as all differ."""
        newest = newest_outer_step(stage_directory)
        if step == 0 or newest is None or newest < step:
            return
        member = self.handle.config.member
        self._stands_at = standing(0, begun_anew(step, member.group, member.num_groups))
        self._tell(
            "no-more-outer-steps",
            f"the checkpoint of step {step} is of DiLoCo, and has weights of this group alone",
            "all groups go on from those of the furthest, of equals the first",
        )

    def finish(self) -> None:
        """The parameters are equal after each step."""

    def new_events(self) -> list[GroupEvent]:
        """What has happened since the last call."""
        events, self._events = self._events, []
        return events

    def _tell(self, event: str, detail: str, action: str) -> None:
        self._events.append(GroupEvent(event, detail, action))

    def close(self) -> None:
        """Leave the groups."""
        self.handle.close()
