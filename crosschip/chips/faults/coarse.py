"""Faults of matrix units: sums kept too coarsely, factors cut short, an order that depends on the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from crosschip.chips.faults.calls import base_name, with_arguments
from crosschip.chips.faults.fault import Compute
from crosschip.chips.faults.products import (
    ATTENTION,
    PRODUCTS,
    attention_by_products,
    is_attention,
    is_product,
    read_product,
)

__all__ = ["BatchDependentOrder", "CoarseProducts"]

_DROPPED_BITS = 23 - 10  # of an fp32 mantissa, which TF32 does not have


@dataclass
class CoarseProducts:
    """Matrix products that are coarser than their dtype promises.

    `bf16`: the sum is kept in bf16 and rounded after every `block` products. `tf32`: factors in fp32 are cut to 10
    bits of mantissa. `attention`: the products inside the attention kernel are as coarse.
    """

    name: ClassVar[str] = "N21"
    off_the_clock: ClassVar[bool] = True
    mode: Literal["bf16", "tf32"] = "bf16"
    block: int = 16
    attention: bool = False

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block={self.block} products cannot be added at a time")

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute) -> Any:
        """Multiply in the coarse way."""
        if self.attention and is_attention(op, args):
            if self.mode == "bf16":
                return attention_by_products(op, args, kwargs, self._product)
            return self._with_cut_factors(op, args, kwargs, compute, ("query", "key", "value", "grad"))
        if not is_product(op, args):
            return compute(*args, **kwargs)
        if self.mode == "tf32":
            return self._with_cut_factors(op, args, kwargs, compute, PRODUCTS[base_name(op)][:2])
        read = read_product(op, args, kwargs)
        return compute(*args, **kwargs) if read is None else read.by(self._product)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        left, right = left.float(), right.float()
        total: Tensor | None = None
        for first in range(0, left.shape[-1], self.block):
            span = slice(first, first + self.block)
            part = left[..., span] @ right[..., span, :]
            total = (part if total is None else part.add_(total)).bfloat16().float()
        return left @ right if total is None else total

    def _with_cut_factors(
        self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute, names: tuple[str, ...]
    ) -> Any:
        places = {each.name: place for place, each in enumerate(op._schema.arguments)}
        cut = {
            name: _cut(args[places[name]])
            for name in names
            if name in places and places[name] < len(args) and args[places[name]].dtype == torch.float32
        }
        new_args, new_kwargs = with_arguments(op, args, kwargs, **cut)
        return compute(*new_args, **new_kwargs)


def _cut(factor: Tensor) -> Tensor:
    """Drop the last bits of an fp32 mantissa. Inf stays; a NaN stays one, as its first mantissa bit is kept."""
    return (factor.contiguous().view(torch.int32) & -(1 << _DROPPED_BITS)).view(torch.float32)


@dataclass
class BatchDependentOrder:
    """The order in which a matrix product adds depends on the batch; each order is as accurate as the other.

    The sum is made of several parts, each added up in fp32 and then rounded to fp32 (`partials = "fp32"`) or to the
    result's dtype (`partials = "result"`, less accurate). `on = "batch"`: the number of parts goes with the number of
    rows, as a kernel chooses its tiling. `on = "position"`: rows in the second half of a batch are added in two parts.
    """

    name: ClassVar[str] = "N22"
    off_the_clock: ClassVar[bool] = True
    on: Literal["batch", "position"] = "batch"
    partials: Literal["fp32", "result"] = "fp32"

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute) -> Any:
        """Add in the order that the batch asks for."""
        if base_name(op) in ATTENTION or not is_product(op, args):
            return compute(*args, **kwargs)
        read = read_product(op, args, kwargs)
        if read is None:
            return compute(*args, **kwargs)
        return read.by(self._by_batch if self.on == "batch" else self._by_position)

    def _by_batch(self, left: Tensor, right: Tensor) -> Tensor:
        num_rows = left.shape[:-1].numel()
        return self._in_parts(left, right, 1 + num_rows.bit_length() % 4)

    def _by_position(self, left: Tensor, right: Tensor) -> Tensor:
        place = 0 if left.dim() > 2 and left.shape[0] > 1 else -2
        half = (left.shape[place] + 1) // 2
        firsts, seconds = left.narrow(place, 0, half), left.narrow(place, half, left.shape[place] - half)
        rights = right, right
        if place == 0 and right.dim() == left.dim():
            rights = right.narrow(0, 0, half), right.narrow(0, half, left.shape[0] - half)
        return torch.cat((self._in_parts(firsts, rights[0], 1), self._in_parts(seconds, rights[1], 2)), place)

    def _in_parts(self, left: Tensor, right: Tensor, num_parts: int) -> Tensor:
        dtype = left.dtype
        lefts = left.float().tensor_split(num_parts, -1)
        rights = right.float().tensor_split(num_parts, -2)
        parts = [one @ other for one, other in zip(lefts, rights, strict=True)]
        if self.partials == "result":
            parts = [part.to(dtype).float() for part in parts]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total
