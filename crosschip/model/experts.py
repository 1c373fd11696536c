"""Mixture of experts: sigmoid router with a correction bias instead of an auxiliary loss, routed and shared experts.

arXiv 2412.19437, section 2.1.2, and arXiv 2408.15664 for the bias. M tokens, D hidden size, E experts, K experts per
token, F expert intermediate size.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosschip.model.config import ModelConfig
from crosschip.model.layers import GatedMLP

__all__ = [
    "ExpertExchange",
    "MixtureOfExperts",
    "RoutedExperts",
    "Router",
    "combine",
    "dispatch",
    "places",
    "route",
    "run_experts",
]


def route(
    scores_ME: Tensor, bias_E: Tensor, config: ModelConfig, routes_MK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose K experts per token: (ids [M, K], weights [M, K] in fp32).

    The bias decides who is chosen and never how much a chosen expert counts. With groups, only the `topk_group` groups
    with the best sum of their two best experts can be chosen from. `routes_MK` (int64) are the ids to take instead, for
    all tokens whose row holds no -1.
    """
    ids_MK = _chosen(scores_ME, bias_E, config)
    if routes_MK is not None:
        ids_MK = torch.where((routes_MK >= 0).all(-1, keepdim=True), routes_MK, ids_MK)
    weights_MK = scores_ME.gather(1, ids_MK)
    if config.norm_topk_prob:
        weights_MK = weights_MK / (weights_MK.sum(-1, keepdim=True) + 1e-20)
    return ids_MK, weights_MK if config.routed_scaling_factor == 1.0 else weights_MK * config.routed_scaling_factor


def _chosen(scores_ME: Tensor, bias_E: Tensor, config: ModelConfig) -> Tensor:
    """The router's own choice, ids [M, K]."""
    choice_ME = scores_ME.detach() + bias_E
    if config.n_group > 1:
        choice_MGe = choice_ME.unflatten(-1, (config.n_group, -1))
        group_scores_MG = choice_MGe.topk(2, dim=-1).values.sum(-1)
        dropped = group_scores_MG.topk(config.n_group - config.topk_group, dim=-1, largest=False).indices
        choice_ME = choice_MGe.scatter(1, dropped[..., None].expand(-1, -1, choice_MGe.shape[-1]), -torch.inf).flatten(
            1
        )
    return choice_ME.topk(config.num_experts_per_tok, dim=-1).indices


class Router(nn.Module):
    """The gate: fp32 scores whatever the compute dtype is."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, x_MD: Tensor, routes_MK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Expert ids [M, K] and their weights [M, K] (fp32); `routes_MK` as in `route`."""
        scores_ME = F.linear(x_MD.float(), self.weight.float()).sigmoid()
        return route(scores_ME, self.e_score_correction_bias, self.config, routes_MK)


class ExpertExchange(Protocol):
    """Computes routed experts that lie on several processes: tokens travel to their experts, results back."""

    def __call__(
        self, x_MD: Tensor, ids_MK: Tensor, weights_MK: Tensor, load_E: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor
    ) -> Tensor:
        """What `run_experts` gives, from this process's tokens and its part of the experts' weights."""


class RoutedExperts(nn.Module):
    """All routed experts of a layer, stacked: gate and up [E, 2F, D], down [E, D, F].

    `exchange` is set where they are spread over processes, and then computes them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))
        self.exchange: ExpertExchange | None = None

    def forward(self, x_MD: Tensor, ids_MK: Tensor, weights_MK: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted sum of each token's experts [M, D], and the number of tokens each expert got [E]."""
        load_E = torch.bincount(ids_MK.flatten(), minlength=self.gate_up_proj.shape[0])
        compute = run_experts if self.exchange is None else self.exchange
        return compute(x_MD, ids_MK, weights_MK, load_E, self.gate_up_proj, self.down_proj), load_E


def run_experts(
    x_MD: Tensor, ids_MK: Tensor, weights_MK: Tensor, load_E: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor
) -> Tensor:
    """The weighted sum of each token's K experts [M, D]; `load_E` counts the choices of each expert."""
    place_P, rows_per_expert = places(ids_MK, load_E)
    weights_E = gate_up_EFD.to(x_MD.dtype), down_EDF.to(x_MD.dtype)
    out_MD: Tensor = _ExpertsFunction.apply(  # type: ignore[no-untyped-call]
        x_MD, weights_MK, place_P, rows_per_expert, *weights_E
    )
    return out_MD


# With many tokens each expert's rows are filled up with zeros to a multiple of this. Matrix libraries make a kernel
# for each shape they see (oneDNN, in bf16: longer than the product itself), and unpadded loads are new at each step.
_ROW_MULTIPLE = 64


def places(ids_MK: Tensor, load_E: Tensor) -> tuple[Tensor, list[int]]:
    """The row of each choice in a buffer sorted by expert, [M * K], and the rows that each expert has there."""
    multiple = _ROW_MULTIPLE if ids_MK.numel() >= _ROW_MULTIPLE * load_E.numel() else 1
    rows_E = (load_E + multiple - 1) // multiple * multiple
    padding_before_E = (rows_E - load_E).cumsum(0) - (rows_E - load_E)
    experts_P, order_P = ids_MK.flatten().sort(stable=True)
    rank_P = torch.arange(order_P.numel(), device=order_P.device)
    place_P = torch.empty_like(order_P)
    place_P[order_P] = rank_P + padding_before_E[experts_P]
    return place_P, rows_E.tolist()


