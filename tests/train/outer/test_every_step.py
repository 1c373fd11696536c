"""Averaging each step, between real processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from crosschip.train.outer.every_step import EveryStep
from crosschip.train.outer.lighthouse import Lighthouse
from crosschip.train.outer.messages import Average, Averaged, Join, Joined, View
from crosschip.train.outer.outer_files import save_outer_state
from crosschip.train.outer.placement import Slice
from crosschip.train.outer.time_limits import TimeLimits
from crosschip.train.outer.training_state import TrainingState
from tests.train.outer.conftest import Group, wait_until, wait_until_gone
from tests.train.outer.group_process import Options, Position, backward, new_model

ENDLESS = 1_000_000
Start = Callable[..., Group]


def alone(num_steps: int, batch_size: int, learning_rate: float) -> list[float]:
    """The losses of one process that computes the whole batch."""
    model = new_model(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    losses = []
    for step in range(num_steps):
        optimizer.zero_grad()
        tokens, loss_sum = backward(model, Slice(step * batch_size, batch_size, batch_size), torch.device("cpu"))
        optimizer.step()
        with torch.no_grad():
            model.bias += 1e-3
        losses.append(loss_sum / tokens)
    return losses


def same_after_each_step(one: Group, other: Group) -> int:
    """How many steps both have taken; their parameters and gradients must be equal after each."""
    common = sorted(one.steps().keys() & other.steps().keys())
    for step in common:
        for what in ("checksum", "gradient", "sequences"):
            assert one.steps()[step][what] == other.steps()[step][what], f"{what} after step {step}"
    return len(common)


def test_a_killed_group_is_dropped_and_healed_and_no_data_is_lost(start: Start) -> None:
    first = start(group=0, steps=ENDLESS, pause_s=0.05)
    second = start(group=1, steps=ENDLESS, pause_s=0.05)
    second.wait_for_step(8)
    sidecar = second.sidecar
    second.kill()
    killed_at = second.last_step()
    wait_until_gone(sidecar)
    first.wait_for_step(killed_at + 5)
    assert first.steps()[killed_at + 5]["participants"] == 1
    same_after_each_step(first, second)

    again = start(group=1, steps=ENDLESS, pause_s=0.05)
    wait_until(lambda: len(again.steps()) >= 5, "the healed group's steps")
    assert "healed" in again.events()
    assert same_after_each_step(first, again) >= 4

    ends = 0
    for step in sorted(first.steps()):
        line = first.steps()[step]
        assert line["sequences"] - ends == line["participants"] * 6, "a step takes six sequences a group"
        ends = line["sequences"]  # without a gap: each step began where the one before had ended

    # Against one process with the whole batch, before anything went wrong: both round each of some hundred sums.
    expected = alone(8, 12, 1e-2)
    found = [first.steps()[step + 1]["loss"] for step in range(8)]
    assert found == pytest.approx(expected, rel=1e-4)
    assert [first.steps()[step + 1]["loss"] for step in range(1, 8)] != pytest.approx(expected[:7], rel=1e-4)


class Heard:
    """A sidecar's handle that writes down where a group says that it stands."""

    def __init__(self, group: int) -> None:
        self.config = SimpleNamespace(member=SimpleNamespace(group=group, num_groups=2), limits=TimeLimits())
        self.memory = SimpleNamespace(exchange=torch.zeros(4))
        self.stands_at: list[int] = []

    def call(self, command: Join | Average, kind: type, may_give_up: bool = False) -> Joined | Averaged:
        if isinstance(command, Average):
            return Averaged(True, command.num_tokens, command.numbers, 0, 0.0)
        self.stands_at.append(command.step)
        return Joined(View(0, 1, command.step), may_begin=True)


@pytest.mark.parametrize(("outer_step", "is_of_diloco"), [(40, True), (60, True), (20, False)])
def test_beside_a_checkpoint_of_diloco_a_group_stands_by_its_number(
    tmp_path: Path, outer_step: int, is_of_diloco: bool
) -> None:
    save_outer_state(tmp_path, 0, outer_step, {"parameters": torch.zeros(4)}, {"commits": 8})
    first, second = (Heard(group) for group in (0, 1))
    for heard in (first, second):
        model = new_model(0)
        state = TrainingState(model, torch.optim.AdamW(model.parameters()), Position(40))
        groups = EveryStep(lambda donate, heard=heard: heard, state.flat(), state)  # type: ignore[misc]
        groups.resume(tmp_path, 40)
        assert [event.event for event in groups.new_events()] == ["no-more-outer-steps"] * is_of_diloco
        groups.before_step()
        heard.memory.exchange = torch.zeros(state.flat().num_elements)
        groups.average_gradients(10, [1.0])
        state.position.step += 1
        groups.before_step()
    (before, after), (second_before, second_after) = first.stands_at, second.stands_at
    assert after == second_after == 41
    if is_of_diloco:
        assert second_before < before < 0
    else:
        assert second_before == before == 40


