"""The checksum of weights sees any single bit, however the tensors are cut."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from crosschip.train.guard.checksum import parameter_checksum


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype)
    made.register_buffer("bias_of_experts", torch.zeros(4))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_single_bit_counts(dtype: torch.dtype) -> None:
    made = model(dtype)
    before = int(parameter_checksum(made))
    assert int(parameter_checksum(made)) == before
    seen = {before}
    weight = made[2].weight
    bits = weight.data.view(-1).view(torch.uint8)
    for place in range(bits.numel()):
        for bit in range(8):
            bits[place] ^= 1 << bit
            changed = int(parameter_checksum(made))
            assert changed != before, (place, bit)
            seen.add(changed)
            bits[place] ^= 1 << bit
    assert len(seen) > 16, "the bits of an element give different sums"
    made.bias_of_experts[3] = -0.0
    assert int(parameter_checksum(made)) != before, "a buffer's sign of zero"


def test_two_equal_tensors_that_change_places_are_seen() -> None:
    one, other = model(), model()
    with torch.no_grad():
        other[0].bias[:], other[1].weight[:] = one[1].weight, one[0].bias
    assert int(parameter_checksum(one)) != int(parameter_checksum(other))


def test_the_order_of_summing_does_not_matter_but_the_shards_add_up() -> None:
    whole = model()
    parts = [model(), model()]
    with torch.no_grad():
        for index, part in enumerate(parts):
            for tensor in [*part.parameters(), *part.buffers()]:
                tensor.set_(tensor.chunk(2)[index].clone())
    total = sum(int(parameter_checksum(part)) for part in parts)
    assert (total - int(parameter_checksum(whole))) % 2**32 == 0


def test_nan_and_its_payload_have_a_checksum() -> None:
    made = model()
    with torch.no_grad():
        made[0].bias[0] = float("nan")
    before = int(parameter_checksum(made))
    made[0].bias.data.view(torch.int32)[0] += 1
    assert int(parameter_checksum(made)) == (before + 3) % 2**32, "the second parameter counts three times"


def test_models_with_flags_and_complex_numbers() -> None:
    made = nn.Module()
    made.register_buffer("mask", torch.tensor([True, False, True]))
    made.register_buffer("turns", torch.tensor([1 + 2j]))
    made.register_buffer("empty", torch.empty(0))
    before = int(parameter_checksum(made))
    made.turns[0] = 1 + 3j
    assert int(parameter_checksum(made)) != before
