from __future__ import annotations

import pytest
import torch

from crosschip.thin_links import BYTES_PER_ELEMENT
from crosschip.train.outer.codec import BLOCK, CODECS, CompressionName

LARGEST_CODE: dict[CompressionName, int] = {"int8": 127, "int4": 7}


def values(num_blocks: int, seed: int = 0) -> torch.Tensor:
    """Blocks of very different size, as parameters' changes are."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-12, 3, num_blocks).repeat_interleave(BLOCK)
    return torch.randn(2, num_blocks * BLOCK, generator=generator) * sizes


def test_fp32_is_exact() -> None:
    given = values(5)
    assert torch.equal(CODECS["none"].decode(CODECS["none"].encode(given)), given)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_an_error_is_half_a_scale_at_most(name: CompressionName) -> None:
    given = values(40)
    codec = CODECS[name]
    error = (codec.decode(codec.encode(given)) - given).abs().view(2, -1, BLOCK)
    half_a_scale = given.view(2, -1, BLOCK).abs().amax(dim=-1, keepdim=True) / LARGEST_CODE[name] / 2
    # The scale, its reciprocal, and two products round once each, of numbers up to the largest code: eps / 2 each.
    rounding = 4 * LARGEST_CODE[name] * torch.finfo(torch.float32).eps
    assert bool((error <= half_a_scale * (1 + rounding)).all())
    assert bool((error > half_a_scale * 0.5).any()), "the bound is not reached half: it would prove nothing"


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_block_of_zeros_stays_zero(name: CompressionName) -> None:
    zeros = torch.zeros(3, 4 * BLOCK)
    assert torch.equal(CODECS[name].decode(CODECS[name].encode(zeros)), zeros)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_still_seen(name: CompressionName, poison: float) -> None:
    given = torch.ones(1, 3 * BLOCK)
    given[0, BLOCK + 5] = poison
    blocks = CODECS[name].decode(CODECS[name].encode(given)).view(3, BLOCK)
    assert bool(torch.isfinite(blocks[0]).all())
    assert bool(torch.isfinite(blocks[2]).all())
    assert not bool(torch.isfinite(blocks[1]).all())


@pytest.mark.parametrize("name", ["none", "int8", "int4"])
def test_bytes_are_those_that_the_choice_counts_with(name: CompressionName) -> None:
    given = torch.randn(2, 16 * BLOCK)
    assert CODECS[name].encode(given).numel() == BYTES_PER_ELEMENT[name] * given.numel()
