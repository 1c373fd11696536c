"""Rows of a served model in other batches: the chip is blamed for what the CPU does not do as well."""

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
from crosschip.chips.simulated import plant
from crosschip.qualify.exams.context import ExamContext
from crosschip.qualify.exams.determinism import serve_rows
from crosschip.qualify.finding import ExamRecord
from crosschip.qualify.journal import Journal, read_journal
from crosschip.qualify.subjects.callable_subject import CallableSubject
from crosschip.qualify.subjects.subject import Workload
from crosschip.qualify.tracing.trace import Trace
from tests.qualify.broken_chip import Broken

DEPENDENT = "depend on each other on the CPU, too"
ON_TIME = {  # the first dimension is time: a row's result is of all before it
    "lstm": lambda: nn.LSTM(16, 32),
    "gru": lambda: nn.GRU(16, 32),
    "attention": lambda: nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32), nn.LSTM(16, 8)),
}


def examine(make: Callable[[], nn.Module], chip: str, dtype: str, path: Path) -> ExamRecord:
    subject = CallableSubject("made", "tests.made:subject", lambda: (make(), torch.randn(12, 4, 16)))
    journal = path / "journal.jsonl"
    context = ExamContext(
        "determinism", find_chip(chip), chip, "serve", "smoke", subject,
        Trace("made", "serve", dtype, []), Journal(journal), 60.0, path,
    )  # fmt: skip
    serve_rows.examine_serve_rows(context)
    return read_journal(journal, "determinism").record


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chip", ["cpu", "sim", "sim:noisy"])
@pytest.mark.parametrize("name", ON_TIME)
def test_an_honest_chip_is_not_blamed_for_rows_that_are_steps_in_time(
    name: str, chip: str, dtype: str, tmp_path: Path, honest_afterwards: None
) -> None:
    record = examine(ON_TIME[name], chip, dtype, tmp_path)
    assert record.verdict == "PASS", record.findings
    assert any(DEPENDENT in line for line in record.not_covered)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_faulty_chip_is_seen_where_rows_depend_on_each_other(
    dtype: str, tmp_path: Path, honest_afterwards: None
) -> None:
    def off(op: Any, args: Any, kwargs: Any, compute: Callable[..., Any]) -> Any:
        return compute(*args, **kwargs) * 1.1

    find_chip("sim")
    plant([Broken(off, ("aten.mm.", "aten.addmm."))])
    record = examine(ON_TIME["gru"], "sim", dtype, tmp_path)
    assert record.verdict == "FAIL"
    assert "not the CPU's in the same batches" in record.findings[0].message


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU])
def test_rows_are_those_of_the_output_and_not_the_layers_of_a_state(make: Any, tmp_path: Path) -> None:
    record = examine(lambda: make(16, 32, batch_first=True), "cpu", "float32", tmp_path)
    assert (record.verdict, record.not_covered) == ("PASS", [])
    assert all(each["largest_difference"] < 1e-6 for each in record.measurements)


def test_rows_of_masked_logits_are_the_same_in_every_batch_and_a_lost_mask_is_seen() -> None:
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    logits[:, 3], logits[:, 4] = -math.inf, math.nan

    def given(alone: float) -> Workload:
        def rows(numbers: list[int]) -> torch.Tensor:
            found = logits[numbers].clone()
            found[:, 3] = alone if len(numbers) == 1 else -math.inf
            return found

        return cast(Workload, SimpleNamespace(serve_rows=rows))

    assert not bool(serve_rows._served(given(-math.inf)).changes().any())
    assert serve_rows._served(given(0.0)).changes()[:3].tolist() == [math.inf] * 3
