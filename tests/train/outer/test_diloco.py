"""DiLoCo between real processes: groups on different chips, killed, healed, with fragments, overlap and compression."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from crosschip.train.outer.lighthouse import Lighthouse
from crosschip.train.outer.outer_files import save_outer_state
from tests.train.outer.conftest import Group, wait_until

ENDLESS = 1_000_000
Start = Callable[..., Group]


def equal_after_outer_steps(one: Group, other: Group, interval: int) -> int:
    """How many outer steps both have taken; with one fragment and no overlap their parameters are equal after each."""
    mine_by_step, theirs_by_step = ({line["now_at"]: line for line in each.steps().values()} for each in (one, other))
    common = [step for step in sorted(mine_by_step.keys() & theirs_by_step.keys()) if step % interval == 0]
    for step in common:
        mine, theirs = mine_by_step[step], theirs_by_step[step]
        assert (mine["checksum"], mine["commits"]) == (theirs["checksum"], theirs["commits"]), f"after step {step}"
    return len(common)


def test_a_cpu_and_a_simulated_chip_train_together_and_one_is_killed(start: Start) -> None:
    words = {"mode": "diloco", "sync_every": 5, "compression": "int8", "steps": ENDLESS, "pause_s": 0.02}
    cpu, chip = start(group=0, **words), start(group=1, chip="sim", **words)
    chip.wait_for_step(20)
    assert equal_after_outer_steps(cpu, chip, 5) >= 3
    between = [step for step in cpu.steps().keys() & chip.steps().keys() if step % 5]
    assert any(cpu.steps()[step]["checksum"] != chip.steps()[step]["checksum"] for step in between)
    chip.kill()
    commits = chip.steps()[chip.last_step()]["commits"]
    wait_until(lambda: cpu.steps()[cpu.last_step()]["commits"] >= commits + 2, "outer steps without the killed group")

    again = start(group=1, chip="sim", **words)
    wait_until(lambda: len(again.steps()) >= 11, "the healed group's steps")
    assert "healed" in again.events()
    assert again.steps()[min(again.steps())]["now_at"] > 20
    assert equal_after_outer_steps(cpu, again, 5) >= 2


@pytest.mark.parametrize("mode", ["diloco", "every-step"])
def test_groups_that_go_on_with_weights_of_their_own_take_those_of_the_first(
    start: Start, tmp_path: Path, mode: str
) -> None:
    """As after DiLoCo in another layout, or with every step averaged from now on."""
    numbers = {"parameters": torch.zeros(10), "momentum": torch.zeros(10), "residual": torch.zeros(10)}
    save_outer_state(tmp_path, 0, 40, numbers, {"commits": 8, "inner_steps": 3, "tokens_since_0": 7})
    words = {"mode": mode, "sync_every": 5 if mode == "diloco" else 1, "stage": str(tmp_path), "resumed_at": 40}
    groups = [start(group=group, seed=group, steps=50, **words) for group in (1, 0)]
    assert [group.wait() for group in groups] == [0, 0], groups[0].told()
    assert [group.events().count("healed") for group in groups] == [1, 0]
    ends = [next(line for line in group.lines() if "finished" in line) for group in groups]
    assert ends[0]["checksum"] == ends[1]["checksum"]


@pytest.mark.slow
@pytest.mark.parametrize("compression", ["none", "int4"])
def test_fragments_overlap_and_end_with_equal_parameters(start: Start, compression: str) -> None:
    words = {"mode": "diloco", "sync_every": 8, "fragments": 2, "overlap_steps": 2, "compression": compression}
    groups = [start(group=group, steps=40, **words) for group in (0, 1)]
    assert [group.wait() for group in groups] == [0, 0], groups[0].told()
    ends = [next(line for line in group.lines() if "finished" in line) for group in groups]
    assert ends[0]["checksum"] == ends[1]["checksum"]
    assert ends[0]["traffic"]["num_exchanges"] >= 40 // 4


def test_what_is_trained_while_a_part_is_under_way_stays(start: Start) -> None:
    """An outer step of one group alone, with a learning rate of 1 and no momentum, changes nothing: the group trains as
    without it, unless the steps of the overlap are lost."""
    words = {"mode": "diloco", "num_groups": 1, "steps": 24, "overlap_steps": 2}
    nothing = {"outer_learning_rate": 1.0, "outer_momentum": 0.0}
    ways = [(1000, nothing), (4, nothing), (4, {**nothing, "own_share": 0.0})]
    with contextlib.ExitStack() as lighthouses:
        groups = []
        for number, (sync_every, settings) in enumerate(ways):
            lighthouse = lighthouses.enter_context(contextlib.closing(Lighthouse()))
            groups.append(
                start(group=number, sync_every=sync_every, settings=settings, lighthouse=lighthouse.address, **words)
            )
        assert [group.wait() for group in groups] == [0, 0, 0], groups[1].told()
    undisturbed, kept, lost = ([line["loss"] for line in group.steps().values()] for group in groups)
    assert kept == pytest.approx(undisturbed, rel=1e-4)
    assert lost != pytest.approx(undisturbed, rel=1e-2)


@pytest.mark.slow
def test_a_killed_sidecar_is_started_again(start: Start) -> None:
    words = {"mode": "diloco", "sync_every": 5, "steps": ENDLESS, "pause_s": 0.05}
    groups = [start(group=group, **words) for group in (0, 1)]
    groups[1].wait_for_step(12)
    os.kill(groups[1].sidecar, signal.SIGKILL)
    wait_until(lambda: "sidecar-lost" in groups[1].events(), "the trainer to miss its sidecar")
    again_from = max(group.last_step() for group in groups) + 10
    for group in groups:
        group.wait_for_step(again_from)
    assert groups[0].steps()[again_from]["participants"] == 2
    assert equal_after_outer_steps(*groups, 5) >= 3


@pytest.mark.slow
def test_a_group_with_a_nan_is_left_out_and_takes_the_others_parameters(start: Start) -> None:
    words = {"mode": "diloco", "sync_every": 5, "steps": 20}
    groups = [start(group=0, **words), start(group=1, poisoned_step=8, **words)]
    assert [group.wait() for group in groups] == [0, 0], groups[1].told()
    assert "excluded" in groups[1].events()
    assert "excluded" not in groups[0].events()
    assert equal_after_outer_steps(*groups, 5) >= 3
    assert groups[1].steps()[20]["loss"] == groups[1].steps()[20]["loss"], "a NaN is not equal to itself"


@pytest.mark.slow
def test_a_lighthouse_may_die_and_come_back(start: Start, lighthouse: Lighthouse) -> None:
    words = {"mode": "diloco", "sync_every": 5, "steps": ENDLESS, "pause_s": 0.02}
    groups = [start(group=group, **words) for group in (0, 1)]
    groups[1].wait_for_step(10)
    lighthouse.close()
    again = Lighthouse(lighthouse.address.removeprefix("http://"))
    try:
        steps = groups[0].last_step()
        groups[0].wait_for_step(steps + 15)
        assert equal_after_outer_steps(*groups, 5) >= 4
    finally:
        again.close()
