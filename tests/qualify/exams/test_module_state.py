"""Modules that keep more than real tensors are rehearsed: extra state of any kind, complex weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from crosschip.chips import find_chip
from crosschip.chips.simulated import plant
from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.rehearsal import exam as rehearsal
from crosschip.qualify.exams.rehearsal.coupled_steps import compare_step, reference_step, take_coupled_step
from crosschip.qualify.exams.rehearsal.module_state import copy_state, load_state
from crosschip.qualify.finding import ExamRecord, Role
from crosschip.qualify.journal import Journal, read_journal
from crosschip.qualify.subjects.callable_subject import CallableSubject
from crosschip.qualify.tracing.trace import Trace
from tests.qualify.broken_chip import Broken


class Counting(nn.Linear):
    """A layer whose scale stands in a dictionary, beside a count that its forward changes in place."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.kept: dict[str, Any] = {"scale": 2.0, "calls": [0]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept["calls"][0] += 1
        return super().forward(x) * self.kept["scale"]

    def get_extra_state(self) -> Any:
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        self.kept = state


class Spectral(nn.Module):
    """A product of complex numbers between two Fourier transforms."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(9, 9, dtype=torch.complex64) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) @ self.weight)


def subject_of(make: Callable[[], nn.Module], width: int) -> CallableSubject:
    return CallableSubject("made", "tests.made:subject", lambda: (make(), torch.randn(6, width)))


def rehearse(make: Callable[[], nn.Module], width: int, role: Role, path: Path) -> ExamRecord:
    context = ExamContext(
        "rehearsal", find_chip("sim"), "sim", role, "smoke", subject_of(make, width),
        Trace("made", role, "float32", []), Journal(path / "journal.jsonl"), 40.0, path,
    )  # fmt: skip
    rehearsal.examine(context)
    return read_journal(path / "journal.jsonl", "rehearsal").record


def test_a_state_may_be_given_twice_and_what_was_kept_does_not_change() -> None:
    module, one, other = Counting(), Counting(), Counting()
    state = copy_state(module)
    for each in (module, one):
        load_state(each, state)
        each(torch.ones(1, 8))
    load_state(other, state)
    assert (one.kept["calls"], other.kept["calls"], state["_extra_state"]["calls"]) == ([1], [0], [0])
    assert torch.equal(one.weight, module.weight)


@pytest.mark.parametrize("role", ["train", "serve"])
@pytest.mark.parametrize(("make", "width"), [(Counting, 8), (Spectral, 16)])
def test_an_honest_chip_passes(
    make: Callable[[], nn.Module], width: int, role: Role, tmp_path: Path, honest_afterwards: None
) -> None:
    record = rehearse(make, width, role, tmp_path)
    assert [each for each in record.findings if each.verdict == "FAIL"] == []
    assert record.num_checks["train step" if role == "train" else "serving step"]


@pytest.mark.parametrize("role", ["train", "serve"])
def test_a_chip_that_loses_imaginary_parts_fails(role: Role, tmp_path: Path, honest_afterwards: None) -> None:
    def lose(op: Any, args: Any, kwargs: Any, compute: Callable[..., Any]) -> Any:
        made = compute(*args, **kwargs)
        return torch.complex(made.real, made.imag * 0.9) if made.is_complex() else made

    find_chip("sim")
    plant([Broken(lose, ("aten.mm.",))])
    assert rehearse(Spectral, 16, role, tmp_path).verdict == "FAIL"


def test_imaginary_parts_of_gradients_and_updates_are_compared() -> None:
    reference, same = (subject_of(Spectral, 16).workload(torch.device("cpu"), torch.float32) for _ in range(2))
    right = reference_step(reference, 0)
    taken = take_coupled_step(same, right)
    found = compare_step(right, taken)
    assert (found.gradients["weight"].error, found.updates["weight"]) == (0.0, 0.0)
    taken.gradients["weight"].imag.mul_(2.0)
    taken.moved["weight"].imag.add_(1.0)
    wrong = compare_step(right, taken)
    assert wrong.gradients["weight"].error > 0.1
    assert wrong.updates["weight"] > 10 * wrong.update_limits["weight"]
