"""Autocast on the simulated chip: which operators compute in the lower precision, which in fp32, which in the widest.

Torch has these lists for its own devices (ATen/autocast_mode.h) and leaves a plug-in to register its own; without a
registration a program that asks for bf16 would silently compute in fp32. These are the lists that CUDA has.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

__all__ = ["register_autocast"]

_LOWER_PRECISION = """
_convolution _convolution.deprecated conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d.input
conv_transpose3d.input convolution prelu addmm addmv addr matmul einsum mm mv linalg_vecdot linear addbmm baddbmm bmm
chain_matmul linalg_multi_dot lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell scaled_dot_product_attention
"""
_FP32 = """
acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow.Tensor_Scalar pow.Tensor_Tensor
pow.Scalar softplus layer_norm native_layer_norm rms_norm group_norm frobenius_norm.dim nuclear_norm nuclear_norm.dim
cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss kl_div l1_loss
smooth_l1_loss huber_loss mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss triplet_margin_loss
multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp upsample_nearest1d
_upsample_nearest_exact1d upsample_nearest2d _upsample_nearest_exact2d upsample_nearest3d _upsample_nearest_exact3d
upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d upsample_bicubic2d
_upsample_bicubic2d_aa
"""
# These take the dtype of their result: it becomes fp32 where the program leaves it open.
_FP32_RESULT = """
prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm linalg_matrix_norm
linalg_matrix_norm.str_ord sum sum.dim_IntList
"""
_WIDEST = "addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add"

_AUTOCAST = torch._C.DispatchKeySet(torch._C._dispatch_key_parse("AutocastPrivateUse1"))

Policy = Callable[..., Any]


def _may_be_cast(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dtype != torch.float64
        and value.device.type == "sim"
    )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list | tuple):
        return type(value)([_cast(each, dtype) for each in value])
    return value.to(dtype) if _may_be_cast(value) else value


def _called_in(dtype: torch.dtype, op: torch._ops.OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        return op(*_cast(args, dtype), **{name: _cast(value, dtype) for name, value in kwargs.items()})


def _lower_precision(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    return _called_in(torch.get_autocast_dtype("sim"), op, args, kwargs)


def _fp32(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    return _called_in(torch.float32, op, args, kwargs)


def _fp32_result(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    place = [argument.name for argument in op._schema.arguments].index("dtype")
    given = args[place] if place < len(args) else kwargs.get("dtype")
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        if given is not None or not _may_be_cast(args[0]):
            return op(*args, **kwargs)
        return op(*args[:place], **{**kwargs, "dtype": torch.float32})


def _widest(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    given = [value for value in (*args, *kwargs.values()) if _may_be_cast(value)]
    lower = torch.get_autocast_dtype("sim")
    return _called_in(lower if all(each.dtype == lower for each in given) else torch.float32, op, args, kwargs)


def _norm(self: Tensor, p: float = 2) -> Tensor:
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        if _may_be_cast(self):
            return torch.ops.aten.norm.ScalarOpt_dtype(self, p, dtype=torch.float32)
        return torch.ops.aten.norm.Scalar(self, p)


def _norm_over(self: Tensor, p: float | None, dim: list[int], keepdim: bool = False) -> Tensor:
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        if _may_be_cast(self):
            return torch.ops.aten.norm.ScalarOpt_dim_dtype(self, p, dim, keepdim, dtype=torch.float32)
        return torch.ops.aten.norm.ScalarOpt_dim(self, p, dim, keepdim)


def _refused(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError(
        "torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast; use "
        "binary_cross_entropy_with_logits"
    )


def register_autocast(libraries: list[torch.library.Library]) -> None:
    """Register the lists for the device; the registrations live as long as `libraries`."""
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    kernels = torch.library.Library("aten", "IMPL")
    policies: tuple[tuple[str, Policy], ...] = (
        (_LOWER_PRECISION, _lower_precision),
        (_FP32, _fp32),
        (_FP32_RESULT, _fp32_result),
        (_WIDEST, _widest),
    )
    for names, policy in policies:
        for name in names.split():
            packet, _, overload = name.partition(".")
            found = getattr(torch.ops.aten, packet, None)
            if found is not None:  # another version of torch may lack it
                op = getattr(found, overload or "default")
                kernels.impl(name, partial(policy, op), "AutocastPrivateUse1")
    kernels.impl("norm.Scalar", _norm, "AutocastPrivateUse1")
    kernels.impl("norm.ScalarOpt_dim", _norm_over, "AutocastPrivateUse1")
    kernels.impl("binary_cross_entropy", _refused, "AutocastPrivateUse1")
    libraries += [others, kernels]
