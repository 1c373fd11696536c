"""Attention on the simulated chip: one kernel forward and one backward, as most chips have it.

Elsewhere torch takes `scaled_dot_product_attention` apart for a device without a kernel of its own; then no fault could
be planted in a chip's attention. With dropout it is still taken apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crosschip.chips.simulated.operators import call_operator

__all__ = ["register_attention"]

_forward = torch.ops.aten.scaled_dot_product_attention.default
_in_parts = torch.ops.aten._scaled_dot_product_attention_math.default
_SIGNATURE = (
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, "
    "float? scale, bool enable_gqa, bool mask_has_gradient) -> Tensor[]"
)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    made: Tensor
    if dropout_p > 0.0:
        made, _ = _in_parts(
            query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )
        return made
    made = call_operator(
        _forward, query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return made


class _Attention(torch.autograd.Function):
    """The kernel with its gradient; both calls go through the dispatcher again, so that a trace shows them."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, attn_mask)
        ctx.settings = is_causal, scale, enable_gqa, ctx.needs_input_grad[3]
        with torch._C._AutoDispatchBelowAutograd():
            made: Tensor = _forward(query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():  # a second derivative is wanted, which no kernel has
            found = _differentiable_gradients(grads[0], *ctx.saved_tensors, *ctx.settings)
        else:
            kernel = torch.ops.crosschip_sim.attention_backward.default
            found = kernel(grads[0], *ctx.saved_tensors, *ctx.settings)
        return (*found[:3], found[3] if len(found) > 3 else None, None, None, None)


def _attention_with_gradient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    made: Tensor
    if dropout_p > 0.0:
        made = _attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    else:
        made = _Attention.apply(  # type: ignore[no-untyped-call]
            query, key, value, attn_mask, is_causal, scale, enable_gqa
        )
    return made


def _differentiable_gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    mask_has_gradient: bool,
) -> list[Tensor | None]:
    """The same gradients from attention taken apart."""
    inputs = [query, key, value, *([attn_mask] if attn_mask is not None and mask_has_gradient else [])]
    views = [each.view_as(each) for each in inputs]  # their own gradients, when one tensor is given twice
    mask = views[3] if len(views) > 3 else attn_mask
    out, _ = _in_parts(*views[:3], mask, 0.0, is_causal, None, scale=scale, enable_gqa=enable_gqa)
    wanted = [each for each in views if each.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return [next(found) if each.requires_grad else None for each in views]


def _gradients_on_cpu(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    mask_has_gradient: bool,
) -> list[Tensor]:
    """The gradients for query, key, value and, if it is wanted, the mask: by the CPU's autograd."""
    with_gradient = [query, key, value]
    if attn_mask is not None and mask_has_gradient:
        with_gradient.append(attn_mask)
    with torch.inference_mode(False), torch.enable_grad():  # it opens autograd, which is closed inside a kernel
        leaves = [each.detach().requires_grad_() for each in with_gradient]
        mask = leaves[3] if len(leaves) > 3 else attn_mask
        out = _forward(*leaves[:3], mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
        return list(torch.autograd.grad(out, leaves, grad))


def register_attention(libraries: list[torch.library.Library]) -> None:
    """Take attention whole on the device; the registrations live as long as `libraries`."""
    own = torch.library.Library("crosschip_sim", "DEF")
    own.define(_SIGNATURE)
    own.impl("attention_backward", _gradients_on_cpu, "CPU")
    kernels = torch.library.Library("aten", "IMPL")
    kernels.impl("scaled_dot_product_attention", _attention, "PrivateUse1")
    kernels.impl("scaled_dot_product_attention", _attention_with_gradient, "AutogradPrivateUse1")
    libraries += [own, kernels]
