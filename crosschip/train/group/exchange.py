"""Routed experts spread over ranks: each token's row travels to the rank of its expert, and the result back.

M tokens of this rank, K experts per token, P = M * K choices, E experts, S ranks that hold one set of experts together
(rank s holds experts s * E/S to (s + 1) * E/S - 1), R rows that this rank's experts get from all S ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from crosschip.model.experts import combine, dispatch, run_experts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["TokenExchange"]


class TokenExchange:
    """`ExpertExchange` by two all-to-alls, among the ranks of one process group."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    def __call__(
        self, x_MD: Tensor, ids_MK: Tensor, weights_MK: Tensor, load_E: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor
    ) -> Tensor:
        """The weighted sum of each token's experts [M, D]; the weights are DTensors, sharded by expert."""
        place_P = _places_by_expert(ids_MK)
        sent, received_loads_SE = self._exchanged_loads(load_E)
        received = received_loads_SE.sum(1).tolist()
        rows_RD = _carry(_dispatch(x_MD, place_P), received, sent, self._group)
        num_local = received_loads_SE.shape[1]
        local_ids_E = torch.arange(num_local, device=x_MD.device).repeat(len(received))
        ids_R1 = local_ids_E.repeat_interleave(received_loads_SE.flatten())[:, None]
        ones_R1 = torch.ones_like(ids_R1, dtype=torch.float32)
        local = (gate_up_EFD.to_local(), down_EDF.to_local())  # type: ignore[attr-defined]
        out_RD = run_experts(rows_RD, ids_R1, ones_R1, received_loads_SE.sum(0), *local)
        return _combine(_carry(out_RD, sent, received, self._group), weights_MK, place_P)

    def _exchanged_loads(self, load_E: Tensor) -> tuple[list[int], Tensor]:
        """How many rows go to each rank, and [S, E/S] how many each rank sends to each of this rank's experts."""
        from torch import distributed

        load_SE = load_E.unflatten(0, (self._group.size(), -1))
        received_SE = torch.empty_like(load_SE)
        distributed.all_to_all_single(received_SE, load_SE.contiguous(), group=self._group)
        return load_SE.sum(1).tolist(), received_SE


def _places_by_expert(ids_MK: Tensor) -> Tensor:
    """The place of each choice when all are sorted by expert, [P]."""
    order_P = ids_MK.flatten().argsort(stable=True)
    place_P = torch.empty_like(order_P)
    place_P[order_P] = torch.arange(order_P.numel(), device=order_P.device)
    return place_P


class _Carry(torch.autograd.Function):
    """Rows to other ranks, and their gradients back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, received: list[int], sent: list[int], group: ProcessGroup) -> Tensor:
        ctx.splits = received, sent, group
        return _exchange(rows, received, sent, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        received, sent, group = ctx.splits
        return _exchange(grad, sent, received, group), None, None, None


def _exchange(rows: Tensor, received: list[int], sent: list[int], group: ProcessGroup) -> Tensor:
    from torch import distributed

    out = rows.new_empty(sum(received), rows.shape[1])
    distributed.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


def _carry(rows: Tensor, received: list[int], sent: list[int], group: ProcessGroup) -> Tensor:
    out: Tensor = _Carry.apply(rows, received, sent, group)  # type: ignore[no-untyped-call]
    return out


class _Dispatch(torch.autograd.Function):
    """A token's row copied to the place of each of its choices; written out because autograd would scatter."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, place_P: Tensor) -> Tensor:
        ctx.save_for_backward(place_P)
        ctx.num_tokens = x_MD.shape[0]
        return dispatch(x_MD, place_P, place_P.numel())

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None]:
        (place_P,) = ctx.saved_tensors
        first, *others = place_P.view(ctx.num_tokens, -1).unbind(1)
        grad_MD = grad_PD[first]
        for other in others:
            grad_MD += grad_PD[other]
        return grad_MD, None


def _dispatch(x_MD: Tensor, place_P: Tensor) -> Tensor:
    rows_PD: Tensor = _Dispatch.apply(x_MD, place_P)  # type: ignore[no-untyped-call]
    return rows_PD


class _Combine(torch.autograd.Function):
    """The weighted sum over a token's choices; the gradient of the weights is summed in fp32."""

    @staticmethod
    def forward(ctx: Any, rows_PD: Tensor, weights_MK: Tensor, place_P: Tensor) -> Tensor:
        chosen_MKD = rows_PD[place_P].unflatten(0, weights_MK.shape)
        ctx.save_for_backward(chosen_MKD, weights_MK, place_P)
        return combine(chosen_MKD, weights_MK)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, Tensor, None]:
        chosen_MKD, weights_MK, place_P = ctx.saved_tensors
        grad_weights_MK = (chosen_MKD * grad_MD[:, None]).sum(-1, dtype=torch.float32)
        grad_chosen_PD = (weights_MK[:, :, None].to(grad_MD.dtype) * grad_MD[:, None]).flatten(0, 1)
        return torch.empty_like(grad_chosen_PD).index_copy_(0, place_P, grad_chosen_PD), grad_weights_MK, None


def _combine(rows_PD: Tensor, weights_MK: Tensor, place_P: Tensor) -> Tensor:
    out_MD: Tensor = _Combine.apply(rows_PD, weights_MK, place_P)  # type: ignore[no-untyped-call]
    return out_MD
