"""Replica groups and reinforcement learning in one recipe: groups train up to it, and group 0 goes on alone."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from crosschip.train.guard.heartbeat import read_beats
from crosschip.train.launching import group_directory
from tests.train.conftest import TINY
from tests.train.launched import lines, settings
from tests.train.rl.test_reinforcement import RL


def test_group_0_goes_on_alone_is_replaced_when_killed_and_finds_nothing_left_to_do(start, tmp_path: Path) -> None:
    recipe = tmp_path / "rl.toml"
    recipe.write_text(TINY.replace("[evaluate]", RL + "[evaluate]"))
    overrides = settings("groups.num_groups=2", "train.gradient_accumulation=1", "rl.steps=5")
    training = start(recipe, "run", 1, *overrides)
    checkpoints = training.out / "train" / "rl" / "checkpoints"  # a step may be logged before its save has ended
    training.wait_until(lambda: any(checkpoints.glob("step-*/COMPLETE")))
    (beat,) = read_beats(training.out / "heartbeats")
    os.kill(beat.pid, signal.SIGKILL)
    code, said = training.end()
    assert code == 0, said
    assert "group 1 ends here: rl and what follows is group 0's alone" in said
    assert {"killed", "resumed"} <= set(training.events("rl"))
    assert [line["step"] for line in training.metrics("rl")][-1] == 5
    assert {line.get("groups") for line in training.metrics("sft")} == {2}
    assert {line.get("groups") for line in training.metrics("rl")} == {None}
    other = group_directory(training.out, 1) / "train"
    assert [line["step"] for line in lines(other / "sft" / "metrics.jsonl")][-1] == 7
    assert not (other / "rl").exists()

    again = start(recipe, "run", 1, *overrides, "--resume")
    code, said = again.end()
    assert code == 0, said
    assert said.count("is complete") == 2