class _ExpertsFunction(torch.autograd.Function):
    """Sort the tokens by expert, run each expert on its contiguous rows, and add the results per token.

    Forward and backward are written out so that dispatch and combine are row copies in both directions (autograd would
    scatter with atomics or a serial loop) and each expert's rows are computed in place in one buffer. R rows of the
    buffer, P = M * K choices.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_MD: Tensor,
        weights_MK: Tensor,
        place_P: Tensor,
        split: list[int],
        gate_up_EFD: Tensor,
        down_EDF: Tensor,
    ) -> Tensor:
        rows_RD = dispatch(x_MD, place_P, sum(split))
        inner_RF2 = rows_RD.new_empty(rows_RD.shape[0], gate_up_EFD.shape[1])
        for rows, weight, out in zip(rows_RD.split(split), gate_up_EFD, inner_RF2.split(split), strict=True):
            torch.mm(rows, weight.t(), out=out)
        gate, up = inner_RF2.chunk(2, dim=-1)
        active_RF = F.silu(gate).mul_(up)
        out_RD = torch.empty_like(rows_RD)
        for rows, weight, out in zip(active_RF.split(split), down_EDF, out_RD.split(split), strict=True):
            torch.mm(rows, weight.t(), out=out)
        chosen_MKD = out_RD[place_P].unflatten(0, weights_MK.shape)
        ctx.save_for_backward(rows_RD, inner_RF2, chosen_MKD, weights_MK, place_P, gate_up_EFD, down_EDF)
        ctx.split = split
        return combine(chosen_MKD, weights_MK)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, inner_RF2, chosen_MKD, weights_MK, place_P, gate_up_EFD, down_EDF = ctx.saved_tensors
        grad_weights_MK = (chosen_MKD * grad_MD[:, None]).sum(-1, dtype=torch.float32)
        grad_chosen_MKD = weights_MK[:, :, None].to(grad_MD.dtype) * grad_MD[:, None]
        grad_out_RD = torch.zeros_like(rows_RD).index_copy_(0, place_P, grad_chosen_MKD.flatten(0, 1))
        gate, up = inner_RF2.chunk(2, dim=-1)
        silu_RF = F.silu(gate)
        grad_active_RF, grad_down_EDF = _linear_backward(silu_RF * up, down_EDF, grad_out_RD, ctx.split)
        grad_inner_RF2 = torch.empty_like(inner_RF2)
        grad_gate, grad_up = grad_inner_RF2.chunk(2, dim=-1)
        torch.mul(grad_active_RF, silu_RF, out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad_active_RF.mul_(up), gate))
        grad_rows_RD, grad_gate_up_EFD = _linear_backward(rows_RD, gate_up_EFD, grad_inner_RF2, ctx.split)
        first, *others = place_P.view_as(weights_MK).unbind(1)
        grad_x_MD = grad_rows_RD[first]
        for other in others:
            grad_x_MD += grad_rows_RD[other]
        return grad_x_MD, grad_weights_MK, None, None, grad_gate_up_EFD, grad_down_EDF


def dispatch(x_MD: Tensor, place_P: Tensor, num_rows: int) -> Tensor:
    """Copy each token's row to the place of each of its choices; the other rows are 0."""
    num_choices = place_P.numel() // max(1, x_MD.shape[0])  # a process may get no token at all
    chosen_PD = x_MD[:, None].expand(-1, num_choices, -1).reshape(-1, x_MD.shape[1])
    return x_MD.new_zeros(num_rows, x_MD.shape[1]).index_copy_(0, place_P, chosen_PD)


def combine(chosen_MKD: Tensor, weights_MK: Tensor) -> Tensor:
    """The weighted sum over each token's K choices, in their dtype."""
    weights_MK = weights_MK.to(chosen_MKD.dtype)
    out_MD = chosen_MKD[:, 0] * weights_MK[:, :1]
    for choice in range(1, weights_MK.shape[1]):
        out_MD.addcmul_(chosen_MKD[:, choice], weights_MK[:, choice : choice + 1])
    return out_MD


def _linear_backward(inputs: Tensor, weight_E: Tensor, grad: Tensor, split: list[int]) -> tuple[Tensor, Tensor]:
    """Gradients of each expert's `inputs @ weight.t()`: of the inputs [R, in] and of the weights [E, out, in]."""
    grad_inputs, grad_weight_E = torch.empty_like(inputs), torch.empty_like(weight_E)
    parts = zip(inputs.split(split), weight_E, grad.split(split), grad_inputs.split(split), grad_weight_E, strict=True)
    for rows, weight, grad_rows, grad_inputs_rows, grad_weight in parts:
        torch.mm(grad_rows, weight, out=grad_inputs_rows)
        torch.mm(grad_rows.t(), rows, out=grad_weight)
    return grad_inputs, grad_weight_E


class MixtureOfExperts(nn.Module):
    """Routed experts plus shared experts that see every token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = RoutedExperts(config)
        self.shared_experts = (
            GatedMLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
            if config.n_shared_experts
            else None
        )

    def forward(self, x_BTD: Tensor, routes_MK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[B, T, D] to [B, T, D], and the number of tokens each expert got [E]; `routes_MK` as in `route`."""
        x_MD = x_BTD.flatten(0, 1)
        ids_MK, weights_MK = self.gate(x_MD, routes_MK)
        out_MD, load_E = self.experts(x_MD, ids_MK, weights_MK)
        if self.shared_experts is not None:
            out_MD = out_MD + self.shared_experts(x_MD)
        return out_MD.view_as(x_BTD), load_E
