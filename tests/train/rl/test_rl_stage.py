"""What a stage opens beside its model: checkers in as many processes as the recipe or the machine says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import pytest
import torch
from pydantic import ValidationError

from crosschip.rewards import RewardTerm
from crosschip.train.group.world import ALONE, PATIENCE, World
from crosschip.train.guard.heartbeat import Heartbeat, read_beats
from crosschip.train.rl import stage
from crosschip.train.rl.event_queue import EventQueue
from crosschip.train.rl.scoring import HeldOutScore
from tests.train.rl.made import settings


@pytest.mark.parametrize(("asked", "cores", "expected"), [(None, 3, 3), (None, 64, 8), (12, 2, 12), (1, 8, 1)])
def test_checkers_run_in_as_many_processes_as_asked_for(
    monkeypatch: pytest.MonkeyPatch, asked: int | None, cores: int, expected: int
) -> None:
    opened: list[tuple[Any, ...]] = []
    monkeypatch.setattr(stage, "Rewarder", lambda *arguments: opened.append(arguments))
    monkeypatch.setattr(stage, "usable_cores", lambda: cores)
    for name in ("Problems", "engines_of", "Rollouts"):
        monkeypatch.setattr(stage, name, MagicMock())
    around = cast(stage.Surroundings, MagicMock())
    made = settings(reward_workers=asked, reward_timeout_s=3.0)
    stage._open_rollouts(made, around, torch.float32, EventQueue())
    assert opened == [([RewardTerm("arithmetic", 1.0)], 3.0, expected)]


@pytest.mark.parametrize("fault", [{"reward_timeout_s": 1e10}, {"reward_workers": 0}])
def test_times_and_numbers_that_cannot_be_are_refused(fault: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(fault))):
        settings(**fault)


@pytest.mark.parametrize("num_errors", [0, 3])
def test_held_out_answers_that_the_checker_could_not_tell_are_counted_and_told(
    monkeypatch: pytest.MonkeyPatch, num_errors: int
) -> None:
    monkeypatch.setattr(stage, "gather_model", lambda model, world: object())
    reinforcer = cast(Any, SimpleNamespace(model=None, events=EventQueue()))
    held_out = cast(Any, SimpleNamespace(score=lambda model, beat: HeldOutScore(4, 10, 7.0, num_errors)))
    numbers, told = stage._score(reinforcer, around(), lambda: held_out)
    assert numbers == {"score": 0.4, "answer_tokens": 7.0, "num_checker_errors": num_errors}
    events = reinforcer.events.taken()
    assert [event for event, _, _ in events] == ["checker failed"] * bool(num_errors)
    assert ("the checker failed on 3 of 10" in told) == bool(num_errors)


def test_a_rank_that_scores_is_seen_to_live_with_each_token_and_the_others_may_wait(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(stage, "gather_model", lambda model, world: object())
    seen = []

    def score(model: object, beat: Callable[[], None]) -> HeldOutScore:
        for _ in range(3):
            beat()
        seen.extend(read_beats(tmp_path))
        return HeldOutScore(4, 10, 7.0)

    held_out, reinforcer = cast(Any, SimpleNamespace(score=score)), cast(Any, SimpleNamespace(model=None))
    heartbeat = Heartbeat(tmp_path / "heartbeat-0", 0, 77.0)
    heartbeat.beat("validation", 5)
    (before,) = read_beats(tmp_path)
    stage._score(reinforcer, around(heartbeat), lambda: held_out)
    (after,) = seen
    assert (after.phase, after.allowance_s, after.num_beats) == ("validation", 77.0, before.num_beats + 3)
    told = ({"score": 0.4}, "")
    waits = cast(Any, SimpleNamespace(rank=1, from_rank_zero=lambda make: told))
    stage._score(reinforcer, around(heartbeat, waits), lambda: held_out)
    (waiting,) = read_beats(tmp_path)
    assert waiting.allowance_s == 77.0 + PATIENCE.total_seconds()


def around(heartbeat: Heartbeat | None = None, world: World = ALONE) -> stage.Surroundings:
    return cast(Any, SimpleNamespace(world=world, heartbeat=heartbeat or Heartbeat(None, 0, 600.0)))


def test_events_can_be_written_down() -> None:
    events = EventQueue()
    events.put("mismatch", "\udcff KL", "dropped \ud800")
    assert events.taken() == [("mismatch", "? KL", "dropped ?")]
