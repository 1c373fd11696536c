"""Honest variants of the chip: each computes as real chips do, and not as the CPU does. None of them is wrong.

An exam that fails one of them takes the CPU's habits for correctness.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from crosschip.chips.faults.calls import (
    base_name,
    computes,
    dtypes_of,
    in_dtype,
    named_arguments,
    overwrite,
    with_arguments,
    with_inputs,
)
from crosschip.chips.faults.fault import Compute
from crosschip.chips.faults.naive import Naive
from crosschip.chips.faults.noise import Noisy
from crosschip.chips.faults.products import PRODUCTS, is_attention, is_product

__all__ = ["VARIANTS", "Flush", "Fp32", "Reordered"]


class Fp32:
    """Calculates bf16 and fp16 in fp32 from end to end, fused attention and reductions too, and rounds once."""

    name = "fp32"
    honest = True

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute) -> Any:
        """Compute in fp32, then round."""
        if not computes(op) or not dtypes_of(args, kwargs) & {torch.bfloat16, torch.float16}:
            return compute(*args, **kwargs)
        wide = in_dtype(op, args, kwargs, torch.float32)
        result = compute(*args, **kwargs)
        if wide is None:
            return result
        return overwrite(op, args, kwargs, result, lambda tensor, place: wide[place])


class Reordered:
    """Adds in another order: products over a shuffled K, sums over dimensions back to front.

    The order depends on K and the seed only. Everything else is the CPU's, including how far results depend on the
    batch.
    """

    name = "reordered"
    honest = True

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._orders: dict[int, Tensor] = {}

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute) -> Any:
        """Hand over the factors with K shuffled; the result is the same but for rounding."""
        name = base_name(op)
        if is_product(op, args):
            left, right, right_dim = PRODUCTS[name]
            named = named_arguments(op, args, kwargs)
            order = self._order(named[left].shape[-1])
            right_dim = max(right_dim, -named[right].dim())
            new = {left: named[left][..., order], right: named[right].index_select(right_dim, order)}
        elif is_attention(op, args):
            return self._attention(op, args, kwargs, compute)
        elif name in ("sum", "mean", "linalg_vector_norm"):
            named = named_arguments(op, args, kwargs)
            dims = named.get("dim")
            dims = [dims] if isinstance(dims, int) else list(dims or range(named["self"].dim()))
            new = {"self": named["self"].flip(dims)}
        else:
            return compute(*args, **kwargs)
        new_args, new_kwargs = with_arguments(op, args, kwargs, **new)
        return compute(*new_args, **new_kwargs)

    def _attention(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute) -> Any:
        """Shuffle the head dimension of queries and keys alike; their gradients come back shuffled."""
        named = named_arguments(op, args, kwargs)
        order = self._order(named["query"].shape[-1])
        scale = named["scale"] if named["scale"] is not None else named["query"].shape[-1] ** -0.5
        new = {"query": named["query"][..., order], "key": named["key"][..., order], "scale": scale}
        new_args, new_kwargs = with_arguments(op, args, kwargs, **new)
        found = compute(*new_args, **new_kwargs)
        if base_name(op) == "attention_backward":
            back = order.argsort()
            return [found[0][..., back], found[1][..., back], *found[2:]]
        return found

    def _order(self, length: int) -> Tensor:
        if length not in self._orders:
            generator = torch.Generator().manual_seed(self.seed + length)
            self._orders[length] = torch.randperm(length, generator=generator)
        return self._orders[length]


class Flush:
    """Flushes subnormal numbers to zeros of their sign, in what arithmetic reads and in what it gives."""

    name = "flush"
    honest = True

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute) -> Any:
        """Flush, compute, flush."""
        if not computes(op):
            return compute(*args, **kwargs)
        new_args, new_kwargs = with_inputs(op, args, kwargs, _flushed)
        result = compute(*new_args, **new_kwargs)
        return overwrite(op, new_args, new_kwargs, result, lambda tensor, place: _flushed(tensor))


def _flushed(tensor: Tensor) -> Tensor:
    if not tensor.dtype.is_floating_point:
        return tensor
    subnormal = (tensor.abs() < torch.finfo(tensor.dtype).tiny) & (tensor != 0)
    return torch.where(subnormal, tensor * 0.0, tensor) if bool(subnormal.any()) else tensor


VARIANTS: dict[str, Callable[..., Any]] = {
    "fp32": Fp32,
    "reordered": Reordered,
    "naive": Naive,
    "noisy": Noisy,
    "flush": Flush,
}
