"""Which dtype to compute in: what was asked for, or what a measurement on the chip favours."""

from __future__ import annotations

from typing import Literal

import torch

from crosschip.chips.find import Chip
from crosschip.chips.measure import best_product_time_s, product_error
from crosschip.errors import ChipError

__all__ = ["BF16_ERROR_LIMIT", "BF16_WORTHWHILE_SPEEDUP", "choose_compute_dtype"]

BF16_WORTHWHILE_SPEEDUP = 1.2

# A sum kept in fp32 and rounded once to bf16 is off by at most half a unit in the last place, 2^-9 relative, for each
# element, so its norm is too. Twice that allows a few partial sums in bf16; accumulating in bf16 is far beyond.
BF16_ERROR_LIMIT = 2.0**-8

_SIZE = 1024


def choose_compute_dtype(chip: Chip, wanted: Literal["auto", "float32", "bfloat16"]) -> tuple[torch.dtype, str]:
    """The dtype to compute in on `chip`, and the reason in a few words.

    `auto` multiplies matrices in both and takes bf16 when it is right and at least 1.2 times as fast.

    Raises:
        ChipError: bfloat16 was asked for and the chip does not do it rightly.
    """
    if wanted == "float32":
        return torch.float32, "the recipe asks for it"
    fault = _bf16_fault(chip)
    if wanted == "bfloat16":
        if fault:
            raise ChipError(f"bfloat16 was asked for, but on {chip.name} {fault}", "set the dtype to float32 or auto")
        return torch.bfloat16, "the recipe asks for it"
    if fault:
        return torch.float32, f"bf16 is out of the question: {fault}"
    speedup = best_product_time_s(chip, torch.float32, _SIZE) / best_product_time_s(chip, torch.bfloat16, _SIZE)
    measured = f"a {_SIZE}^3 matrix product in bf16 was measured at {speedup:.2f} times the speed of fp32"
    if speedup >= BF16_WORTHWHILE_SPEEDUP:
        return torch.bfloat16, measured
    return torch.float32, f"{measured}, less than the {BF16_WORTHWHILE_SPEEDUP} that make it worth its rounding"


def _bf16_fault(chip: Chip) -> str | None:
    """What is wrong with bf16 products on the chip; None when nothing is."""
    try:
        error = product_error(chip, torch.bfloat16)
    except (RuntimeError, NotImplementedError, TypeError) as failure:
        return f"a matrix product in it fails ({failure})"
    if error > BF16_ERROR_LIMIT:
        return f"its matrix product is off by {error:.1e} relative to fp64, more than {BF16_ERROR_LIMIT:.1e}"
    return None
