"""Which bits differ, and whether one flipped bit explains them."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from crosschip.qualify.exams.stability.difference import Difference, first_difference, results_bits


def between(one: dict[str, object], other: dict[str, object]) -> Difference | None:
    results, first = results_bits(one)
    return first_difference(results, first, results_bits(other)[1])


def flipped(tensor: Tensor, element: int, bit: int) -> Tensor:
    changed = tensor.clone()
    size = tensor.dtype.itemsize
    changed.view(-1).view(torch.uint8)[element * size + bit // 8] ^= 1 << bit % 8
    return changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64])
@pytest.mark.parametrize("bit", [0, 9, 15])
def test_one_flipped_bit_is_named(dtype: torch.dtype, bit: int) -> None:
    right = torch.arange(24).view(2, 3, 4).to(dtype)
    found = between({"output": right}, {"output": flipped(right, 17, bit)})
    assert found is not None
    assert found.is_one_bit
    assert (found.place, found.bits_of_element, found.expected) == ((1, 1, 1), (bit,), 17.0)
    assert f"one flipped bit, bit {bit}" in found.words()


def test_several_bits_are_counted() -> None:
    right = torch.zeros(3, 5)
    wrong = flipped(flipped(right, 4, 3), 11, 31)
    found = between({"kept": torch.ones(2), "output": right}, {"kept": torch.ones(2), "output": wrong})
    assert found is not None
    assert not found.is_one_bit
    assert (found.result, found.place, found.num_bits, found.num_elements, found.num_results) == (
        "output",
        (0, 4),
        2,
        2,
        1,
    )
    assert "2 bits in 2 elements of 1 results differ" in found.words()


def test_a_flip_to_nan_is_json() -> None:
    found = between({"loss": 1.5}, {"loss": float("nan")})
    assert found is not None
    document = json.loads(json.dumps(found.document(), allow_nan=False))
    assert (document["got"], document["place"]) == ("nan", [])


def test_another_shape_differs_in_every_bit() -> None:
    found = between({"output": torch.zeros(4)}, {"output": torch.zeros(3)})
    assert found is not None
    assert (found.num_bits, found.place) == (128, ())


def test_equal_results_do_not_differ() -> None:
    made = {"output": torch.tensor([1.0, float("nan"), -0.0]), "loss": 2.0, "nothing": None}
    assert between(made, dict(made)) is None
    assert between({"output": torch.tensor(0.0)}, {"output": torch.tensor(-0.0)}) is not None
