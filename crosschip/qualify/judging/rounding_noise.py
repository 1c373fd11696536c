"""An honest chip that is not this CPU: the CPU's results, each moved by the rounding that another chip may do.

A step that runs under `RoundingNoise` shows how far honest implementations of a dtype come apart: in one step, and over
many.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from crosschip.qualify.tracing.inputs import as_real

__all__ = ["RoundingNoise"]

# These give the same bits on every chip: they move, choose or fill, or round once as IEEE 754 says.
_EXACT = """
    _to_copy copy_ clone cat stack index gather scatter scatter_ index_select index_copy index_copy_ where fill_ zero_
    zeros zeros_like new_zeros ones ones_like new_ones full full_like new_full arange neg abs sign relu threshold clamp
    clamp_min clamp_max maximum minimum max min amax amin topk sort masked_fill masked_fill_ tril triu embedding
    constant_pad_nd slice_backward select_backward repeat flip roll empty empty_like new_empty empty_strided
    new_empty_strided unfold_backward slice_scatter select_scatter index_put index_put_ _reorder_linear_weight
    complex _conj_physical
"""
# The optimizer gets no noise: its update is compared by itself, from equal gradients.
_SPARED = ("_foreach_", "_fused_")
_SUMS = """
    mm bmm addmm baddbmm linear matmul mv dot sum mean einsum linalg_vector_norm linalg_vecdot norm var_mean var
    convolution convolution_backward scaled_dot_product_attention
    _scaled_dot_product_flash_attention_for_cpu _linear_pointwise
"""
# Where no gradient is wanted these arrive as one call; what they compute of it, step by step, is moved instead.
_RECURRENT = "lstm gru rnn_tanh rnn_relu"

_POOL = 1 << 20  # random numbers


class RoundingNoise(TorchDispatchMode):
    """Inside, each result is rounded a second time, at random, by up to half a unit in the last place.

    Sums also get what a chip loses that adds K terms one after the other in fp32. For terms of one size and random
    signs the partial sums' roundings add up to about eps * K / 8.5 of a term's size, which is eps * sqrt(K) / 8.5 of
    the result's (each rounding errs by eps / sqrt(12) of the unit below it, which is 0.72 of the sum on average).
    """

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = torch.Generator().manual_seed(seed)
        self._pool = torch.empty(_POOL).uniform_(-0.5, 0.5, generator=self._generator)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make the call and move its results a little."""
        kwargs = kwargs or {}
        name = op._schema.name.split("::")[1]
        if name in _RECURRENT.split():
            with _without_onednn(), self:
                return op.decompose(*args, **kwargs)
        result = op(*args, **kwargs)
        draws = torch.Tag.nondeterministic_seeded in op.tags and "attention" not in name
        if op.is_view or draws or name in _EXACT.split() or name.startswith(_SPARED):
            return result
        terms = _terms(name, args, result)
        with torch.no_grad():
            for tensor in _floats(result):
                self._move(tensor, terms)
        return result

    def _move(self, tensor: torch.Tensor, terms: float) -> None:
        if tensor.numel() == 0 or tensor.layout != torch.strided:  # a packed weight is a copy
            return
        wide = tensor if tensor.dtype == torch.float64 else tensor.float()
        moved = torch.addcmul(wide, wide, self._uniform(wide), value=torch.finfo(tensor.dtype).eps)
        if terms > 1.0:
            size = float(wide.square().mean().sqrt().nan_to_num(0.0, 0.0, 0.0))
            # Uniform noise of unit width has a deviation of 1 / sqrt(12), so 3.46 times it has one of 1.
            eps = torch.finfo(torch.float32).eps
            moved.add_(self._uniform(wide), alpha=3.46 * size * eps * terms**0.5 / 8.5)
        tensor.copy_(torch.where(wide.isfinite(), moved, wide))

    def _uniform(self, tensor: torch.Tensor) -> torch.Tensor:
        """Numbers between -1/2 and 1/2 from a random place of the pool: drawing each anew takes most of a step."""
        count = tensor.numel()
        first = int(torch.randint(0, max(1, _POOL - count), (), generator=self._generator))
        pool = self._pool if count <= _POOL else self._pool.repeat(-(-count // _POOL))
        return pool[first : first + count].view(tensor.shape).to(tensor.dtype)


@contextmanager
def _without_onednn() -> Iterator[None]:
    """Inside, no kernel of oneDNN computes a recurrent layer whole."""
    before, *_ = torch.backends.mkldnn.set_flags(False, _fp32_precision=None)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(before, _fp32_precision=None)


def _terms(name: str, args: Any, result: Any) -> float:
    """How many terms a result is the sum of; 1 for what is no sum."""
    tensors = list(_floats(args))
    made = next(_floats(result), None)
    if name not in _SUMS.split() or not tensors or made is None or made.numel() == 0:
        return 1.0
    most = max(tensor.numel() for tensor in tensors)
    return max(most / made.numel(), max(tensors[0].shape, default=1))


def _floats(value: Any) -> Iterator[torch.Tensor]:
    """The floating-point tensors in a value; those of complex numbers as pairs, in the same memory."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() or value.is_complex():
            yield as_real(value)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _floats(each)
