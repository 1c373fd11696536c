"""Complex numbers are rounded like real ones: another order of the sum is honest, a wrong result is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from crosschip.chips.faults.variants import Reordered
from crosschip.qualify.exams.operators import checks
from crosschip.qualify.exams.operators.plan import PlannedDraw
from crosschip.qualify.exams.operators.runs import Comparison, Inputs, compare, on_device
from crosschip.qualify.judging.judge import fails_alone
from crosschip.qualify.tracing.inputs import as_real, operator_named
from crosschip.qualify.tracing.one_call import deviation

CPU = torch.device("cpu")
SUM = operator_named("aten.sum.dim_IntList")
NUMBERS = torch.randn(64, 257, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
ENCODED: tuple[list[Any], dict[str, Any]] = ([{"tensor": {}}, [1]], {})


def reordered(factor: complex = 1.0) -> Callable[..., torch.Tensor]:
    """A sum over the last dimension from back to front, times a factor."""

    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        found: torch.Tensor = Reordered().operator(SUM, args, kwargs, SUM)
        return found * factor

    call._schema, call.is_view, call.tags = SUM._schema, False, SUM.tags  # type: ignore[attr-defined]
    return call


def compared(call: Any) -> Comparison:
    inputs = Inputs(ENCODED, (NUMBERS, [1]), {})
    into = Comparison()
    compare(SUM, inputs, on_device(call, inputs, CPU), on_device(SUM, inputs, CPU), into)
    return into


@pytest.mark.parametrize(("factor", "is_wrong"), [(1.0, False), (1.0 + 1e-4j, True), (1.0001, True)])
def test_a_sum_of_complex_numbers_is_judged_by_its_error(factor: complex, is_wrong: bool) -> None:
    found = compared(reordered(factor))
    assert found.wrong == []
    ((_, error),) = found.errors(PlannedDraw("made", ENCODED, 0))
    assert fails_alone(error) == is_wrong


@pytest.mark.parametrize(("factor", "is_wrong"), [(1.0, False), (1.0 + 1e-4j, True), (1.0001, True)])
def test_one_call_with_complex_numbers_is_judged_by_its_error(factor: complex, is_wrong: bool) -> None:
    got = reordered(factor)(NUMBERS, [1])
    assert not torch.equal(got, NUMBERS.sum(1))
    found = deviation(SUM, [NUMBERS, [1]], {}, [got])
    assert (found is not None) == is_wrong
    assert found is None or found[0] == "error ratio"


def test_a_nan_among_complex_numbers_must_stand_where_the_cpu_has_it() -> None:
    numbers = NUMBERS.clone()
    numbers[3, 5] = complex(float("nan"), 1.0)
    right = numbers.sum(1)
    assert deviation(SUM, [numbers, [1]], {}, [right.clone()]) is None
    right[3] = 1.0
    found = deviation(SUM, [numbers, [1]], {}, [right])
    assert found is not None
    assert "misplaced NaN" in found[0]


def test_a_reproducer_sees_the_error_of_complex_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"cpu": SUM, "chip": reordered(1.0001)}

    def outputs(device: str, operator: str, *rest: Any, wide: bool = False) -> list[torch.Tensor]:
        value = checks._widened(NUMBERS) if wide else NUMBERS
        return [as_real(calls[device](value, [1]))]

    monkeypatch.setattr(checks, "outputs", outputs)
    assert checks.errs("chip", "", [], {}, 0, times=4.0)[0]
    assert not checks.errs("cpu", "", [], {}, 0, times=4.0)[0]
