"""What another chip's rounding moves: each step of a recurrent network, both parts of complex numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from crosschip.qualify.judging.rounding_noise import RoundingNoise


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_the_steps_of_a_recurrent_network_are_moved_without_gradients_as_with_them(kind: Any) -> None:
    network, x = kind(16, 32), torch.randn(12, 4, 16)
    with torch.inference_mode():
        right = network(x)[0]
        with RoundingNoise(0):
            moved = network(x)[0]
    error = (moved - right).square().mean().sqrt() / right.square().mean().sqrt()
    eps = torch.finfo(torch.float32).eps
    assert eps / 12**0.5 < error < 12 * eps  # more than one rounding of the result, and no more than all steps together
    assert torch.backends.mkldnn.enabled == torch.backends.mkldnn.is_available()


def test_both_parts_of_complex_numbers_are_moved() -> None:
    left, right = (torch.randn(32, 32, dtype=torch.complex64) for _ in range(2))
    exact = left @ right
    with RoundingNoise(0):
        error = left @ right - exact
    for part in (error.real, error.imag):
        assert 0.0 < float(part.abs().max()) < 1e-4
