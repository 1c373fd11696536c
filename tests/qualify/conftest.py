"""Exams run in this process on the simulated chip with faults planted; the command has a process for each."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from crosschip.chips import find_chip
from crosschip.chips.simulated import activate, plant
from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.finding import ExamRecord, Role, Tier
from crosschip.qualify.journal import Journal, read_journal
from crosschip.qualify.subjects.subject import load_subject
from crosschip.qualify.tracing.record import record_trace
from crosschip.qualify.tracing.trace import Trace

FIRST = str(Path(__file__).parent.parent.parent / "recipes" / "first.toml")
TINY = "tests.qualify.tiny:subject"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Many small calls beside other work: a second thread would mostly wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def trace_of(origin: str, role: Role, dtype: torch.dtype) -> Trace:
    """The trace of a subject's step, recorded once a session."""
    activate("sim")
    plant([])
    return record_trace(load_subject(origin), role, dtype)


@pytest.fixture
def first_trace() -> Callable[[Role], Trace]:
    """The trace of the shipped recipe for a role."""
    return lambda role: trace_of(FIRST, role, torch.bfloat16)


@pytest.fixture
def examine_on(tmp_path: Path) -> Callable[..., ExamRecord]:
    """`examine_on(exam, faults, ...)` runs an exam on the simulated chip and returns its record."""
    number = 0

    def examine(
        exam: str,
        faults: Any = None,
        role: Role = "train",
        tier: Tier = "smoke",
        budget_s: float = 60.0,
        origin: str = TINY,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        chip_spec: str = "sim",
        trace: Trace | None = None,
    ) -> ExamRecord:
        nonlocal number
        number += 1
        traced = trace or trace_of(origin, role, dtype)
        planted: Sequence[Any] = faults if isinstance(faults, list) else [faults] if faults is not None else []
        chip = find_chip(chip_spec)
        journal_path = tmp_path / f"journal-{number}.jsonl"
        context = ExamContext(
            exam=exam,
            chip=chip,
            chip_spec=chip_spec,
            role=role,
            tier=tier,
            subject=load_subject(origin),
            trace=traced,
            journal=Journal(journal_path),
            budget_s=budget_s,
            reproducers=tmp_path / "reproducers",
            seed=seed,
        )
        plant(list(planted))
        try:
            importlib.import_module(f"crosschip.qualify.exams.{exam}.exam").examine(context)
        finally:
            plant([])
        return read_journal(journal_path, exam).record

    return examine


@pytest.fixture
def honest_afterwards() -> Iterator[None]:
    """A simulated chip, without the faults that the test plants once it is over."""
    activate("sim")
    yield
    plant([])
