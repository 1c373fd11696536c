"""A problem's reproducer: which check shows it, and that looking for one comes to an end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from crosschip.qualify.exams.operators import problem
from crosschip.qualify.finding import ExamRecord, Finding
from crosschip.qualify.tracing.trace import Trace, TracedCall
from tests.qualify.exams.operator_faults import tensor
from tests.qualify.planted import On

Examine = Callable[..., ExamRecord]

ROOT = Path(__file__).parent.parent.parent.parent


class OverwritesItsInput:
    """The kernel uses its input as scratch memory."""

    name = "overwrites its input"

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Callable[..., Any]) -> Any:
        result = compute(*args, **kwargs)
        if op._schema.name == "aten::silu":
            args[0][(-1,) * args[0].dim()] = 0.0
        return result


class CopiesTransposed:
    """A view that is a copy, densely laid out."""

    name = "copies instead of a view"

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Callable[..., Any]) -> Any:
        result = compute(*args, **kwargs)
        return result.contiguous() if op._schema.name == "aten::transpose" else result


class GivesAnEarlierResult:
    """Every seventh call gets what the call before it in the same shape has got."""

    name = "gives an earlier result"

    def __init__(self) -> None:
        self.results: dict[torch.Size, torch.Tensor] = {}
        self.count = 0

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Callable[..., Any]) -> Any:
        result = compute(*args, **kwargs)
        if op._schema.name != "aten::silu":
            return result
        self.count += 1
        earlier = self.results.get(result.shape)
        self.results[result.shape] = result.clone()
        return earlier if earlier is not None and self.count % 7 == 0 else result


def one_call(operator: str, *args: Any) -> Trace:
    call = TracedCall("c0", operator, list(args), {}, [], 1, 0.01, ["forward"])
    return Trace("made by hand", "train", "float32", [call])


def the_failure(record: ExamRecord) -> Finding:
    (found,) = [each for each in record.findings if each.verdict == "FAIL"]
    return found


def ends_with(file: Path, fault: str) -> int:
    """The exit code of a reproducer on the simulated chip with a fault of this module; honest if `fault` is empty."""
    spec = f"sim:tests.qualify.exams.test_problem:{fault}" if fault else "sim"
    environment = {**os.environ, "CROSSCHIP_SIM": spec, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(file), "--device", "sim"], capture_output=True, timeout=300, check=False, env=environment
    )
    return done.returncode


@pytest.mark.parametrize(
    ("fault", "trace", "words"),
    [
        (OverwritesItsInput, one_call("aten.silu.default", tensor(30, 20)), "must not write it"),
        (CopiesTransposed, one_call("aten.transpose.int", tensor(6, 5), 0, 1), "strides"),
        (GivesAnEarlierResult, one_call("aten.silu.default", tensor(30, 20)), "silu"),
    ],
)
def test_the_file_shows_it(examine_on: Examine, tmp_path: Path, fault: Any, trace: Trace, words: str) -> None:
    found = the_failure(examine_on("operators", fault(), trace=trace))
    assert words in found.message
    assert found.reproducer is not None
    file = tmp_path / "reproducers" / found.reproducer
    assert ends_with(file, fault.__name__) == 1
    assert ends_with(file, "") == 0


def test_looking_for_a_check_comes_to_an_end(examine_on: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that shows once, on a call of which each takes four seconds: the exam must not seem to hang."""
    clock = SimpleNamespace(now=0.0)

    def takes_four_seconds(result: torch.Tensor) -> torch.Tensor:
        clock.now += 4.0
        return result * 2 if fault.count == 1 else result

    fault = On("silu", change=takes_four_seconds)
    monkeypatch.setattr(problem, "time", SimpleNamespace(monotonic=lambda: clock.now))
    found = the_failure(examine_on("operators", fault, trace=one_call("aten.silu.default", tensor(30, 20))))
    assert found.reproducer is None
    assert fault.count < 10
