"""The sums tell every change; each way of changing numbers is tried."""

import pytest
import torch
from torch import Tensor

from crosschip.train.checkpoint.checksum import checksums


def made(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def swapped(tensor: Tensor, one: int, other: int) -> Tensor:
    changed = tensor.clone()
    changed[[one, other]] = tensor[[other, one]]
    return changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.bool])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (1024,), (1025,), (3, 1024), (5, 7, 300), (0,), (0, 4)])
def test_equal_tensors_have_equal_sums_in_any_memory_layout(shape, dtype) -> None:
    tensor = made(shape, dtype)
    spread = torch.empty((*shape, 2), dtype=dtype)
    spread[..., 0] = tensor
    assert checksums([tensor]) == checksums([spread[..., 0]]) == checksums([tensor.clone()])


@pytest.mark.parametrize("place", [0, 1, 1023, 1024, 5000, 5119])
def test_one_flipped_bit_is_seen_wherever_it_is(place) -> None:
    tensor = made((5120,))
    for bit in range(32):
        flipped = tensor.clone()
        flipped.view(torch.int32)[place] ^= 1 << bit if bit < 31 else -(1 << 31)
        assert checksums([flipped]) != checksums([tensor]), bit


def test_the_sign_of_zero_and_not_a_number_count() -> None:
    sums = checksums([torch.zeros(4), -torch.zeros(4), torch.full((4,), torch.nan)])
    assert len(set(sums)) == 3
    assert checksums([torch.full((4,), torch.nan)])[0] == sums[2]


@pytest.mark.parametrize(
    "change",
    [
        lambda t: swapped(t, 3, 40),
        lambda t: swapped(t.t(), 3, 40).t(),
        lambda t: t.t().contiguous(),
        lambda t: t.flip(0),
        lambda t: t.roll(1, 1),
        lambda t: torch.cat([t[:40], t[:24]]),
    ],
    ids=["rows", "columns", "transposed", "reversed", "rolled", "torn"],
)
@pytest.mark.parametrize("size", [64, 1024])
def test_the_same_numbers_elsewhere_are_seen(change, size) -> None:
    tensor = made((64, size))[:, :64] if size == 64 else made((64, 1024))
    assert checksums([change(tensor)]) != checksums([tensor])


def test_sums_come_in_the_order_of_the_tensors() -> None:
    tensors = [made((4,)), made((3, 4)), made((5,))]
    assert checksums(tensors) == [checksums([tensor])[0] for tensor in tensors]
