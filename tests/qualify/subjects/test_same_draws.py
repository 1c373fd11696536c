"""Subjects that draw random numbers: compared where nothing is wrong, and still caught where something is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from crosschip.chips.simulated import plant
from crosschip.qualify.finding import ExamRecord, Finding
from crosschip.qualify.subjects.callable_subject import CallableSubject
from crosschip.qualify.subjects.same_draws import SameDraws, draws_numbers
from crosschip.qualify.subjects.subject import load_subject
from tests.qualify.broken_chip import Broken
from tests.qualify.conftest import trace_of

DRAWING = "tests.qualify.drawing:subject"
Examine = Callable[..., ExamRecord]


def failures(record: ExamRecord) -> list[Finding]:
    return [finding for finding in record.findings if finding.verdict == "FAIL"]


def test_which_subjects_draw() -> None:
    assert draws_numbers(trace_of(DRAWING, "train", torch.float32))
    assert not draws_numbers(trace_of("tests.qualify.tiny:subject", "train", torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_devices_draw_the_same_and_another_step_draws_others(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    losses = []
    for device in ("cpu", "sim:0"):
        workload = SameDraws(load_subject(DRAWING).workload(torch.device(device), dtype, 0, small=True), 0)
        weights = {name: each.clone() for name, each in workload.module.state_dict().items()}
        found = []
        for index in (0, 1, 0):
            workload.module.load_state_dict(weights)
            found.append(workload.train_step(index).loss)
        assert found[0] == found[2] != found[1]
        losses.append(found[:2])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if dtype == torch.float32 else 1e-2)
    assert torch.equal(torch.get_rng_state(), before)


class NoisyRecurrent(nn.Module):
    """A recurrent network over numbers that are drawn; it could drop, and does not."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.lstm(x + torch.randn_like(x))[0]
        return made


def test_a_recurrent_network_is_computed_on_the_chip(honest_afterwards: None) -> None:
    subject = CallableSubject("made", "tests.made:subject", lambda: (NoisyRecurrent(), torch.ones(5, 3, 4)))
    on_cpu, on_chip = (
        SameDraws(subject.workload(torch.device(device), torch.float32), 0) for device in ("cpu", "sim:0")
    )
    right = on_cpu.serve_step()
    assert torch.allclose(on_chip.serve_step(), right, atol=1e-6)
    plant([Broken(lambda op, args, kwargs, compute: compute(*args, **kwargs) * 1.05, ("aten.mm.",))])
    assert not torch.allclose(on_chip.serve_step(), right, atol=1e-3)


@pytest.mark.parametrize("exam", ["determinism", "rehearsal"])
def test_a_chip_is_not_blamed_for_the_draws(examine_on: Examine, exam: str) -> None:
    record = examine_on(exam, origin=DRAWING, budget_s=40.0)
    assert failures(record) == []


def test_a_fault_shows_among_the_draws(examine_on: Examine) -> None:
    def off(op: Any, args: Any, kwargs: Any, compute: Any) -> Any:
        return compute(*args, **kwargs) * 1.05

    record = examine_on("rehearsal", Broken(off, ("aten.mm.",)), origin=DRAWING, budget_s=40.0)
    assert failures(record)
