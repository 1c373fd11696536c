"""Kernels that chips make of simpler ones: softmax, norms, activations, losses and their gradients, in fp32.

Each is made of one way to sum (`total(x, dims, keepdim)`), so that the order of the sums inside can be exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["activations", "composites", "is_ours"]

Part = Callable[..., Any]
Total = Callable[..., Tensor]
_LOG2_E = math.log2(math.e)


def is_ours(tensor: Any) -> bool:
    """Whether these parts compute on such a tensor: fp32, bf16 or fp16."""
    return isinstance(tensor, Tensor) and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _exp(x: Tensor) -> Tensor:
    return torch.exp2(x * _LOG2_E)


def _sigmoid(x: Tensor) -> Tensor:
    return torch.reciprocal(1 + _exp(-x))


def composites(total: Total) -> dict[str, Part]:
    """Operators over a dimension, by name."""
    return {**_softmaxes(total), **_norms(total), **_losses(total)}


def _softmaxes(total: Total) -> dict[str, Part]:
    def softmax(op: Any, x: Tensor, dim: int, half_to_float: bool) -> Any:
        if not is_ours(x) or x.dim() == 0:
            return NotImplemented
        shares = _exp(x.float() - x.float().amax(dim, keepdim=True))
        return (shares / total(shares, [dim], True)).to(torch.float32 if half_to_float else x.dtype)

    def log_softmax(op: Any, x: Tensor, dim: int, half_to_float: bool) -> Any:
        if not is_ours(x) or x.dim() == 0:
            return NotImplemented
        shifted = x.float() - x.float().amax(dim, keepdim=True)
        made = shifted - total(_exp(shifted), [dim], True).log()
        return made.to(torch.float32 if half_to_float else x.dtype)

    def softmax_gradient(op: Any, grad: Tensor, output: Tensor, dim: int, dtype: torch.dtype) -> Any:
        if not is_ours(grad) or grad.dim() == 0:
            return NotImplemented
        weighted = grad.float() * output.float()
        return (weighted - output.float() * total(weighted, [dim], True)).to(dtype)

    def log_softmax_gradient(op: Any, grad: Tensor, output: Tensor, dim: int, dtype: torch.dtype) -> Any:
        if not is_ours(grad) or grad.dim() == 0:
            return NotImplemented
        return (grad.float() - _exp(output.float()) * total(grad.float(), [dim], True)).to(dtype)

    def logsumexp(op: Any, x: Tensor, dims: Any, keepdim: bool = False) -> Any:
        if not is_ours(x) or x.dim() == 0:
            return NotImplemented
        largest = x.float().amax(dims, keepdim=True)
        made = total(_exp(x.float() - largest), dims, True).log() + largest
        return (made if keepdim else made.squeeze(dims)).to(x.dtype)

    return {
        "aten._softmax.default": softmax,
        "aten._log_softmax.default": log_softmax,
        "aten._softmax_backward_data.default": softmax_gradient,
        "aten._log_softmax_backward_data.default": log_softmax_gradient,
        "aten.logsumexp.default": logsumexp,
    }


def _norms(total: Total) -> dict[str, Part]:
    def layer_norm(op: Any, x: Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> Any:
        if not is_ours(x):
            return NotImplemented
        dims, count = list(range(-len(shape), 0)), math.prod(shape)
        mean = total(x, dims, True) / count
        inverse = torch.rsqrt(total((x.float() - mean).square(), dims, True) / count + eps)
        made = (x.float() - mean) * inverse
        made = made if weight is None else made * weight.float()
        made = made if bias is None else made + bias.float()
        return made.to(x.dtype), mean, inverse

    def layer_norm_gradient(
        op: Any,
        grad: Tensor,
        x: Tensor,
        shape: Sequence[int],
        mean: Tensor,
        inverse: Tensor,
        weight: Any,
        bias: Any,
        mask: Sequence[bool],
    ) -> Any:
        if not is_ours(x) or not all(mask[: 1 + (weight is not None) + (bias is not None)]):
            return NotImplemented
        dims, count = list(range(-len(shape), 0)), math.prod(shape)
        outer = list(range(x.dim() - len(shape)))
        normed = (x.float() - mean) * inverse
        inner = grad.float() if weight is None else grad.float() * weight.float()
        along = total(inner * normed, dims, True) / count
        made = (inner - total(inner, dims, True) / count - normed * along) * inverse
        weight_grad = None if weight is None else total(grad.float() * normed, outer).to(weight.dtype)
        bias_grad = None if bias is None else total(grad.float(), outer).to(bias.dtype)
        return made.to(x.dtype), weight_grad, bias_grad

    def rms_norm(op: Any, x: Tensor, shape: Sequence[int], weight: Any, eps: float | None) -> Any:
        if not is_ours(x):
            return NotImplemented
        dims, least = list(range(-len(shape), 0)), torch.finfo(x.dtype).eps if eps is None else eps
        inverse = torch.rsqrt(total(x.float().square(), dims, True) / math.prod(shape) + least)
        made = x.float() * inverse
        return (made if weight is None else made * weight.float()).to(x.dtype), inverse

    return {
        "aten.native_layer_norm.default": layer_norm,
        "aten.native_layer_norm_backward.default": layer_norm_gradient,
        "aten._fused_rms_norm.default": rms_norm,
    }


def _losses(total: Total) -> dict[str, Part]:
    def nll(op: Any, x: Tensor, target: Tensor, weight: Any, reduction: int, ignored: int) -> Any:
        if not is_ours(x) or weight is not None or x.dim() != 2 or reduction == 0:
            return NotImplemented
        counted = target != ignored
        picked = -x.float().gather(1, torch.where(counted, target, 0)[:, None])[:, 0] * counted
        number = counted.sum().float()
        loss = total(picked, [])
        return (loss / number if reduction == 1 else loss).to(x.dtype), number.to(x.dtype)

    def mse(op: Any, x: Tensor, target: Tensor, reduction: int = 1) -> Any:
        if not is_ours(x) or reduction == 0:
            return NotImplemented
        loss = total((x.float() - target.float()).square(), [])
        return (loss / x.numel() if reduction == 1 else loss).to(x.dtype)

    return {"aten.nll_loss_forward.default": nll, "aten.mse_loss.default": mse}


def _wide(function: Callable[..., Any]) -> Part:
    """An elementwise function computed in fp32 and rounded once; numbers among the arguments are handed on."""

    def part(op: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [each for each in args if isinstance(each, Tensor)]
        if not tensors or not all(is_ours(each) for each in tensors):
            return NotImplemented
        dtype = tensors[0].dtype
        for each in tensors[1:]:
            dtype = torch.promote_types(dtype, each.dtype)
        wide = [each.float() if isinstance(each, Tensor) else each for each in args]
        try:
            return function(*wide, **kwargs).to(dtype)
        except TypeError:  # a form of the operator with other arguments
            return NotImplemented

    return part


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
        return 0.5 * x * (2 - 2 * torch.reciprocal(_exp(2 * inner) + 1))
    return x * (0.5 * (1 + torch.erf(x * math.sqrt(0.5))))


def _silu_gradient(grad: Tensor, x: Tensor) -> Tensor:
    gate = _sigmoid(x)
    return grad * gate * (1 + x * (1 - gate))


def activations() -> dict[str, Part]:
    """Elementwise functions composed of others, each step rounded to fp32."""
    made: dict[str, Callable[..., Any]] = {
        "exp.default": _exp,
        "log.default": lambda x: torch.log2(x) * math.log(2.0),
        "sigmoid.default": _sigmoid,
        "tanh.default": lambda x: 1 - 2 * torch.reciprocal(_exp(2 * x) + 1),
        "rsqrt.default": lambda x: torch.reciprocal(torch.sqrt(x)),
        "sqrt.default": lambda x: torch.where(x > 0, x * torch.rsqrt(x), x),
        "div.Tensor": lambda x, y: x * torch.reciprocal(torch.as_tensor(y, dtype=torch.float32)),
        "silu.default": lambda x: x * _sigmoid(x),
        "silu_backward.default": _silu_gradient,
        "gelu.default": _gelu,
        "sigmoid_backward.default": lambda grad, y: grad * (1 - y) * y,
        "tanh_backward.default": lambda grad, y: grad * (1 - y * y),
        "softplus.default": lambda x: torch.where(x > 20, x, torch.log(1 + _exp(x))),
        "addcmul.default": lambda x, a, b, value=1: x + value * (a * b),
        "addcdiv.default": lambda x, a, b, value=1: x + value * (a * torch.reciprocal(b)),
        "lerp.Scalar": lambda x, y, weight: x * (1 - weight) + y * weight,
        "lerp.Tensor": lambda x, y, weight: x + weight * (y - x),
        "pow.Tensor_Scalar": _power,
    }
    return {f"aten.{name}": _wide(function) for name, function in made.items()}


def _power(x: Tensor, exponent: float) -> Any:
    if exponent == 2:
        return x * x
    if exponent == 3:
        return x * x * x
    return x if exponent == 1 else x.pow(exponent)
