"""Losses that are negative, zero or pass through zero: an honest device is not accused, a wrong loss is."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from crosschip.chips import find_chip
from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.rehearsal import exam as rehearsal
from crosschip.qualify.exams.rehearsal.coupled_steps import StepComparison, TensorComparison
from crosschip.qualify.exams.rehearsal.judgement import Coupled, judge_coupled, judge_curves
from crosschip.qualify.journal import Journal, read_journal
from crosschip.qualify.judging.training_equivalence import loss_scale
from crosschip.qualify.subjects.callable_subject import CallableSubject
from crosschip.qualify.subjects.subject import StepMeasure
from crosschip.qualify.tracing.trace import Trace

NEGATIVE = [-1.0, -1.1, -1.2, -1.3]
THROUGH_ZERO = [1.0, 0.0, -1.0, -0.5]
NOUGHT = [0.0, 0.0, 0.0, 0.0]


class Away(nn.Module):
    """A loss below zero: the negative mean square of what a layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -self.layer(x).square().mean()


class ZeroHead(nn.Module):
    """A head that begins with zeros: its mean square, which is the loss, is 0 in every step and gives no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize("kind", [Away, ZeroHead])
def test_a_loss_without_a_sign_is_no_failure_of_the_cpu(
    kind: type[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "_STEPS", 12)
    monkeypatch.setattr(rehearsal, "_SIZES", {"smoke": rehearsal._Size(2, 2)})
    monkeypatch.setattr(rehearsal, "rehearse_sharded", lambda context: None)
    subject = CallableSubject("made", "tests.made:subject", lambda: (kind(), torch.randn(4, 4)))
    path = tmp_path / "journal.jsonl"
    context = ExamContext(
        "rehearsal", find_chip("cpu"), "cpu", "train", "smoke", subject,
        Trace("made", "train", "float32", []), Journal(path), 300.0, tmp_path,
    )  # fmt: skip
    rehearsal.examine(context)
    record = read_journal(path, "rehearsal").record
    assert record.verdict == "PASS", record.findings
    assert any(each["kind"] == "loss curve" for each in record.measurements)


def coupled(losses: list[float], off: float) -> list[Coupled]:
    """Steps whose gradients agree, with a loss that is off by so much."""
    same = TensorComparison(0.0, 0.0, 1.0)
    right = [
        StepComparison(step, StepMeasure(loss, 1.0), loss, {"w": same}, {}, {}) for step, loss in enumerate(losses)
    ]
    return [
        Coupled(0, replace(step, measure=StepMeasure(step.measure.loss + off * (1.0 + step.index % 2 / 10), 1.0)), step)
        for step in right
    ]


@pytest.mark.parametrize("losses", [NEGATIVE, THROUGH_ZERO])
def test_the_loss_of_coupled_steps_is_judged_whatever_its_sign(losses: list[float]) -> None:
    assert judge_coupled(coupled(losses, 1e-6)).evidence == []
    (evidence,) = judge_coupled(coupled(losses, 0.2)).evidence
    assert evidence.check == "loss"


def test_what_rounding_does_to_a_loss_that_is_nearly_nought_is_no_evidence() -> None:
    """As where the terms of a loss cancel: the honest control is as far from the reference as the chip."""
    steps = [
        replace(step, noisy=replace(step.noisy, measure=StepMeasure(-3e-9, 1.0))) for step in coupled(NOUGHT, 1e-9)
    ]
    assert judge_coupled(steps).evidence == []


@pytest.mark.parametrize("losses", [NEGATIVE, THROUGH_ZERO, NOUGHT])
def test_final_losses_are_compared_whatever_their_sign(losses: list[float]) -> None:
    found, control = judge_curves([losses, losses], [losses, losses], [losses, losses])
    assert found.shown == "equivalent"
    assert control is not None
    assert control.shown == "equivalent"
    wrong = [[loss + 0.2 for loss in losses], [loss + 0.21 for loss in losses]]
    found, _ = judge_curves(wrong, [losses, losses], None)
    assert found.shown == "different"
    assert found.mean > 0.0


def test_a_positive_loss_is_its_own_scale_however_far_it_falls() -> None:
    assert loss_scale(0.5, [3.0, 1.0, 0.5]) == 0.5
    assert loss_scale(-0.5, [3.0, 1.0, -0.5]) == 3.5
    assert loss_scale(-4.0, [-3.0, -4.0]) == 4.0
    assert 0.0 < loss_scale(0.0, [0.0, 0.0]) < math.ulp(1.0)
