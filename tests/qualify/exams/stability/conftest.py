"""A context as the exam gets it, without the exam."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crosschip.chips import find_chip
from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.finding import ExamRecord, Role, Tier
from crosschip.qualify.journal import Journal, JournalState, read_journal
from crosschip.qualify.subjects.subject import load_subject
from tests.qualify.conftest import TINY, trace_of


@pytest.fixture
def context_on(tmp_path: Path) -> Callable[..., ExamContext]:
    """`context_on(chip, ...)`; what its journal says is `said(context)`."""

    def make(
        chip_spec: str = "sim",
        role: Role = "train",
        origin: str = TINY,
        tier: Tier = "smoke",
        budget_s: float = 30.0,
        **others: Any,
    ) -> ExamContext:
        trace = trace_of(origin, role, torch.float32)
        return ExamContext(
            exam="stability",
            chip=find_chip(chip_spec),
            chip_spec=chip_spec,
            role=role,
            tier=tier,
            subject=load_subject(origin),
            trace=trace,
            journal=Journal(tmp_path / "journal.jsonl"),
            budget_s=budget_s,
            reproducers=tmp_path / "reproducers",
            **others,
        )

    return make


@pytest.fixture
def said(tmp_path: Path) -> Callable[[], JournalState]:
    """What the journal says so far."""
    return lambda: read_journal(tmp_path / "journal.jsonl", "stability")


@pytest.fixture
def record_of(said: Callable[[], JournalState]) -> Callable[[], ExamRecord]:
    """The record so far."""
    return lambda: said().record
