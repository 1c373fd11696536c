"""Autocast on the simulated chip computes in the dtype that is asked for, as on CUDA, and never silently in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

X = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x @ x,
        lambda x: torch.mm(x, x),
        lambda x: F.linear(x, x, x[0]),
        lambda x: torch.einsum("ij,jk->ik", x, x),
        lambda x: x[None].bmm(x[None]),
        lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
        lambda x: F.conv1d(x[None], x[:, :, None]),
    ],
)
def test_products_are_in_the_lower_precision(function: Any, dtype: torch.dtype) -> None:
    x = X.to("sim")
    assert function(x).dtype == torch.float32
    with torch.autocast("sim", dtype=dtype):
        assert function(x).dtype == dtype
        assert function(x.to(torch.float16)).dtype == dtype
        assert function(x.double()).dtype == torch.float64
        with torch.autocast("sim", enabled=False):
            assert function(x).dtype == torch.float32
    assert torch.equal(function(x).cpu(), function(X))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.softmax(-1),
        lambda x: x.log_softmax(-1),
        lambda x: F.layer_norm(x, (4,)),
        lambda x: F.rms_norm(x, (4,)),
        lambda x: F.cross_entropy(x, torch.zeros(4, dtype=torch.int64, device="sim")),
        lambda x: F.mse_loss(x, x),
        lambda x: x.exp(),
        lambda x: x.sum(),
        lambda x: x.cumsum(0),
        lambda x: x.norm(),
        lambda x: x.norm(dim=1),
        lambda x: torch.linalg.vector_norm(x),
    ],
)
def test_sums_and_norms_and_losses_are_in_fp32(function: Any) -> None:
    x = X.to("sim", torch.bfloat16)
    with torch.autocast("sim", dtype=torch.bfloat16):
        assert function(x).dtype == torch.float32


def test_the_widest_and_the_unchanged() -> None:
    full, half = X.to("sim"), X.to("sim", torch.bfloat16)
    with torch.autocast("sim", dtype=torch.bfloat16):
        assert torch.addcmul(full, half, half).dtype == torch.float32
        assert torch.addcmul(half, half, half).dtype == torch.bfloat16
        assert half.relu().dtype == torch.bfloat16
        assert (half + full).dtype == torch.float32
        assert half.sum(dtype=torch.float64).dtype == torch.float64


def test_gradients_come_back_in_fp32_and_numbers_are_the_cpus() -> None:
    def step(device: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        linear = torch.nn.Linear(4, 4).to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            made = linear(X.to(device))
            loss = made.float().pow(2).sum()
        loss.backward()
        return [made.detach().cpu(), *[each.grad.cpu() for each in linear.parameters() if each.grad is not None]]

    for one, other in zip(step("sim"), step("cpu"), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_the_hosts_autocast_is_the_hosts() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (X.to("sim") @ X.to("sim")).dtype == torch.float32
        assert (X @ X).dtype == torch.bfloat16


def test_an_unsafe_loss_is_refused() -> None:
    half = X.sigmoid().to("sim")
    with torch.autocast("sim", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="unsafe to autocast"):
        F.binary_cross_entropy(half, half)
