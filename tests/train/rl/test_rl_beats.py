"""Whoever waits for engines, or for the rank that does, is not taken for one that hangs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from crosschip.train.group.world import Alone
from crosschip.train.guard.heartbeat import Beat, Heartbeat, read_beats
from crosschip.train.rl import reinforcer as reinforcer_module
from crosschip.train.rl.event_queue import EventQueue
from crosschip.train.rl.reinforcer import Reinforcer
from crosschip.train.rl.rollouts import Rollouts
from crosschip.train.stage_job import StagePosition
from tests.train.rl.made import settings
from tests.train.rl.rollouts.rollout_parts import rollouts_of, settings_of, take_all, write_nothing
from tests.train.rl.rollouts.scripted_engine import ScriptedEngine, served
from tests.train.rl.test_rollouts_kept import InstantRollouts, Tokenizer

SLACK_S, A_DAY_S = 0.5, 86_400.0


def beat_of(directory: Path) -> Beat:
    (beat,) = read_beats(directory)
    return beat


@pytest.fixture
def heartbeat(tmp_path: Path) -> Heartbeat:
    """One that has seen all phases of fast steps."""
    beating = Heartbeat(tmp_path / "heartbeat-0", 0, 600.0, SLACK_S)
    beating.stage("rl")
    for step in range(1, 6):
        for phase in ("data", "rollouts", "scoring", "forward-backward", "update", "outer", "publish"):
            beating.beat(phase, step)
    return beating


class Watched(Alone):
    """A rank of two that notes its beat when it begins to wait for rank 0, which makes what `made` says."""

    def __init__(self, rank: int, directory: Path, made: Callable[[], Any]) -> None:
        super().__init__(rank, 2)
        object.__setattr__(self, "directory", directory)
        object.__setattr__(self, "made", made)
        object.__setattr__(self, "seen", [])

    def from_rank_zero(self, make: Callable[[], Any]) -> Any:
        found: Any = self
        found.seen.append(beat_of(found.directory))
        return make() if self.rank == 0 else found.made()


def reinforcer_of(directory: Path, heartbeat: Heartbeat, world: Watched, rollouts: Any) -> Reinforcer:
    return Reinforcer(
        settings=settings(),
        directory=directory,
        model=cast(Any, None),
        tokenizer=cast(Any, Tokenizer()),
        compute_dtype=torch.float32,
        world=world,
        rollouts=cast(Rollouts, rollouts),
        seed=3,
        heartbeat=heartbeat,
        position=StagePosition(step=5),
        events=EventQueue(),
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_who_waits_for_the_batch_of_rank_zero_may_be_silent(
    tmp_path: Path, heartbeat: Heartbeat, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    monkeypatch.setattr(reinforcer_module, "gather_model", lambda model, world: object())
    rollouts = InstantRollouts(settings())
    rollouts.publish(0, None, None)
    world = Watched(rank, tmp_path, lambda: rollouts.take(0, None))
    reinforcer = reinforcer_of(tmp_path, heartbeat, world, rollouts if rank == 0 else None)
    reinforcer.stream.batch(0, 4)
    (waiting,) = world.seen  # type: ignore[attr-defined]
    assert (waiting.phase, waiting.step) == ("rollouts", 6)
    assert (waiting.allowance_s > A_DAY_S) == (rank == 1)
    after = beat_of(tmp_path)
    assert (after.phase, after.step) == ("scoring", 6)
    assert after.allowance_s < 5 * SLACK_S


@pytest.mark.parametrize("rank", [0, 1])
def test_who_waits_while_rank_zero_brings_weights_to_engines_may_be_silent(
    tmp_path: Path, heartbeat: Heartbeat, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    monkeypatch.setattr(reinforcer_module, "gather_model", lambda model, world: object())
    world = Watched(rank, tmp_path, lambda: None)
    reinforcer = reinforcer_of(tmp_path, heartbeat, world, InstantRollouts(settings()) if rank == 0 else None)
    reinforcer.roll_back()
    (waiting,) = world.seen  # type: ignore[attr-defined]
    assert waiting.phase == "publish"
    assert (waiting.allowance_s > A_DAY_S) == (rank == 1)
    assert beat_of(tmp_path).allowance_s < 5 * SLACK_S


def test_engines_that_load_slowly_are_waited_for_with_beats(tmp_path: Path) -> None:
    beats: list[None] = []
    with (
        served(ScriptedEngine(load_s=1.0)) as urls,
        rollouts_of(settings_of(), urls, tmp_path) as rollouts,
    ):
        rollouts.publish(0, write_nothing, lambda: beats.append(None))
    assert len(beats) >= 5


def test_answers_that_take_long_are_waited_for_with_beats(tmp_path: Path) -> None:
    beats: list[None] = []
    engine = ScriptedEngine(play=lambda number: 1.0, max_batch_size=64)
    with served(engine) as urls, rollouts_of(settings_of(), urls, tmp_path) as rollouts:
        rollouts.publish(0, write_nothing)
        rollouts.take(0, lambda: beats.append(None))
    assert len(beats) >= 5


def test_an_engine_may_take_the_time_of_its_answers_and_of_a_start_to_load(tmp_path: Path) -> None:
    engine = ScriptedEngine(load_s=1.0)
    changed = settings_of(rollouts_start_timeout_s=0.5, rollouts_timeout_s=10.0)
    with served(engine) as urls, rollouts_of(changed, urls, tmp_path) as rollouts:
        take_all(rollouts, 1)
    assert [body["timeout_s"] for body in engine.loads] == [10.5]


def test_no_longer_time_to_load_is_named_than_an_engine_takes(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    with served(engine) as urls, rollouts_of(settings_of(rollouts_timeout_s=1e6), urls, tmp_path) as rollouts:
        rollouts.publish(0, write_nothing)
    assert [body["timeout_s"] for body in engine.loads] == [A_DAY_S]
