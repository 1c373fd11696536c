"""Measuring products and choosing a dtype. No assertion depends on how fast this machine is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from crosschip.chips import choose_compute_dtype, dtype_choice, find_chip, product_rate
from crosschip.chips.dtype_choice import BF16_ERROR_LIMIT
from crosschip.chips.measure import best_product_time_s, product_error
from crosschip.errors import ChipError

CPU = find_chip("cpu")
HONEST = torch.matmul


def pretend_times(monkeypatch: pytest.MonkeyPatch, float32: float, bfloat16: float) -> None:
    times = {torch.float32: float32, torch.bfloat16: bfloat16}
    monkeypatch.setattr(dtype_choice, "best_product_time_s", lambda chip, dtype, size: times[dtype])


def coarse_bf16(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A product whose running sum is kept in bf16, as a chip with a coarse accumulator does it."""
    if left.dtype != torch.bfloat16:
        return HONEST(left, right)
    total = torch.zeros(left.shape[0], right.shape[1], dtype=torch.bfloat16)
    for k in range(0, left.shape[1], 4):
        total += HONEST(left[:, k : k + 4], right[k : k + 4])
    return total


def broken_bf16(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if left.dtype == torch.bfloat16:
        raise RuntimeError('"addmm" not implemented for BFloat16')
    return HONEST(left, right)


def nan_bf16(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return HONEST(left, right) * (float("nan") if left.dtype == torch.bfloat16 else 1)


def test_a_rate_is_the_work_by_the_time() -> None:
    assert best_product_time_s(CPU, torch.float32, 128, repeats=2) > 0
    assert product_rate(CPU, torch.float32) > 0


def test_the_error_of_an_honest_product_is_that_of_its_roundings() -> None:
    # fp32: 512 terms, each addition off by 2^-24 of the running sum at most.
    assert 0 < product_error(CPU, torch.float32) < 512 * 2**-24
    # bf16 with one rounding at the end: at most 2^-9, and not far below, since roundings are spread evenly.
    assert 2**-11 < product_error(CPU, torch.bfloat16) < BF16_ERROR_LIMIT


@pytest.mark.parametrize("product", [coarse_bf16, nan_bf16])
def test_a_wrong_product_is_beyond_the_limit(monkeypatch: pytest.MonkeyPatch, product: Callable[..., object]) -> None:
    monkeypatch.setattr(torch, "matmul", product)
    assert product_error(CPU, torch.bfloat16) > BF16_ERROR_LIMIT


def test_what_is_asked_for_is_taken() -> None:
    assert choose_compute_dtype(CPU, "float32") == (torch.float32, "the recipe asks for it")
    assert choose_compute_dtype(CPU, "bfloat16") == (torch.bfloat16, "the recipe asks for it")


@pytest.mark.parametrize(
    ("float32", "bfloat16", "chosen"),
    [(2.4, 1.0, torch.bfloat16), (1.21, 1.0, torch.bfloat16), (1.19, 1.0, torch.float32), (1.0, 3.0, torch.float32)],
)
def test_auto_takes_bf16_when_it_is_worth_it(
    monkeypatch: pytest.MonkeyPatch, float32: float, bfloat16: float, chosen: torch.dtype
) -> None:
    pretend_times(monkeypatch, float32, bfloat16)
    dtype, reason = choose_compute_dtype(CPU, "auto")
    assert dtype == chosen
    assert f"{float32 / bfloat16:.2f} times the speed of fp32" in reason


@pytest.mark.parametrize(
    ("product", "said"), [(coarse_bf16, "off by"), (nan_bf16, "off by inf"), (broken_bf16, "fails")]
)
def test_auto_refuses_a_bf16_that_is_fast_and_wrong(
    monkeypatch: pytest.MonkeyPatch, product: Callable[..., object], said: str
) -> None:
    pretend_times(monkeypatch, 10.0, 1.0)
    monkeypatch.setattr(torch, "matmul", product)
    dtype, reason = choose_compute_dtype(CPU, "auto")
    assert dtype == torch.float32
    assert said in reason


@pytest.mark.parametrize("product", [coarse_bf16, broken_bf16])
def test_asking_for_a_bf16_that_is_wrong_is_an_error(
    monkeypatch: pytest.MonkeyPatch, product: Callable[..., object]
) -> None:
    monkeypatch.setattr(torch, "matmul", product)
    with pytest.raises(ChipError, match=r"(?s)bfloat16 was asked for.*cpu.*what to do: set the dtype to float32"):
        choose_compute_dtype(CPU, "bfloat16")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator here")
def test_an_accelerator_is_measured() -> None:
    chip = find_chip()
    assert product_error(chip, torch.bfloat16) < BF16_ERROR_LIMIT
    assert product_rate(chip, torch.bfloat16) > 1e12
