"""Choices among equal values: any of them will do, and no other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from crosschip.qualify.reproducing.self_contained import self_contained
from crosschip.qualify.tracing.inputs import operator_named
from crosschip.qualify.tracing.one_call import call_is_wrong, deviation
from crosschip.qualify.tracing.ties import chooses_as_well

TIED = torch.tensor([[2.0, 0.0, 2.0, 1.0, 0.0, 2.0], [1.0, 1.0, 0.0, 0.0, 3.0, 3.0]])


def last_of_equals(operator: str, *args: Any) -> list[Tensor]:
    """What an operator gives that looks from the other end."""
    values, places = operator_named(operator)(TIED.flip(1), *args)
    return [values, TIED.shape[1] - 1 - places]


@pytest.mark.parametrize(
    ("operator", "args"),
    [
        ("aten.max.dim", (1,)),
        ("aten.min.dim", (-1,)),
        ("aten.kthvalue.default", (2, 1)),
        ("aten.median.dim", (1,)),
        ("aten.mode.default", (1,)),
        ("aten.topk.default", (3, 1)),
        ("aten.sort.default", (1,)),
    ],
)
def test_another_of_equal_values_is_as_good_and_no_other_is(operator: str, args: tuple[Any, ...]) -> None:
    op = operator_named(operator)
    values, places = last_of_equals(operator, *args)
    assert not torch.equal(places, op(TIED, *args)[1]), "there are no ties"
    assert deviation(op, (TIED, *args), {}, [values, places]) is None
    wrong = places.clone()
    wrong.view(2, -1)[0, 0] = int((TIED[0] != values.view(2, -1)[0, 0]).nonzero()[0])
    assert deviation(op, (TIED, *args), {}, [values, wrong]) is not None


def test_a_stable_sort_keeps_the_order() -> None:
    op = operator_named("aten.sort.stable")
    values, places = last_of_equals("aten.sort.default", 1)
    assert deviation(op, (TIED,), {"stable": False, "dim": 1}, [values, places]) is None
    assert deviation(op, (TIED,), {"stable": True, "dim": 1}, [values, places]) is not None


def test_the_largest_so_far_may_be_any_of_the_equal_ones_before() -> None:
    op = operator_named("aten.cummax.default")
    expected = op(TIED, 1)[1]
    first, ahead = torch.tensor([[0] * 6, [0, 0, 0, 0, 4, 4]]), torch.tensor([[2] * 6, [1, 1, 1, 1, 4, 5]])
    assert not torch.equal(expected, first)
    assert chooses_as_well(op, (TIED, 1), {}, first, expected)
    assert not chooses_as_well(op, (TIED, 1), {}, ahead, expected)


@pytest.mark.parametrize(
    ("operator", "args"),
    [
        ("aten.max_pool2d_with_indices.default", ([2, 3], [2, 1], [1, 1], [1, 2], True)),
        ("aten.max_pool2d_with_indices.default", ([3, 3],)),
        ("aten.adaptive_max_pool2d.default", ([3, 4],)),
        ("aten.max_pool3d_with_indices.default", ([2, 2, 2],)),
    ],
)
def test_a_pool_may_choose_any_of_the_equal_values_of_its_window(operator: str, args: tuple[Any, ...]) -> None:
    """With zeros and ones alone, ties are the rule."""
    op = operator_named(operator)
    num_dims = 3 if "3d" in operator else 2
    shape = (2, 3, *[8, 9, 6][:num_dims])
    x = (torch.arange(math.prod(shape)) % 2).float().view(shape)
    values, expected = op(x, *args)
    assert chooses_as_well(op, (x, *args), {}, expected, expected)
    planes = x.flatten(-num_dims)
    others = outside = 0
    for place in range(x[0, 0].numel()):
        got = expected.clone()
        got[0, 0].view(-1)[0] = place
        as_well = chooses_as_well(op, (x, *args), {}, got, expected)
        is_equal = bool(planes[0, 0, place] == values[0, 0].flatten()[0])
        in_window = is_first_window(operator, args, x.shape[-num_dims:], place)
        assert as_well == (is_equal and in_window), place
        others += as_well
        outside += is_equal and not in_window
    assert others > 1, "there are no ties"
    assert outside > 0, "nothing equal lies outside"


def is_first_window(operator: str, args: tuple[Any, ...], sizes: Any, place: int) -> bool:
    """Whether the place decides what comes first in the output: found by making it the largest of all."""
    x = torch.zeros(1, 1, *sizes)
    x.view(-1)[place] = 1.0
    return bool(operator_named(operator)(x, *args)[0].flatten()[0] == 1.0)


def test_a_reproducer_takes_it_along() -> None:
    _, definitions = self_contained([call_is_wrong])
    assert any("def chooses_as_well(" in each for each in definitions)
