"""Mixture of experts: sigmoid router with a correction bias instead of an auxiliary loss, routed and shared experts.

arXiv 2412.19437, section 2.1.2, and arXiv 2408.15664 for the bias. M tokens, D hidden size, E experts, K experts per
token, F expert intermediate size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosschip.model.config import ModelConfig
from crosschip.model.layers import GatedMLP

__all__ = ["MixtureOfExperts", "RoutedExperts", "Router", "apply_experts", "route"]


def route(scores_ME: Tensor, bias_E: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Choose K experts per token: (ids [M, K], weights [M, K] in fp32).

    The bias decides who is chosen and never how much a chosen expert counts. With groups, only the `topk_group` groups
    with the best sum of their two best experts can be chosen from.
    """
    choice_ME = scores_ME.detach() + bias_E
    if config.n_group > 1:
        choice_MGe = choice_ME.unflatten(-1, (config.n_group, -1))
        group_scores_MG = choice_MGe.topk(2, dim=-1).values.sum(-1)
        dropped = group_scores_MG.topk(config.n_group - config.topk_group, dim=-1, largest=False).indices
        choice_ME = choice_MGe.scatter(1, dropped[..., None].expand(-1, -1, choice_MGe.shape[-1]), -torch.inf).flatten(
            1
        )
    ids_MK = choice_ME.topk(config.num_experts_per_tok, dim=-1).indices
    weights_MK = scores_ME.gather(1, ids_MK)
    if config.norm_topk_prob:
        weights_MK = weights_MK / (weights_MK.sum(-1, keepdim=True) + 1e-20)
    return ids_MK, weights_MK * config.routed_scaling_factor


class Router(nn.Module):
    """The gate: fp32 scores whatever the compute dtype is."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, x_MD: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids [M, K] and their weights [M, K] (fp32)."""
        scores_ME = F.linear(x_MD.float(), self.weight.float()).sigmoid()
        return route(scores_ME, self.e_score_correction_bias, self.config)


class RoutedExperts(nn.Module):
    """All routed experts of a layer, stacked: gate and up [E, 2F, D], down [E, D, F]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))

    def forward(self, x_MD: Tensor, ids_MK: Tensor, weights_MK: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted sum of each token's experts [M, D], and the number of tokens each expert got [E]."""
        gate_up_EFD, down_EDF = self.gate_up_proj.to(x_MD.dtype), self.down_proj.to(x_MD.dtype)
        return apply_experts(x_MD, ids_MK, weights_MK, gate_up_EFD, down_EDF)


def apply_experts(
    x_MD: Tensor, ids_MK: Tensor, weights_MK: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor
) -> tuple[Tensor, Tensor]:
    """The weighted sum of each token's experts [M, D], and the number of tokens each expert got [E]."""
    load_E = torch.bincount(ids_MK.flatten(), minlength=gate_up_EFD.shape[0])
    out_MD: Tensor = _ExpertsFunction.apply(  # type: ignore[no-untyped-call]
        x_MD, weights_MK, ids_MK, load_E.tolist(), gate_up_EFD, down_EDF
    )
    return out_MD, load_E


class _ExpertsFunction(torch.autograd.Function):
    """Sort the tokens by expert, run each expert on its contiguous rows, and add the results per token.

    Forward and backward are written out so that dispatch and combine are gathers in both directions (autograd would
    scatter with atomics or a serial loop) and each expert's rows are computed in place in one buffer. P = M * K rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_MD: Tensor,
        weights_MK: Tensor,
        ids_MK: Tensor,
        load: list[int],
        gate_up_EFD: Tensor,
        down_EDF: Tensor,
    ) -> Tensor:
        num_choices = ids_MK.shape[1]
        order_P = ids_MK.flatten().argsort(stable=True)
        place_P = torch.empty_like(order_P)
        place_P[order_P] = torch.arange(order_P.numel(), device=order_P.device)
        rows_PD = x_MD[order_P // num_choices]
        inner_PF2 = rows_PD.new_empty(rows_PD.shape[0], gate_up_EFD.shape[1])
        for rows, weight, out in zip(rows_PD.split(load), gate_up_EFD, inner_PF2.split(load), strict=True):
            torch.mm(rows, weight.t(), out=out)
        gate, up = inner_PF2.chunk(2, dim=-1)
        active_PF = F.silu(gate).mul_(up)
        out_PD = torch.empty_like(rows_PD)
        for rows, weight, out in zip(active_PF.split(load), down_EDF, out_PD.split(load), strict=True):
            torch.mm(rows, weight.t(), out=out)
        chosen_MKD = out_PD[place_P].unflatten(0, (-1, num_choices))
        ctx.save_for_backward(rows_PD, inner_PF2, chosen_MKD, weights_MK, order_P, place_P, gate_up_EFD, down_EDF)
        ctx.load = load
        return torch.bmm(weights_MK[:, None].to(x_MD.dtype), chosen_MKD).squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor | None, ...]:
        rows_PD, inner_PF2, chosen_MKD, weights_MK, order_P, place_P, gate_up_EFD, down_EDF = ctx.saved_tensors
        load, num_choices = ctx.load, weights_MK.shape[1]
        grad_weights_MK = torch.bmm(chosen_MKD, grad_MD[:, :, None]).squeeze(-1).float()
        row_weights_P1 = weights_MK.flatten()[order_P, None].to(grad_MD.dtype)
        grad_out_PD = grad_MD[order_P // num_choices].mul_(row_weights_P1)
        gate, up = inner_PF2.chunk(2, dim=-1)
        active_PF = F.silu(gate).mul_(up)
        grad_down_EDF, grad_active_PF = torch.empty_like(down_EDF), torch.empty_like(active_PF)
        for e, (grad, active, out) in enumerate(
            zip(grad_out_PD.split(load), active_PF.split(load), grad_active_PF.split(load), strict=True)
        ):
            torch.mm(grad.t(), active, out=grad_down_EDF[e])
            torch.mm(grad, down_EDF[e], out=out)
        grad_inner_PF2 = torch.empty_like(inner_PF2)
        grad_gate, grad_up = grad_inner_PF2.chunk(2, dim=-1)
        torch.mul(grad_active_PF, F.silu(gate), out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad_active_PF.mul_(up), gate))
        grad_gate_up_EFD, grad_rows_PD = torch.empty_like(gate_up_EFD), torch.empty_like(rows_PD)
        for e, (grad, rows, out) in enumerate(
            zip(grad_inner_PF2.split(load), rows_PD.split(load), grad_rows_PD.split(load), strict=True)
        ):
            torch.mm(grad.t(), rows, out=grad_gate_up_EFD[e])
            torch.mm(grad, gate_up_EFD[e], out=out)
        grad_x_MD = grad_rows_PD[place_P].unflatten(0, (-1, num_choices)).sum(1)
        return grad_x_MD, grad_weights_MK, None, None, grad_gate_up_EFD, grad_down_EDF


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

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, D] to [B, T, D], and the number of tokens each expert got [E]."""
        x_MD = x_BTD.flatten(0, 1)
        ids_MK, weights_MK = self.gate(x_MD)
        out_MD, load_E = self.experts(x_MD, ids_MK, weights_MK)
        if self.shared_experts is not None:
            out_MD = out_MD + self.shared_experts(x_MD)
        return out_MD.view_as(x_BTD), load_E
