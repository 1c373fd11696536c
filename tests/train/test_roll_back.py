"""Weights that have gone wrong: the training goes back to a checkpoint from before that, whenever it has saved."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from crosschip.recipe import Recipe
from crosschip.train import loop
from crosschip.train.step import StepResult, train_step
from tests.train.launched import lines

Spoil = Callable[[int], None]


@pytest.fixture
def recipe(tiny) -> Recipe:
    """Pre-training of ten steps that saves after every second."""
    seldom = ("train.validate_every=100", "train.sample_every=100")
    changed: Recipe = tiny("train.checkpoint_every=2", *seldom).model_copy(update={"sft": None})
    return changed


@pytest.fixture
def spoil_after(monkeypatch) -> Spoil:
    """`spoil_after(step)`: once, no step can be computed any more with the weights after that one."""

    def plant(at: int) -> None:
        struck: list[int] = []

        def train_and_spoil(model: Any, optimizer: Any, batch: Any, settings: Any, dtype: Any, step: int, *rest: Any):
            result = train_step(model, optimizer, batch, settings, dtype, step, *rest)
            if step == at and not struck:
                struck.append(step)
                torch.nn.init.constant_(model.norm.weight, float("inf"))
            return result

        monkeypatch.setattr(loop, "train_step", train_and_spoil)

    return plant


def test_what_is_due_while_steps_are_skipped_is_not_saved(recipe, train, spoil_after, tmp_path, capsys) -> None:
    spoil_after(5)  # so that steps 6 to 8 are skipped, and step 9 goes back
    train(recipe)
    assert "pretrain: back after step 4\n" in capsys.readouterr().err
    stage = tmp_path / "run/train/pretrain"
    told = [line for line in lines(stage / "events.jsonl") if line["event"] == "non-finite"]
    assert [line["step"] for line in told] == [6, 7, 8, 9]
    metrics = lines(stage / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 11))
    assert not any("skipped" in line for line in metrics)
    assert sorted(path.name for path in (stage / "checkpoints").iterdir()) == ["step-00000008", "step-00000010"]


def test_what_was_saved_just_before_the_first_skipped_step_is_not_gone_back_to(
    recipe, train, spoil_after, tmp_path, capsys
) -> None:
    spoil_after(4)
    train(recipe)
    assert "pretrain: back after step 2\n" in capsys.readouterr().err
    stage = tmp_path / "run/train/pretrain"
    assert (stage / "checkpoints/damaged-step-00000004").is_dir()
    (aside,) = [line for line in lines(stage / "events.jsonl") if line["event"] == "checkpoint-set-aside"]
    assert str(aside["detail"]).endswith("step-00000004")
    assert not any("skipped" in line for line in lines(stage / "metrics.jsonl"))


def test_what_a_signal_has_saved_while_steps_were_skipped_is_gone_on_from_and_left_again(
    recipe, train, train_with_signal, spoil_after, tmp_path, capsys
) -> None:
    spoil_after(5)
    stopped = train_with_signal(recipe, "run", "pretrain", 7, signal.SIGTERM)
    assert (stopped.exit_code, stopped.checkpoint.name) == (143, "step-00000007")
    assert train(recipe, resume=True).exit_code == 0
    told = capsys.readouterr().err
    assert "pretrain: going on after step 7" in told
    assert "pretrain: back after step 4\n" in told
    assert not any("skipped" in line for line in lines(tmp_path / "run/train/pretrain/metrics.jsonl"))


def test_a_save_that_was_due_in_a_skipped_step_follows_the_next_one(tiny, train, monkeypatch, tmp_path) -> None:
    def train_and_skip(*arguments: Any) -> StepResult:
        result, step = train_step(*arguments), arguments[5]
        return dataclasses.replace(result, updated=False) if step == 4 else result

    monkeypatch.setattr(loop, "train_step", train_and_skip)
    train(
        tiny("train.checkpoint_every=2", "train.keep_checkpoints=9", "train.steps=8").model_copy(update={"sft": None})
    )
    saved = sorted(path.name for path in (tmp_path / "run/train/pretrain/checkpoints").iterdir())
    assert saved == [f"step-{step:08d}" for step in (2, 5, 6, 8)]
