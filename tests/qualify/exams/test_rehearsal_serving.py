"""Serving in rehearsal: seeds are independent draws, also of inputs that never change; masks and frozen modules."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from crosschip.chips import find_chip
from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.rehearsal import serving
from crosschip.qualify.exams.rehearsal.module_state import State, copy_state
from crosschip.qualify.finding import ExamRecord
from crosschip.qualify.journal import Journal, read_journal
from crosschip.qualify.judging.rounding_noise import RoundingNoise
from crosschip.qualify.subjects.callable_subject import CallableSubject
from crosschip.qualify.subjects.subject import load_subject
from crosschip.qualify.tracing.trace import Trace

CPU = torch.device("cpu")
SUBJECT = load_subject("tests.qualify.tiny:subject")  # one scalar of the same module and inputs, whatever the seed
CONTEXT = cast(ExamContext, SimpleNamespace(workload=SUBJECT.workload))


def trained(num_steps: int) -> State:
    workload = SUBJECT.workload(CPU, torch.float32, 0, small=True)
    for index in range(num_steps):
        workload.train_step(index)
    return copy_state(workload.module)


def alarms(weights: State, chip_seed: int) -> list[Any]:
    """What is said against a chip whose only fault is to round once more, in its own way and always alike."""
    drawn = []
    for seed in range(6):

        def logits(dtype: torch.dtype, noise: int | None = None, seed: int = seed) -> torch.Tensor:
            workload = serving._loaded(CONTEXT, CPU, dtype, seed, weights)
            if noise is None:
                return workload.serve_step()
            with RoundingNoise(noise):
                return workload.serve_step()

        reference = logits(torch.float32)
        controls = [logits(torch.bfloat16), logits(torch.bfloat16, noise=seed)]
        honest = [serving.compare_answers(each, reference) for each in controls]
        chip = serving.compare_answers(logits(torch.bfloat16, noise=chip_seed), reference)
        drawn.append((chip, honest, True))
    return serving.judge_answers(drawn, 0)


def test_one_rounding_seen_in_every_seed_is_no_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, chips = trained(5), (1001, 1003, 1018)
    assert not any(alarms(weights, chip) for chip in chips)
    monkeypatch.setattr(serving, "drawn_again", lambda parameters, weights, seed: {})
    assert all(alarms(weights, chip) for chip in chips)  # the seeds that stand here are those of false alarms


def test_parameters_are_drawn_again_by_seed_alone_and_buffers_are_left() -> None:
    weights = {"weight": torch.ones(1000), "table": torch.ones(4), "counts": torch.ones(3, dtype=torch.int64)}
    weights["complex"] = torch.full((1000,), 1j)
    drawn = ["weight", "complex", "counts"]
    first, again, other = (serving.drawn_again(drawn, weights, seed) for seed in (1, 1, 2))
    assert list(first) == ["weight", "complex"]
    assert 0.01 < float((first["complex"].imag - 1).std()) < 0.02
    assert torch.equal(first["weight"], again["weight"])
    assert not torch.equal(first["weight"], other["weight"])
    assert 0.01 < float((first["weight"] - 1).std()) < 0.02


class Masked(nn.Module):
    """Logits of which a mask forbids some, and in one row all but one."""

    def __init__(self, forbidden: float = -math.inf) -> None:
        super().__init__()
        self.layer, self.forbidden = nn.Linear(4, 6), forbidden

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(4, 6, dtype=torch.bool)
        mask[:, 2] = mask[1, 1:] = True
        return self.layer(x).masked_fill(mask, self.forbidden)


class Ungraded(nn.Module):
    """A loss that was computed without a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).square().mean()


class Refusing(Masked):
    """A module that raises in training mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            raise NotImplementedError("made to be served")
        return super().forward(x)


class AllForbidden(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * math.nan


def serve(make: Callable[[], nn.Module], tmp_path: Path) -> ExamRecord:
    """The record of serving the module on the CPU."""
    path = tmp_path / "journal.jsonl"
    subject = CallableSubject("made", "tests.made:subject", lambda: (make(), torch.randn(4, 4)))
    context = ExamContext(
        "rehearsal", find_chip("cpu"), "cpu", "serve", "smoke", subject,
        Trace("made", "serve", "float32", []), Journal(path), 300.0, tmp_path,
    )  # fmt: skip
    serving.rehearse_serving(context)
    return read_journal(path, "rehearsal").record


@pytest.mark.parametrize("make", [nn.ReLU, Ungraded, Refusing, lambda: nn.Linear(4, 6).requires_grad_(False)])
def test_a_module_that_cannot_be_trained_is_served_with_its_first_weights(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    record = serve(make, tmp_path)
    assert record.verdict == "PASS", record.findings
    assert record.num_checks["serving step"] == 6
    assert any("trained weights" in line for line in record.not_covered)


def test_logits_that_a_mask_forbids_are_no_failure(tmp_path: Path) -> None:
    record = serve(Masked, tmp_path)
    assert record.verdict == "PASS", record.findings
    (measured,) = record.measurements
    assert all(math.isfinite(value) for value in measured["noisy_control"].values())
    assert measured["noisy_control"]["error"] > 0.0


def test_logits_of_which_none_is_finite_decide_nothing(tmp_path: Path) -> None:
    record = serve(lambda: AllForbidden(4, 6), tmp_path)
    assert record.verdict == "INCONCLUSIVE"
    assert "on the CPU no logit is finite" in record.findings[0].message


def test_infinities_must_stand_where_the_reference_has_them() -> None:
    right = torch.tensor([[1.0, -math.inf, 2.0], [math.nan, math.inf, 3.0]])
    assert serving._is_as_finite(right + 1e-6, right)
    for place, value in (((0, 1), 5.0), ((0, 1), math.inf), ((0, 1), math.nan), ((1, 0), 0.0), ((0, 0), -math.inf)):
        wrong = right.clone()
        wrong[place] = value
        assert not serving._is_as_finite(wrong, right)


def test_answers_are_compared_where_the_reference_is_finite() -> None:
    right = torch.tensor([[1.0, -math.inf, 2.0, 0.0], [math.nan] * 4])
    plain = torch.tensor([[1.0, 2.0, 0.0]])
    off = torch.tensor([0.1, 0.0, 0.0])
    found = serving.compare_answers(right + torch.tensor([0.1, 0.0, 0.0, 0.0]), right)
    expected = serving.compare_answers(plain + off, plain)
    assert vars(found) == pytest.approx(vars(expected))
    assert expected.error > 0.0
