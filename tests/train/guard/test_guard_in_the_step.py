"""The guard inside of the real training step: what it prevents, and that what goes on has the right bits."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from crosschip.data import Batch
from crosschip.model import ModelConfig, Transformer, init_weights
from crosschip.recipe import GuardSettings, StageSettings
from crosschip.train.guard.hook import GuardError, ReplayStep, RollBack, StepGuard
from crosschip.train.guard.observed import Event
from crosschip.train.guard.run_files import EventLog, committed_steps
from crosschip.train.optimizer import build_optimizer
from crosschip.train.step import StepHooks, train_step

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
    num_nextn_predict_layers=1, num_attention_heads=2, n_routed_experts=4, kv_lora_rank=16, qk_rope_head_dim=8,
    qk_nope_head_dim=8, v_head_dim=8,
)  # fmt: skip
STEPS = 40
STAGE = StageSettings(steps=STEPS, batch_size=8, warmup_steps=0, dtype="float32")


def batches() -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(1)
    while True:
        tokens = torch.randint(0, 64, (8, 17), generator=generator)
        yield Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].clone())


def train(
    settings: GuardSettings, harm: Callable[[int, int, Transformer], None]
) -> tuple[dict[str, torch.Tensor], list[Event], list[str]]:
    """Train as a loop does; `harm(step, number of the computation, model)` acts on the gradients."""
    model = Transformer(CONFIG)
    init_weights(model, 0)
    optimizer = build_optimizer(model, STAGE)
    events: list[Event] = []
    guard = StepGuard(settings, STAGE.warmup_steps, "cpu", events.append, "a checkpoint")
    outcomes = []
    for step, batch in zip(range(1, STEPS + 1), batches(), strict=False):
        for number in itertools.count():
            hooks = StepHooks(
                after_backward=lambda model, sums, n=number, s=step: harm(s, n, model) or sums, judge=guard.judge
            )
            try:
                result = train_step(model, optimizer, batch, STAGE, torch.float32, step, 1e-3, hooks=hooks)
            except ReplayStep:
                continue
            outcomes.append("update" if result.updated else "skip")
            break
    return model.state_dict(), events, outcomes


def nothing(step: int, number: int, model: Transformer) -> None:
    pass


def poison(value: float, at: int, numbers: range) -> Callable[[int, int, Transformer], None]:
    def harm(step: int, number: int, model: Transformer) -> None:
        if step == at and number in numbers:
            next(p.grad for p in model.parameters() if p.grad is not None).mul_(value)

    return harm


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@functools.cache
def clean() -> dict[str, torch.Tensor]:
    weights, events, outcomes = train(GuardSettings(), nothing)
    assert (events, outcomes) == ([], ["update"] * STEPS)
    return weights


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_a_passing_fault_leaves_no_trace_in_the_weights(value: float) -> None:
    guarded, events, outcomes = train(GuardSettings(), poison(value, 35, range(1)))
    assert same(clean(), guarded)
    assert [(event.step, event.event) for event in events] == [(35, "transient-fault")]
    assert outcomes == ["update"] * STEPS


def test_the_comparison_sees_the_fault_without_a_guard() -> None:
    """The negative control: clipped to the usual size, the wrong gradient still moves the weights elsewhere."""
    warned, events, _ = train(GuardSettings(on_spike="warn"), poison(1e6, 35, range(5)))
    assert [event.event for event in events] == ["gradient-spike"]
    assert not same(clean(), warned)


def test_a_lasting_fault_of_one_batch_is_left_out() -> None:
    guarded, events, outcomes = train(GuardSettings(), poison(float("nan"), 35, range(5)))
    assert outcomes == ["update"] * 34 + ["skip"] + ["update"] * 5
    assert [(event.event, event.action) for event in events] == [("non-finite", "skipped the batch (1 of 3)")]
    assert all(bool(tensor.isfinite().all()) for tensor in guarded.values())


def test_a_fault_of_every_batch_goes_back_and_then_ends() -> None:
    def always(step: int, number: int, model: Transformer) -> None:
        if step > 33:
            for parameter in model.parameters():
                parameter.grad = None if parameter.grad is None else torch.zeros_like(parameter.grad)

    with pytest.raises(RollBack) as raised:
        train(GuardSettings(max_skips=2), always)
    assert (raised.value.step, raised.value.past_the_data) == (36, True)
    with pytest.raises(GuardError, match="step 34: zero-gradient: every gradient is exactly zero at loss"):
        train(GuardSettings(max_skips=0, max_roll_backs=0), always)


def test_an_audit_sees_a_gradient_that_is_only_a_little_wrong() -> None:
    guarded, events, _ = train(GuardSettings(audit_every=5), poison(1.0 + 2**-10, 35, range(1)))
    assert same(clean(), guarded)
    assert [(event.step, event.event) for event in events] == [(35, "transient-fault")]
    missed, no_events, _ = train(GuardSettings(audit_every=5), poison(1.0 + 2**-10, 36, range(1)))
    assert no_events == [], "the negative control: between two audits it goes unseen"
    assert not same(clean(), missed)


def test_events_and_progress_in_the_files_of_a_run(tmp_path: Path) -> None:
    said: list[str] = []
    log = EventLog(tmp_path, said.append)
    event = Event(3, "hang", "rank 0 in update: ...", "restarting")
    log("pretrain", event)
    assert not (tmp_path / "pretrain").exists(), "no stage has begun"
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "events.jsonl").write_text('{"step": 1}\n')
    log("pretrain", event)
    assert json.loads((tmp_path / "pretrain" / "events.jsonl").read_text().splitlines()[1]) == event.__dict__
    assert said == ["step 3: hang: rank 0 in update: ...; restarting"] * 2
    assert committed_steps(tmp_path) == 0
    for stage, step, is_whole in (("pretrain", 5, True), ("pretrain", 10, True), ("sft", 4, True), ("sft", 8, False)):
        path = tmp_path / stage / "checkpoints" / f"step-{step:08d}"
        path.mkdir(parents=True)
        if is_whole:
            (path / "COMPLETE").touch()
    assert committed_steps(tmp_path) == 14
