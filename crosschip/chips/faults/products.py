"""Matrix products as one form, [..., M, K] times [..., K, N], whichever operator asks for them; and attention's two.

A fault in a chip's matrix unit shows in every one of these operators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crosschip.chips.faults.calls import base_name, named_arguments

__all__ = [
    "ATTENTION",
    "PRODUCTS",
    "MatrixProduct",
    "Product",
    "attention_by_products",
    "is_attention",
    "is_product",
    "read_product",
]

Product = Callable[[Tensor, Tensor], Tensor]  # [..., M, K] and [..., K, N] to [..., M, N], in fp32 or wider

# The two factors' arguments and the dimension along which the second one is summed; the first one's is its last.
PRODUCTS: dict[str, tuple[str, str, int]] = {
    "mm": ("self", "mat2", -2),
    "bmm": ("self", "mat2", -2),
    "addmm": ("mat1", "mat2", -2),
    "_addmm_activation": ("mat1", "mat2", -2),
    "baddbmm": ("batch1", "batch2", -2),
    "matmul": ("self", "other", -2),
    "linear": ("input", "weight", -1),
    "mv": ("self", "vec", -1),
    "addmv": ("mat", "vec", -1),
    "dot": ("self", "tensor", -1),
    "vdot": ("self", "other", -1),
}
_ADDED = {"addmm": "self", "baddbmm": "self", "addmv": "self", "linear": "bias"}
ATTENTION = ("scaled_dot_product_attention", "attention_backward")
_PRODUCT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class MatrixProduct:
    """One call read as `beta * added + alpha * (left @ right)`; `shape` and `dtype` are the result's."""

    left: Tensor  # [..., M, K]
    right: Tensor  # [..., K, N]
    added: Tensor | None
    alpha: float
    beta: float
    shape: torch.Size
    dtype: torch.dtype

    def by(self, product: Product) -> Tensor:
        """The call's result when this is how the chip multiplies; rounded to the result's dtype once, at the end."""
        made = product(self.left, self.right).reshape(self.shape)
        if self.alpha != 1:
            made = made * self.alpha
        if self.added is not None and self.beta != 0:
            made = made + self.beta * self.added.to(made.dtype)
        return made.to(self.dtype)


def is_product(op: torch._ops.OpOverload, args: tuple[Any, ...]) -> bool:
    """Whether a call is a matrix product of floating-point numbers of at most 32 bits."""
    return base_name(op) in PRODUCTS and _are_narrow(args)


def is_attention(op: torch._ops.OpOverload, args: tuple[Any, ...]) -> bool:
    """Whether a call is attention, forward or backward, in floating-point numbers of at most 32 bits."""
    return base_name(op) in ATTENTION and _are_narrow(args[:3])


def _are_narrow(args: tuple[Any, ...]) -> bool:
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    return bool(tensors) and all(tensor.dtype in _PRODUCT_DTYPES for tensor in tensors)


def read_product(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MatrixProduct | None:
    """The call as a matrix product, or None when it is none that this module reads."""
    if not is_product(op, args) or base_name(op) == "_addmm_activation":
        return None
    name, named = base_name(op), named_arguments(op, args, kwargs)
    left_name, right_name, _ = PRODUCTS[name]
    left, right = named[left_name], named[right_name]
    shape = _result_shape(name, left, right)
    if name == "linear":
        right = right.transpose(-1, -2) if right.dim() > 1 else right
    if left.dim() == 1:
        left = left[None]
    if right.dim() == 1:
        right = right[:, None]
    added = named[_ADDED[name]] if name in _ADDED else None
    dtype = named.get("out_dtype") or named[left_name].dtype
    alpha, beta = float(named.get("alpha", 1)), float(named.get("beta", 1))
    return MatrixProduct(left, right, added, alpha, beta, shape, dtype)


def _result_shape(name: str, left: Tensor, right: Tensor) -> torch.Size:
    if name == "linear":
        return torch.Size((*left.shape[:-1], *right.shape[:-1]))
    rows = left.shape[:-1] if left.dim() < 2 else left.shape[-2:-1]
    columns = right.shape[:-1] if right.dim() < 2 else right.shape[-1:]
    if right.dim() == 1:
        columns = torch.Size(())
    if left.dim() == 1:
        rows = torch.Size(())
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    return torch.Size((*batch, *rows, *columns))


def attention_by_products(
    op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], product: Product
) -> Any:
    """Attention, forward or backward, on a chip that multiplies like this: softmax in fp32, one rounding at the end."""
    named = named_arguments(op, args, kwargs)
    query, key, value = (named[name].float() for name in ("query", "key", "value"))
    groups = query.shape[-3] // key.shape[-3] if named["enable_gqa"] else 1
    if groups > 1:
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scale = named["scale"] if named["scale"] is not None else query.shape[-1] ** -0.5
    scores = product(query, key.transpose(-1, -2)) * scale
    scores = _masked(scores, named["attn_mask"], named["is_causal"])
    sees_nothing = (scores == -torch.inf).all(-1, keepdim=True)
    probs = scores.softmax(-1).masked_fill(sees_nothing, 0.0)
    if base_name(op) == "scaled_dot_product_attention":
        return product(probs, value).to(named["query"].dtype)
    grad = named["grad"].float()
    grad_value = product(probs.transpose(-1, -2), grad)
    grad_probs = product(grad, value.transpose(-1, -2))
    grad_scores = probs * (grad_probs - (grad_probs * probs).sum(-1, keepdim=True))
    grad_query = product(grad_scores, key) * scale
    grad_key = product(grad_scores.transpose(-1, -2), query) * scale
    if groups > 1:
        grad_key, grad_value = (each.unflatten(-3, (-1, groups)).sum(-3) for each in (grad_key, grad_value))
    found = [each.to(named["query"].dtype) for each in (grad_query, grad_key, grad_value)]
    mask = named["attn_mask"]
    if mask is not None and mask.is_floating_point():
        found.append(grad_scores.sum_to_size(mask.shape).to(mask.dtype))
    return found


def _masked(scores: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    if is_causal:
        future = scores.new_ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return scores.masked_fill(future, -torch.inf)
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