@pytest.mark.slow
def test_groups_with_other_settings_are_refused(start: Start) -> None:
    groups = [start(group=0, steps=5), start(group=1, steps=5, digest="another")]
    assert [group.wait() for group in groups] == [2, 2]
    assert all("settings" in line["problem"] for group in groups for line in group.lines() if "error" in line)


@pytest.mark.slow
def test_a_newcomer_with_other_settings_leaves_and_the_others_go_on(start: Start) -> None:
    first, second = (start(group=group, steps=ENDLESS, pause_s=0.05) for group in (0, 1))
    second.wait_for_step(3)
    second.kill()
    other = start(group=1, steps=ENDLESS, digest="another")
    assert other.wait() == 2
    assert "settings" in next(line["problem"] for line in other.lines() if "error" in line)
    first.wait_for_step(first.last_step() + 5)
    assert any("UnfitGroup" in line["reason"] for line in first.lines() if "repeated" in line)


@pytest.mark.slow
def test_groups_with_other_weights_are_refused(start: Start) -> None:
    groups = [start(group=0, steps=5), start(group=1, steps=5, seed=1)]
    assert [group.wait() for group in groups] == [2, 2]
    assert all("parameters differ" in line["problem"] for group in groups for line in group.lines() if "error" in line)


@pytest.mark.slow
def test_a_killed_sidecar_is_started_again(start: Start) -> None:
    groups = [start(group=group, steps=ENDLESS, pause_s=0.05) for group in (0, 1)]
    groups[1].wait_for_step(5)
    os.kill(groups[1].sidecar, signal.SIGKILL)
    wait_until(lambda: "sidecar-lost" in groups[1].events(), "the trainer to miss its sidecar")
    again_from = groups[0].last_step() + 5
    groups[1].wait_for_step(again_from)
    groups[0].wait_for_step(again_from)
    assert groups[0].steps()[again_from]["participants"] == 2
    assert same_after_each_step(*groups) >= 8


@pytest.mark.slow
def test_a_stopped_trainer_leaves_the_others_alone(start: Start) -> None:
    groups = [start(group=group, steps=ENDLESS, pause_s=0.05) for group in (0, 1)]
    groups[1].wait_for_step(5)
    groups[1].process.send_signal(signal.SIGSTOP)
    groups[0].wait_for_step(groups[1].last_step() + 10)
    assert groups[0].steps()[groups[0].last_step()]["participants"] == 1
    groups[1].process.send_signal(signal.SIGCONT)
    wait_until(lambda: "healed" in groups[1].events(), "the trainer that goes on to be healed")
    assert "sidecar-lost" in groups[1].events()


@pytest.mark.slow
def test_a_lighthouse_may_die_and_come_back(start: Start, lighthouse: Lighthouse) -> None:
    groups = [start(group=group, steps=ENDLESS, pause_s=0.05) for group in (0, 1)]
    groups[1].wait_for_step(5)
    lighthouse.close()
    bind = lighthouse.address.removeprefix("http://")
    for _ in range(2):  # twice: the second counts its quorums from 1 again, as the first did
        again = Lighthouse(bind)
        try:
            steps = groups[0].last_step()
            groups[0].wait_for_step(steps + 5)
            groups[1].wait_for_step(steps + 5)
        finally:
            again.close()
    assert same_after_each_step(*groups) >= 10


@pytest.mark.slow
def test_three_groups_lose_one_each_way(start: Start) -> None:
    groups = [start(group=group, steps=ENDLESS, num_groups=3, pause_s=0.05) for group in range(3)]
    groups[2].wait_for_step(5)
    groups[0].kill()  # the one whose store the others met in
    groups[1].wait_for_step(groups[0].last_step() + 5)
    assert same_after_each_step(groups[1], groups[2]) >= 8
    again = start(group=0, steps=ENDLESS, num_groups=3, pause_s=0.05)
    wait_until(lambda: len(again.steps()) >= 5, "the healed group's steps")
    assert same_after_each_step(groups[1], again) >= 4


@pytest.mark.slow
def test_groups_of_two_sharded_ranks_each(start: Start, tmp_path: object) -> None:
    def begin(group: int, attempt: int) -> list[Group]:
        meeting = f"{tmp_path}/meeting-{group}-{attempt}"
        return [
            start(group=group, steps=ENDLESS, rank=rank, size=2, rendezvous=meeting, pause_s=0.05) for rank in range(2)
        ]

    first, second = begin(0, 0), begin(1, 0)
    second[0].wait_for_step(8)
    second[1].kill()  # one rank: its group ends, as a launcher would end it
    second[0].kill()
    first[0].wait_for_step(second[0].last_step() + 5)
    again = begin(1, 1)
    wait_until(lambda: len(again[0].steps()) >= 5, "the healed group's steps")
    for rank in range(2):
        common = sorted(first[rank].steps().keys() & again[rank].steps().keys())
        assert len(common) >= 4
        assert all(first[rank].steps()[s]["checksum"] == again[rank].steps()[s]["checksum"] for s in common)
    found = [first[0].steps()[step + 1]["loss"] for step in range(8)]
    assert found == pytest.approx(alone(8, Options("", 0, "", 0).batch_size, 1e-2), rel=1e-4)
