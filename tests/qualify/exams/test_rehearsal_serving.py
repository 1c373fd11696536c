"""Serving in rehearsal: the seeds have to be independent draws, also of a subject whose inputs never change."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.rehearsal import serving
from crosschip.qualify.judging.rounding_noise import RoundingNoise
from crosschip.qualify.subjects.subject import load_subject

CPU = torch.device("cpu")
SUBJECT = load_subject("tests.qualify.tiny:subject")  # one scalar of the same module and inputs, whatever the seed
CONTEXT = cast(ExamContext, SimpleNamespace(workload=SUBJECT.workload))


def trained(num_steps: int) -> serving.Weights:
    workload = SUBJECT.workload(CPU, torch.float32, 0, small=True)
    for index in range(num_steps):
        workload.train_step(index)
    return serving._state(workload)


def alarms(weights: serving.Weights, chip_seed: int) -> list[Any]:
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
    first, again, other = (serving.drawn_again({"weight", "counts"}, weights, seed) for seed in (1, 1, 2))
    assert list(first) == ["weight"]
    assert torch.equal(first["weight"], again["weight"])
    assert not torch.equal(first["weight"], other["weight"])
    assert 0.01 < float((first["weight"] - 1).std()) < 0.02
