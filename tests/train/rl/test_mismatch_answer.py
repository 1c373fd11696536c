"""What is done about an engine beyond the bound, and what is said of the cause."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from crosschip.train.outer.errors import StepNotCommitted
from crosschip.train.rl import reinforcer as reinforcer_module
from crosschip.train.rl.objective import Agreement
from crosschip.train.rl.reinforcer import MismatchError
from crosschip.train.rl.rollouts.taken import TakenBatch
from tests.train.rl.made import settings
from tests.train.rl.test_rollouts_kept import Stage

MODEL = cast(Any, torch.nn.Linear(1, 1))
FAR = Agreement(torch.tensor([0]), torch.tensor([[10.0, 1.0, 0.2, 30.0, 1.0, 0.0]]))  # a KL of 3


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reinforcer_module, "gather_model", lambda model, world: object())


def stage_with_a_batch(directory: Path, versions_behind: int = 0, **rollouts: object) -> Stage:
    stage = Stage(directory, settings(rollouts=rollouts))
    take = stage.rollouts.take

    def take_later(version: int, beat: Any) -> TakenBatch:
        taken = take(version, beat)
        stage.reinforcer.version += versions_behind
        return taken

    stage.rollouts.take = take_later  # type: ignore[method-assign]
    stage.reinforcer.begin(0)
    stage.reinforcer.stream.batch(0, 8)
    stage.reinforcer._heard.append(FAR)
    return stage


@pytest.mark.parametrize("versions_behind", [0, 1])
def test_where_tokens_are_of_older_weights_the_learning_rate_is_named(tmp_path: Path, versions_behind: int) -> None:
    stage = stage_with_a_batch(tmp_path, versions_behind)
    with pytest.raises(MismatchError, match=r"a \(chip cpu\): KL 3.00e\+00") as raised:
        stage.reinforcer.after_backward(MODEL, cast(Any, None))
    assert ("100% of its tokens are of older weights" in raised.value.problem) == bool(versions_behind)
    assert ("rl.learning_rate" in raised.value.remedy) == bool(versions_behind)
    assert "its chip" in raised.value.remedy


def test_the_problems_of_a_batch_with_a_dropped_engine_are_asked_again(tmp_path: Path) -> None:
    stage = stage_with_a_batch(tmp_path, on_mismatch="drop")
    with pytest.raises(StepNotCommitted):
        stage.reinforcer.after_backward(MODEL, cast(Any, None))
    assert stage.rollouts.dropped == ["a"]
    assert stage.rollouts.ledger.to_ask_again == [0, 1]
    lost = [action for event, _, action in stage.events.taken() if event == "rollouts lost"]
    assert lost == ["they are not trained, and 2 problems are asked again"]


def test_the_panel_names_engine_and_chip(tmp_path: Path) -> None:
    stage = stage_with_a_batch(tmp_path, on_mismatch="warn")
    stage.reinforcer.after_backward(MODEL, cast(Any, None))
    numbers = stage.reinforcer.measured()
    assert numbers["a (cpu) mismatch_k3"] == numbers["mismatch_k3"] == 3.0
