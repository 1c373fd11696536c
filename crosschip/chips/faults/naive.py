"""An honest chip that adds one number after the other: simple, and of all honest orders the one with the largest error.

A sum of K numbers is made in fp32 in the order in which they lie, so its error grows with the root of K or, where the
numbers have one sign, with K. The order depends on nothing but K: results do not depend on the batch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from crosschip.chips.faults.calls import base_name, named_arguments
from crosschip.chips.faults.fault import Compute
from crosschip.chips.faults.products import attention_by_products, is_attention, read_product

__all__ = ["Naive", "sequential_product"]

# A longer reduction is made in lanes of this length, and the lanes are added one after the other.
_LONGEST_LANE = 1024


class Naive:
    """Products, attention's products and sums over a dimension add sequentially in fp32 and round once at the end."""

    name = "naive"
    honest = True

    def operator(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute) -> Any:
        """Add one after the other."""
        if is_attention(op, args):
            return attention_by_products(op, args, kwargs, sequential_product)
        read = read_product(op, args, kwargs)
        if read is not None:
            return read.by(sequential_product)
        reduced = _reduced(op, args, kwargs)
        return compute(*args, **kwargs) if reduced is None else reduced


def sequential_product(left: Tensor, right: Tensor) -> Tensor:
    """[..., M, K] times [..., K, N] in fp32, each output one multiply-add after the other over K."""
    left, right = left.float(), right.float()
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    total = left.new_zeros((*batch, left.shape[-2], right.shape[-1]))
    for k in range(left.shape[-1]):
        total.addcmul_(left[..., k : k + 1], right[..., k : k + 1, :])
    return total


def _reduced(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The sum, mean or 2-norm that a call asks for; None for other calls."""
    name = base_name(op)
    if name not in ("sum", "mean", "linalg_vector_norm"):
        return None
    named = named_arguments(op, args, kwargs)
    values: Tensor = named["self"]
    is_norm = name == "linalg_vector_norm"
    if values.dtype not in (torch.float32, torch.bfloat16, torch.float16) or (is_norm and named["ord"] != 2):
        return None
    dtype = named.get("dtype") or values.dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    dims = named.get("dim")
    dims = [dims] if isinstance(dims, int) else list(dims or range(values.dim()))
    dims = sorted(dim % values.dim() for dim in dims) if values.dim() else []
    kept = [dim for dim in range(values.dim()) if dim not in dims]
    lines = values.float().permute(*kept, *dims).flatten(len(kept)) if dims else values.float()[None]
    total = _sum_last(lines.square() if is_norm else lines)
    if name == "mean":
        total = total / lines.shape[-1] if lines.shape[-1] else total / 0.0
    total = total.sqrt() if is_norm else total
    if named.get("keepdim"):
        for dim in dims:
            total = total.unsqueeze(dim)
    return total.to(dtype)


def _sum_last(lines: Tensor) -> Tensor:
    length = lines.shape[-1]
    num_lanes = math.ceil(length / _LONGEST_LANE)
    if num_lanes > 1:
        padded = torch.nn.functional.pad(lines, (0, num_lanes * _LONGEST_LANE - length))
        return _sum_last(_sum_last(padded.unflatten(-1, (num_lanes, _LONGEST_LANE))))
    if lines.numel() == 0:
        return lines.sum(-1)
    steps = lines.movedim(-1, 0).contiguous()
    total = steps[0].clone()
    for step in steps[1:]:
        total += step
    return total
