"""What a stage opens beside its model: checkers in as many processes as the recipe or the machine says."""

from __future__ import annotations

from typing import Any, cast
from unittest.mock import MagicMock

import pytest
import torch
from pydantic import ValidationError

from crosschip.train.rl import stage
from crosschip.train.rl.event_queue import EventQueue
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
    assert opened == [([("arithmetic", 1.0)], 3.0, expected)]


@pytest.mark.parametrize("fault", [{"reward_timeout_s": 1e10}, {"reward_workers": 0}])
def test_times_and_numbers_that_cannot_be_are_refused(fault: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(fault))):
        settings(**fault)


def test_events_can_be_written_down() -> None:
    events = EventQueue()
    events.put("mismatch", "\udcff KL", "dropped \ud800")
    assert events.taken() == [("mismatch", "? KL", "dropped ?")]
