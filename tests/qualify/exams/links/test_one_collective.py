"""The bound of an honest reduction holds for every order, and tells a dishonest one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from crosschip.qualify.exams.links.collective_cases import Case
from crosschip.qualify.exams.links.one_collective import compare, contribution, expected

WORLD = 4


def case_of(dtype: str, values: Any = "drawn", operation: str = "sum", rows: int = 17) -> dict[str, Any]:
    return Case("all_reduce", operation, dtype, rows, 512, values).document()


def serially(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def in_pairs(parts: list[Tensor]) -> Tensor:
    return (parts[0] + parts[1]) + (parts[2] + parts[3])


def in_fp32_rounded_once(parts: list[Tensor]) -> Tensor:
    return serially([part.float() for part in parts]).to(parts[0].dtype)


HONEST = [serially, in_pairs, in_fp32_rounded_once, lambda parts: serially(parts[::-1])]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("values", ["drawn", "limits", "whole"])
@pytest.mark.parametrize("way", range(len(HONEST)))
def test_every_honest_order_is_within(dtype: str, values: str, way: int) -> None:
    case = case_of(dtype, values)
    parts = [contribution(case, rank, WORLD, 0) for rank in range(WORLD)]
    exact, bound = expected(case, 0, WORLD, 0)
    assert (bound is None) == (values == "whole")
    found = compare(HONEST[way](parts), exact, bound)
    assert found["wrong"] == 0, found
    assert bool(HONEST[way](parts).isfinite().all())


@pytest.mark.parametrize("operation", ["avg", "premul_sum"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("before", [True, False])
def test_factors_may_come_before_or_after(operation: str, dtype: str, before: bool) -> None:
    case = case_of(dtype, "drawn", operation)
    factor = torch.tensor(1 / 3 if operation == "avg" else 0.75, dtype=getattr(torch, dtype))
    parts = [contribution(case, rank, 3, 0) for rank in range(3)]
    got = serially([part * factor for part in parts]) if before else serially(parts) * factor
    exact, bound = expected(case, 0, 3, 0)
    assert compare(got, exact, bound)["wrong"] == 0


@pytest.mark.parametrize("values", ["drawn", "whole"])
def test_partial_sums_in_bf16_are_beyond(values: str) -> None:
    case = case_of("float32", values)
    parts = [contribution(case, rank, WORLD, 0).bfloat16().float() for rank in range(WORLD)]
    exact, bound = expected(case, 0, WORLD, 0)
    found = compare(serially(parts), exact, bound)
    assert found["wrong"] > exact.numel() // 2
    assert found["first"] == [0, 0]


def test_rows_do_not_depend_on_how_many_there_are() -> None:
    few, many = (contribution(case_of("float32", rows=rows), 1, WORLD, 3) for rows in (1, 17))
    assert torch.equal(few[0], many[0])
    assert not torch.equal(few, contribution(case_of("float32", rows=1), 2, WORLD, 3))


def test_a_skewed_exchange_fits_together() -> None:
    case = Case("all_to_all_skewed", "", "float32", 4, 16).document()
    given = sum(contribution(case, rank, 3, 0).shape[0] for rank in range(3))
    taken = [expected(case, rank, 3, 0)[0].shape[0] for rank in range(3)]
    assert sum(taken) == given
    assert taken[0] > 2 * taken[1]


def test_lost_and_misplaced_values_are_wrong() -> None:
    right = torch.arange(6.0).view(2, 3)
    assert compare(right.clone(), right, None)["wrong"] == 0
    swapped = compare(right.flip(0), right, None)
    assert (swapped["wrong"], swapped["all_zero"]) == (6, False)
    assert compare(torch.zeros(2, 3), right, None)["all_zero"]
    assert compare(right[:1], right, None)["wrong"] == 6
    poisoned = torch.where(right == 2.0, torch.nan, right)
    assert compare(poisoned, right.double(), torch.full((2, 3), 1e30, dtype=torch.float64))["wrong"] == 1
