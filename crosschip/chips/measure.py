"""Measuring matrix products: how fast a chip does them and how far they are from the truth.

What is measured here is the ceiling that speed is given as a share of; there is no table of peak figures.
"""

from __future__ import annotations

import time

import torch

from crosschip.chips.find import Chip, synchronize

__all__ = ["best_product_time_s", "product_error", "product_rate"]

_SIZES = (1024, 2048, 4096)
_WARM_UP_SIZE = 256  # enough for a library to get ready
_LONG_S, _SHORT_S = 0.2, 0.01
_BUDGET_S = 1.0  # per size: a larger cube is not tried where the last one took longer than this


def best_product_time_s(chip: Chip, dtype: torch.dtype, size: int, repeats: int = 5) -> float:
    """The shortest time in seconds of one `size`^3 matrix product on the chip, after a warm-up.

    The shortest and not the mean: other work on the machine can only make a product slower. A product that takes long
    is made once: CPUs without bf16 instructions take seconds for what others do in milliseconds.
    """
    _product_time_s(chip, dtype, min(size, _WARM_UP_SIZE))
    first = _product_time_s(chip, dtype, size)
    if first > _LONG_S:
        return first
    # Short products are timed in a row, so that the clock and the launch do not count.
    in_a_row = 10 if first < _SHORT_S and chip.device.type != "cpu" else 1
    return min(_product_time_s(chip, dtype, size, in_a_row) for _ in range(repeats))


def _product_time_s(chip: Chip, dtype: torch.dtype, size: int, in_a_row: int = 1) -> float:
    left, right = _factors(chip, dtype, size)
    product = torch.empty_like(left)
    synchronize(chip)
    started = time.perf_counter()
    for _ in range(in_a_row):
        torch.matmul(left, right, out=product)
    synchronize(chip)
    return (time.perf_counter() - started) / in_a_row


def product_rate(chip: Chip, dtype: torch.dtype) -> float:
    """The best rate of matrix products in FLOP/s over cubes of 1024, 2048 and 4096, as far as each is quick enough."""
    best = 0.0
    for size in _SIZES:
        time_s = best_product_time_s(chip, dtype, size, repeats=5 if size == _SIZES[0] else 3)
        best = max(best, 2 * size**3 / time_s)
        if time_s * 8 > _BUDGET_S:
            break
    return best


def product_error(chip: Chip, dtype: torch.dtype, size: int = 512) -> float:
    """The relative error (Frobenius norm) of a product on the chip against the same product in fp64 on the CPU.

    The factors are rounded to `dtype` before, so this is the error of the product alone. NaN counts as infinite.
    """
    left, right = _factors(chip, dtype, size)
    exact = torch.matmul(left.cpu().double(), right.cpu().double())
    product = torch.matmul(left, right).cpu().double()
    error = float(torch.linalg.norm(product - exact) / torch.linalg.norm(exact))
    return error if error == error else float("inf")


def _factors(chip: Chip, dtype: torch.dtype, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    left, right = torch.randn(2, size, size, generator=generator).unbind()
    return left.to(dtype).to(chip.device), right.to(dtype).to(chip.device)
