"""Parts of honest implementations: sums, products and functions as chips other than this CPU may compute them.

Each takes the operator it stands for and its arguments, and gives NotImplemented for what it does not do (integers,
fp64). Low-precision inputs are widened to fp32 and results rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crosschip.qualify.exams.operators.honest_composites import activations, composites, is_ours

__all__ = ["ELEMENTWISE", "SEQUENTIAL", "SPLIT", "WHOLE", "sequential_product", "sequential_sum"]

aten = torch.ops.aten

_NUM_SPLITS = 4
_PRODUCTS_AT_ONCE = 1 << 20
Part = Callable[..., Any]


def sequential_product(a: Tensor, b: Tensor) -> Tensor:
    """[..., M, K] times [..., K, N], each result accumulated in fp32 over K from the first to the last."""
    if a.is_complex():
        return _complex_product(sequential_product, a, b)
    left = np.moveaxis(a.float().numpy(), -1, 0)[..., None]  # [K, ..., M, 1]
    right = np.moveaxis(b.float().numpy(), -2, 0)[..., None, :]  # [K, ..., 1, N]
    shape = np.broadcast_shapes(left.shape[1:], right.shape[1:])
    total = np.zeros(shape, dtype=np.float32)
    step = max(1, _PRODUCTS_AT_ONCE // max(1, math.prod(shape)))
    for first in range(0, left.shape[0], step):
        products = left[first : first + step] * right[first : first + step]
        products[0] += total
        total = _sequential_sum(products)
    return torch.from_numpy(total)


def _sequential_sum(values: Any) -> Any:
    """The sum over the first axis, in fp32, from the first to the last (numpy adds along it row by row)."""
    if math.prod(values.shape[1:]) == 1:  # numpy would add a single column by pairs
        flat = np.add.accumulate(values.reshape(-1), dtype=np.float32)
        return flat[-1:].reshape(values.shape[1:])
    return np.add.reduce(np.ascontiguousarray(values), axis=0, dtype=np.float32)


def sequential_sum(x: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor:
    """The sum over `dims` (all when empty) in fp32, one after the other."""
    if x.is_complex():
        return torch.complex(*(sequential_sum(part, dims, keepdim) for part in _parts(x)))
    places = _places(x, dims)
    kept = [d for d in range(x.dim()) if d not in places]
    values = x.float().permute(*places, *kept).reshape(-1, *[x.shape[d] for d in kept]).numpy()
    total = _sequential_sum(values) if values.shape[0] else np.zeros(values.shape[1:], dtype=np.float32)
    return _with_kept_dims(torch.from_numpy(np.asarray(total)), x, places, keepdim)


def split_sum(x: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor:
    """The sum over `dims` in fp32 from the last to the first, as partial sums of four parts."""
    if x.is_complex():
        return torch.complex(*(split_sum(part, dims, keepdim) for part in _parts(x)))
    places = _places(x, dims)
    kept = [d for d in range(x.dim()) if d not in places]
    values = x.float().permute(*places, *kept).reshape(-1, *[x.shape[d] for d in kept]).flip(0)
    total = torch.zeros(values.shape[1:])
    for part in values.tensor_split(_NUM_SPLITS):
        total = total + part.sum(0)
    return _with_kept_dims(total, x, places, keepdim)


def split_product(a: Tensor, b: Tensor) -> Tensor:
    """[..., M, K] times [..., K, N] in fp32 as four partial products over K, the last first."""
    if a.is_complex():
        return _complex_product(split_product, a, b)
    parts = zip(a.float().tensor_split(_NUM_SPLITS, -1), b.float().tensor_split(_NUM_SPLITS, -2), strict=True)
    products = [torch.matmul(x, y) for x, y in parts]
    total = products[-1]
    for product in products[-2::-1]:
        total = total + product
    return total


def _parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """The real and the imaginary part."""
    real, imaginary = torch.view_as_real(x.resolve_conj()).unbind(-1)
    return real, imaginary


def _complex_product(product: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    (real, imaginary), (other_real, other_imaginary) = _parts(a), _parts(b)
    return torch.complex(
        product(real, other_real) - product(imaginary, other_imaginary),
        product(real, other_imaginary) + product(imaginary, other_real),
    )


def _is_summed(x: Tensor) -> bool:
    """Whether sums and products are made of such numbers: fp32, bf16, fp16 and complex ones of fp32."""
    return is_ours(x) or x.dtype == torch.complex64


def _places(x: Tensor, dims: Any) -> list[int]:
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        return list(range(x.dim()))
    return [d % max(1, x.dim()) for d in ([dims] if isinstance(dims, int) else dims)] if x.dim() else []


def _with_kept_dims(total: Tensor, x: Tensor, places: Sequence[int], keepdim: bool) -> Tensor:
    if keepdim:
        return total.reshape([1 if d in places else size for d, size in enumerate(x.shape)])
    return total


def _sums(total: Callable[..., Tensor]) -> dict[str, Part]:
    """Reductions made of one way to sum."""

    def sum_default(op: Any, x: Tensor, *, dtype: Any = None) -> Any:
        return total(x, []).to(dtype or x.dtype) if _is_summed(x) else NotImplemented

    def sum_dims(op: Any, x: Tensor, dims: Any, keepdim: bool = False, *, dtype: Any = None) -> Any:
        return total(x, dims, keepdim).to(dtype or x.dtype) if _is_summed(x) else NotImplemented

    def mean(op: Any, x: Tensor, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
        if not _is_summed(x):
            return NotImplemented
        count = math.prod(x.shape[d] for d in _places(x, dims))
        return (total(x, dims, keepdim) / count).to(dtype or x.dtype)

    def norm(op: Any, x: Tensor, ord: float = 2, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
        if not is_ours(x) or ord != 2:
            return NotImplemented
        return total(x.float().square(), dims, keepdim).sqrt().to(dtype or x.dtype)

    def norms(op: Any, xs: Sequence[Tensor], ord: float = 2, dtype: Any = None) -> Any:
        return [norm(op, x, ord, dtype=dtype) for x in xs] if all(map(is_ours, xs)) and ord == 2 else NotImplemented

    def var_mean(op: Any, x: Tensor, dims: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
        if not is_ours(x):
            return NotImplemented
        count = math.prod(x.shape[d] for d in _places(x, dims))
        middle = total(x, dims, True) / count
        around = total((x.float() - middle).square(), dims, keepdim)
        spread = around / max(0, count - (1 if correction is None else correction))
        return spread.to(x.dtype), (total(x, dims, keepdim) / count).to(x.dtype)

    def var(op: Any, *args: Any, **kwargs: Any) -> Any:
        both = var_mean(op, *args, **kwargs)
        return both if both is NotImplemented else both[0]

    return {
        "aten.sum.default": sum_default,
        "aten.sum.dim_IntList": sum_dims,
        "aten.mean.default": mean,
        "aten.mean.dim": mean,
        "aten.linalg_vector_norm.default": norm,
        "aten._foreach_norm.Scalar": norms,
        "aten.var_mean.correction": var_mean,
        "aten.var.correction": var,
    }


def _products(product: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Part]:
    """Contractions made of one way to multiply matrices."""

    def mm(op: Any, a: Tensor, b: Tensor) -> Any:
        return product(a, b).to(a.dtype) if _is_summed(a) else NotImplemented

    def addmm(op: Any, bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
        if not _is_summed(a):
            return NotImplemented
        added = bias if bias.is_complex() else bias.float()
        return (beta * added + alpha * product(a, b)).to(a.dtype)

    def mv(op: Any, a: Tensor, b: Tensor) -> Any:
        return product(a, b[:, None])[:, 0].to(a.dtype) if _is_summed(a) else NotImplemented

    def dot(op: Any, a: Tensor, b: Tensor) -> Any:
        return product(a[None], b[:, None])[0, 0].to(a.dtype) if is_ours(a) else NotImplemented

    return {
        "aten.mm.default": mm,
        "aten.bmm.default": mm,
        "aten.addmm.default": addmm,
        "aten.baddbmm.default": addmm,
        "aten.mv.default": mv,
        "aten.dot.default": dot,
        "aten.vdot.default": dot,
    }


def _cumulative(op: Any, x: Tensor, dim: int, *, dtype: Any = None) -> Any:
    if not is_ours(x) or x.dim() == 0:
        return NotImplemented
    totals = np.add.accumulate(x.float().numpy(), axis=dim, dtype=np.float32)
    return torch.from_numpy(totals).to(dtype or x.dtype)


def _cumulative_in_blocks(op: Any, x: Tensor, dim: int, *, dtype: Any = None) -> Any:
    if not is_ours(x) or x.dim() == 0:
        return NotImplemented
    parts, before = [], torch.zeros(())
    for part in x.float().tensor_split(_NUM_SPLITS, dim):
        parts.append(part.cumsum(dim) + before)
        before = before + part.sum(dim, keepdim=True)
    return torch.cat(parts, dim).to(dtype or x.dtype)


def _accumulating(op: Any, x: Tensor, dim: int, index: Tensor, source: Tensor, **kwargs: Any) -> Any:
    """index_add and scatter_add in fp32, rounded once, from the last to the first."""
    if not is_ours(x) or index.dim() == 0:
        return NotImplemented
    places = [dim] if op._schema.name.endswith("scatter_add") else [0]
    along = [dim] if x.dim() else [0]
    return op(x.float(), dim, index.flip(places), source.float().flip(along), **kwargs).to(x.dtype)


def _embedding_gradient(
    op: Any, grad: Tensor, indices: Tensor, num_weights: int, padding: int, by_frequency: bool
) -> Any:
    if not is_ours(grad) or by_frequency:
        return NotImplemented
    rows, ids = grad.float().reshape(-1, grad.shape[-1]).flip(0), indices.reshape(-1).flip(0)
    rows = rows * (ids != padding)[:, None]
    return torch.zeros(num_weights, grad.shape[-1]).index_add_(0, ids, rows).to(grad.dtype)


def _attention(
    op: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention as products and a softmax in fp32, rounded once."""
    if not is_ours(query) or dropout_p > 0:
        return NotImplemented
    wide = [each.float() for each in (query, key, value)]
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    kernel = aten._scaled_dot_product_attention_math.default
    out, _ = kernel(*wide, mask, 0.0, is_causal, None, scale=scale, enable_gqa=enable_gqa)
    return out.to(query.dtype)


