"""The trainer's side of DiLoCo: each group trains alone, and every H steps what they changed is averaged.

Douillard et al. 2023 (arXiv 2311.08105), with the fragments, the overlap and the mixing of Streaming DiLoCo (2025,
arXiv 2501.18512). P fragments take turns: one is due every H / P inner steps, so each is every H. It is sent
`overlap_steps` before that, and the trainer computes on while the sidecar sends. The common parameters and their
momentum lie in the shared memory. A group that dies loses what it trained since its last outer step, others nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from crosschip.errors import CheckpointError
from crosschip.train.outer.agreement import begun_anew, digest_of
from crosschip.train.outer.errors import GivenUp, SidecarLost
from crosschip.train.outer.groups import GroupEvent, GroupSums, Traffic, change_of_place
from crosschip.train.outer.handle import SidecarHandle, TrainingTensors, read_donation
from crosschip.train.outer.link_watch import OuterLinkWatch
from crosschip.train.outer.messages import OuterStep, OuterStepDone, View
from crosschip.train.outer.outer_files import load_outer_state, newest_outer_step, other_layout, save_outer_state
from crosschip.train.outer.outer_state import OuterState
from crosschip.train.outer.placement import Place, Slice
from crosschip.train.outer.training_state import FlatParameters, TrainingState
from crosschip.train.outer.under_way import Sent, outer_tensors, sent_with

__all__ = ["DiLoCo", "Rhythm"]

_MEET_AGAIN_S = 0.2
_TAKEN = "took over the common parameters; the optimizer begins anew"
_BEGUN_ANEW = "the outer optimizer begins anew, from another group's state or else from this checkpoint's weights"


@dataclass(frozen=True)
class Rhythm:
    """When what is sent: an outer step every `interval` inner steps (H / P), sent `overlap_steps` before.

    When a fragment comes back, `own_share` of a group's parameters stays in them (alpha of Streaming DiLoCo); with None
    the group keeps, on top of the common parameters, what it trained since it sent its own.
    `batch_size` counts the sequences of an inner step over all planned groups.
    """

    interval: int
    overlap_steps: int
    own_share: float | None
    batch_size: int


class DiLoCo:
    """See `groups.Groups`. `start` starts the sidecar; `join` comes before the first step."""

    back_to = "what the groups have in common, with a new optimizer"
    averages_each_step = False

    def __init__(
        self,
        start: Callable[[TrainingTensors], SidecarHandle],
        flat: FlatParameters,
        state: TrainingState,
        rhythm: Rhythm,
        watch: OuterLinkWatch | None = None,
    ) -> None:
        self.handle = start(self._donate)
        self.traffic = Traffic()
        self.outer = OuterState(self.handle.memory, self.handle.config.rules.fragments)
        self._flat, self._state, self._rhythm = flat, state, rhythm
        self._events: list[GroupEvent] = []
        self._place: Place | None = None
        self._watch = watch
        self._step_s, self._computing_since = 0.0, time.monotonic()
        self._inner_steps = 0  # since the last outer step
        self._tokens_since = [0] * len(self.outer.fragments)  # since each fragment's last outer step
        self._is_believed = True  # the guard let the newest step update the parameters
        self._under_way: Sent | None = None
        self._went_back_to: int | None = None  # outer steps of the common parameters taken over since it was sent
        self._revived = False
        flat.write(self.handle.memory.exchange)
        self.outer.begin(self.handle.memory.exchange)

    @property
    def place(self) -> Place:
        """This group's place since the last outer step."""
        assert self._place is not None, "join comes first"
        return self._place

    def join(self) -> Place:
        """Meet the other groups before the first step: all that are planned at a start, the running ones later."""
        member, limits = self.handle.config.member, self.handle.config.limits
        deadline = time.monotonic() + limits.meeting_s
        while True:
            self._send(num_tokens=0)
            done = self._receive()
            if done.committed or done.view.donation or done.view.num_participants == member.num_groups:
                return self.place
            if time.monotonic() > deadline:
                return self.place
            time.sleep(_MEET_AGAIN_S)

    def before_step(self) -> Place:
        """Nothing has to be waited for."""
        self._serve()
        return self.place

    def average_gradients(self, num_tokens: int, numbers: Sequence[float]) -> GroupSums:
        """Within an interval each group goes its own way."""
        return GroupSums(num_tokens, tuple(numbers))

    def after_update(self, num_tokens: int, updated: bool = True) -> None:
        """Count the inner step; send the fragment that is due, or take it back."""
        self._inner_steps += 1
        self._is_believed = updated
        if updated:
            self._tokens_since = [tokens + num_tokens for tokens in self._tokens_since]
        self._serve()
        if self._under_way is None and self._inner_steps >= self._rhythm.interval - self._rhythm.overlap_steps:
            self._send_due()
        if self._inner_steps >= self._rhythm.interval:
            self._receive_or_give_up()

    def give_up_when(self, shall_stop: Callable[[], bool]) -> None:
        """From now on, wait in vain for an outer step no longer than a few seconds where it is true.

        Only in a group of one rank: others may have taken the step that one of them gives up.
        """
        if self.handle.config.member.size == 1:
            self.handle.shall_stop = shall_stop

    def _receive_or_give_up(self) -> None:
        try:
            self._receive(may_give_up=True)
        except GivenUp:
            self.handle.close()  # nothing moves the outer state any more, which is about to be saved
            self._tell("outer-step-given-up", "the stage is to stop and too few groups came", "left to the next start")

    def seen(self, sequences: int, taken: Slice) -> tuple[int, int]:
        """This group's own sequences."""
        return taken.start, taken.count

    @property
    def _commits(self) -> int:
        """The outer steps that the parameters have followed: not one whose part has not been taken back yet."""
        return self.outer.commits if self._under_way is None else self._under_way.commits

    def take_common(self) -> bool:
        """Take over the common parameters and begin the optimizer anew; the place in the interval stays.

        While a part is under way they are those that it was sent with, on all ranks alike.
        """
        self._take_all()
        self._state.forget_optimizer()
        self._tokens_since = [0] * len(self._tokens_since)
        self._is_believed = True
        return True

    def save(self, stage_directory: Path, step: int) -> None:
        """Write the outer state of this rank. What cannot be written is told, and training goes on."""
        try:
            tensors, counts = self.export()
            save_outer_state(stage_directory, self.handle.config.member.rank, step, tensors, counts)
        except CheckpointError as error:
            self._tell("outer-state-not-saved", error.problem, "training goes on; the next save tries again")

    def resume(self, stage_directory: Path, step: int) -> None:
        """Take up this rank's outer state where it was saved after `step`, and meet the other groups.

        Where there is none that fits, it is begun anew from a group that has one, or from the furthest group.

        Raises:
            CheckpointError: it is damaged, and other ranks of the group have theirs.
        """
        found = self._saved(stage_directory, step)
        if found is not None:
            self.load(*found)
        elif step:
            member = self.handle.config.member
            # The weights of a checkpoint from averaging each step are those of all groups, as group 0's.
            number = 0 if newest_outer_step(stage_directory) is None else member.group
            self.handle.memory.begun = begun_anew(step, number, member.num_groups)
        self.join()

    def _saved(self, stage_directory: Path, step: int) -> tuple[dict[str, torch.Tensor], dict[str, int]] | None:
        """What was saved after `step` if it can be taken up; that it cannot is told."""
        try:
            found = load_outer_state(stage_directory, self.handle.config.member.rank, step)
        except CheckpointError as error:
            if self.handle.config.member.size > 1:
                raise  # the other ranks have theirs: parts of one model would be at different outer steps
            self._tell("damaged-outer-state", error.problem, _BEGUN_ANEW)
            return None
        if found is None:
            if step and newest_outer_step(stage_directory) is not None:
                self._tell("no-outer-state", f"none was saved beside the checkpoint of step {step}", _BEGUN_ANEW)
            return None
        if differing := other_layout(*found, self.layout()):
            self._tell("other-outer-layout", f"that of step {step} does not fit: {differing}", _BEGUN_ANEW)
            return None
        return found

    def finish(self) -> None:
        """Outer steps for all fragments that were trained since their last; then the common parameters everywhere.

        A group that has nothing to give takes part all the same: what the others have trained is to be everybody's.
        """
        if self._under_way is not None:
            self._receive()
        num_open = len(self.outer.fragments) - (self._inner_steps == 0)
        for _ in range(num_open):
            self._send_due()
            self._receive()
        self._take_all()

    def _send_due(self) -> None:
        """Send the fragment that is due, or go back to what is common: a step that was skipped last may be the fault of
        the parameters it was computed with, and a single wrong one would be everybody's.
        """
        if not self._is_believed:
            self.take_common()
            self._tell("excluded", "the newest step was not believed; this group's part was left out", _TAKEN)
        self._send(self._tokens_since[self.outer.due])

    def _send(self, num_tokens: int) -> None:
        if num_tokens and self._inner_steps:
            self._step_s = (time.monotonic() - self._computing_since) / self._inner_steps
        memory, fragment = self.handle.memory, self.outer.fragments[self.outer.due]
        self._flat.write(memory.exchange, fragment.first, fragment.last)
        is_lossy = self.handle.config.rules.compression != "none"
        command = OuterStep(num_tokens, tuple(self._state.buffers()))
        self._under_way = sent_with(command, self.outer, memory, is_lossy and self._rhythm.overlap_steps > 0)
        self._went_back_to = None
        self._hand_over()

    def _hand_over(self) -> None:
        assert self._under_way is not None
        try:
            self.handle.send(self._under_way.command)
        except SidecarLost as error:
            self._revive(error)

    def _serve(self) -> None:
        try:
            self.handle.serve()
        except SidecarLost as error:
            self._revive(error)

    def _receive(self, may_give_up: bool = False) -> OuterStepDone:
        started = time.monotonic()
        while True:
            try:
                done = self.handle.receive(OuterStepDone, may_give_up)
                break
            except SidecarLost as error:
                self._revive(error)
        self.traffic.waited_s += time.monotonic() - started
        self.traffic.num_bytes_sent += done.num_bytes_sent
        self.traffic.exchange_s += done.seconds
        self.traffic.num_exchanges += 1
        self._under_way, self._revived = None, False
        self._apply(done)
        self._look_at_link(done)
        self._computing_since = time.monotonic()
        return done

    def _apply(self, done: OuterStepDone) -> None:
        for failure in done.failures:
            self._tell("outer-step-not-committed", failure, "tried again with the groups that are left")
        if done.view.donation is not None:
            behind = self._state.position.step
            tensors = read_donation(self.handle.memory, done.view.donation)
            self._state.load(tensors, done.view.donation.position)
            self.handle.memory.forget_state()
            self._take_all()
            self._tokens_since, self._is_believed = [0] * len(self._tokens_since), True
            taken = f"took over step {self._state.position.step}; outer steps come every {self._rhythm.interval} steps"
            self._tell("healed", f"this group was at step {behind}", taken)
        elif done.excluded:
            self.take_common()
            self._tell("excluded", done.excluded, _TAKEN)
        elif done.committed:
            self._take(done.fragment)
        if done.committed:
            self._state.load_buffers(done.numbers)
            self._tokens_since[done.fragment] = 0
        if done.committed or done.view.donation is not None:
            self._inner_steps = 0
        self._take_place(done.view)

    def _look_at_link(self, done: OuterStepDone) -> None:
        if self._watch is None or not self._step_s:
            return
        event = self._watch.observe(done.wire_s, done.wire_bytes, done.view.num_participants, self._step_s)
        if event is not None:
            self._events.append(event)

    def _take(self, number: int) -> None:
        """Take over a fragment that came back, with what was trained on top since it was sent.

        What was sent still lies in the exchange part; after a roll-back training went on from the common parameters.
        """
        fragment, own_share = self.outer.fragments[number], self._rhythm.own_share
        common = self.outer.vector(number, self.outer.commits)
        if own_share is None and self._rhythm.overlap_steps:
            back_at = self._went_back_to
            base = self.handle.memory.exchange if back_at is None else self.outer.vector(number, back_at)
            self._flat.read_below(common, base, fragment.first, fragment.last)
        else:
            self._flat.read(common, own_share or 0.0, fragment.first, fragment.last)

    def _take_all(self) -> None:
        self._went_back_to = self._commits
        for number, fragment in enumerate(self.outer.fragments):
            self._flat.read(self.outer.vector(number, self._commits), 0.0, fragment.first, fragment.last)

    def _take_place(self, view: View) -> None:
        place = Place(view.rank, view.num_participants, self.handle.config.member.num_groups)
        change = change_of_place(self._place, place)
        if change is not None:
            self._events.append(change)
        self._place = place

    def _donate(self) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """The state for a group that joins, with the position at which all begin the next interval together."""
        tensors, position = self._state.donate()
        member = self.handle.config.member
        place = self._place or Place(member.group, member.num_groups, member.num_groups)  # not yet met: all will come
        left = max(0, self._rhythm.interval - self._inner_steps) if self._inner_steps else 0
        if left:
            per_step = position["tokens"] // max(1, position["step"])
            position["step"] += left
            position["sequences"] += left * place.slice(0, self._rhythm.batch_size).taken_by_all
            position["tokens"] += left * per_step
        return tensors, position

    def _revive(self, error: SidecarLost) -> None:
        """Start a new sidecar, once; the outer state and what was to be sent still lie in the shared memory."""
        if self._revived or self.handle.config.member.size > 1:
            raise error
        self._tell("sidecar-lost", error.problem, "a new one is started over the same outer state")
        self._revived = True
        self.handle.restart()
        sent = self._under_way
        if sent is None:
            return
        if self.outer.commits == sent.commits:
            self._hand_over()
            return
        self._take(sent.fragment)  # it was committed, and only the answer is lost
        self._tokens_since[sent.fragment] = 0
        self._send(num_tokens=0)

    def new_events(self) -> list[GroupEvent]:
        """What has happened since the last call."""
        events, self._events = self._events, []
        return events

    def _tell(self, event: str, detail: str, action: str) -> None:
        self._events.append(GroupEvent(event, detail, action))

    def export(self) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """The outer state for a checkpoint: tensors of this rank, and counts; `load` is the way back.

        An outer step that is under way is not in it, also where it is committed: the parameters have not followed it.
        It is sent again after a resume.

        Raises:
            CheckpointError: another group's state is being written over it.
        """
        tensors = outer_tensors(self.outer, self.handle.memory, self._under_way)
        counts = {f"tokens_since_{number}": tokens for number, tokens in enumerate(self._tokens_since)}
        return tensors, {"commits": self._commits, "inner_steps": self._inner_steps, **counts, **self.layout()}

    def layout(self) -> dict[str, int]:
        """What the outer state belongs to: it cannot be taken up where a number differs."""
        config = self.handle.config
        return {
            "ranks": config.member.size,
            "fragments": len(config.rules.fragments),
            "parameters": config.layout.num_elements,
            "cuts": digest_of(f"{config.rules.fragments} {self._flat.spread}"),
        }

    def load(self, tensors: dict[str, torch.Tensor], counts: dict[str, int]) -> None:
        """Take over what `export` gave, before `join`."""
        self.outer.load(torch.stack((tensors["parameters"], tensors["momentum"])), counts["commits"])
        self.handle.memory.residual.copy_(tensors["residual"])
        self._inner_steps = counts["inner_steps"]
        self._tokens_since = [counts[f"tokens_since_{number}"] for number in range(len(self._tokens_since))]

    def close(self) -> None:
        """Leave the groups; an outer step that is under way is given up."""
        self.handle.close()
