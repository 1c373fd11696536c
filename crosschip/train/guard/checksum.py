"""One number that changes when any bit of the weights does."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

__all__ = ["parameter_checksum"]

_MODULUS_BITS = 32


@torch.no_grad()
def parameter_checksum(model: nn.Module) -> Tensor:
    """An int64 on the model's device: the sum of all parameters' and buffers' bits as integers, times an odd number
    for each tensor, modulo 2^32.

    Integers wrap and never round, so the sum depends neither on the order nor on how a tensor is cut into shards: added
    up over the ranks of a group (`ReduceOp.SUM`) it is, modulo 2^32, the checksum of the whole model. A single other
    bit always changes it. Nothing is brought to the host.
    """
    sums = [
        _sum_of_bits(tensor) * (2 * number + 1)
        for number, tensor in enumerate(itertools.chain(model.parameters(), model.buffers()))
        if tensor.numel()
    ]
    return torch.stack(sums).sum().bitwise_and((1 << _MODULUS_BITS) - 1)


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """Over the tensor's local part, as a scalar of int64."""
    to_local = getattr(tensor, "to_local", None)
    local: Tensor = tensor if to_local is None else to_local()
    local = local.detach().contiguous()
    if local.element_size() >= 4:
        # In 32 bits throughout: a sum in a wider integer than the tensor's takes twenty times as long on a CPU.
        return local.view(-1).view(torch.int32).sum(dtype=torch.int32).to(torch.int64)
    return local.view(torch.int16 if local.element_size() == 2 else torch.int8).sum(dtype=torch.int64)