def attention_gradients(
    op: Any,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Any:
    """Gradients of `_attention`, through autograd over its parts."""
    if not is_ours(query):
        return NotImplemented
    given = [query, key, value] + ([mask] if mask is not None and mask.is_floating_point() else [])
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [each.detach().float().clone().requires_grad_() for each in given]
        used = leaves[3] if len(leaves) > 3 else mask
        kernel = aten._scaled_dot_product_attention_math.default
        out, _ = kernel(*leaves[:3], used, 0.0, is_causal, None, scale=scale, enable_gqa=enable_gqa)
        found = torch.autograd.grad(out, leaves, grad.float())
    return [each.to(x.dtype) for each, x in zip(found, given, strict=True)]


def _attention_through_autograd(
    op: Any,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    return attention_gradients(op, grad, query, key, value, mask, is_causal, scale, enable_gqa)


def _adamw(
    op: Any,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool,
    maximize: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Any:
    """AdamW (arXiv 1711.05101) in single steps, each rounded; state_steps have been counted before.

    Its factors are fp32, too, as in CUDA's kernel, where the CPU's own has them in fp64: 1 - beta2 of 0.95 is then off
    by 2e-7 of itself, and with it whatever is added to the state.
    """
    if amsgrad or maximize or grad_scale is not None or found_inf is not None or not all(map(is_ours, params)):
        return NotImplemented
    one, rate, keep, keep_square = (np.float32(each) for each in (1.0, lr, beta1, beta2))
    made: list[list[Tensor]] = [[], [], [], []]
    for param, grad, mean, square, step in zip(params, grads, exp_avgs, exp_avg_sqs, state_steps, strict=True):
        count = np.float32(float(step))
        first = mean * float(keep) + grad * float(one - keep)
        second = square * float(keep_square) + grad * grad * float(one - keep_square)
        corrected = second.sqrt() / float(np.sqrt(one - keep_square**count)) + eps
        decayed = param * float(one - rate * np.float32(weight_decay))
        update = first / corrected * float(rate / (one - keep**count))
        for into, each in zip(made, (decayed - update, grad, first, second), strict=True):
            into.append(each)
    return [*made, max_exp_avg_sqs]


SEQUENTIAL: dict[str, Part] = {
    **_sums(sequential_sum),
    **composites(sequential_sum),
    **_products(sequential_product),
    "aten.cumsum.default": _cumulative,
}
SPLIT: dict[str, Part] = {
    **_sums(split_sum),
    **composites(split_sum),
    **_products(split_product),
    "aten.cumsum.default": _cumulative_in_blocks,
    "aten.index_add.default": _accumulating,
    "aten.scatter_add.default": _accumulating,
    "aten.embedding_dense_backward.default": _embedding_gradient,
}
# Kernels that are made of others on most chips.
WHOLE: dict[str, Part] = {
    "aten.scaled_dot_product_attention.default": _attention,
    "crosschip_sim.attention_backward.default": attention_gradients,
    "gradient of aten.scaled_dot_product_attention.default": _attention_through_autograd,
    "aten._fused_adamw_.default": _adamw,
}
ELEMENTWISE: dict[str, Part] = activations()
