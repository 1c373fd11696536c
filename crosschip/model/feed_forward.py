"""Feed-forward networks with the norm before them, prepared for inference: dense, experts in one wide product, experts
one by one.

M tokens, D hidden size, E experts, K experts per token, F inner size, P = M * K choices, R rows sorted by expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from crosschip.model.config import ModelConfig
from crosschip.model.experts import MixtureOfExperts, combine, dispatch, places, route
from crosschip.model.layers import GatedMLP
from crosschip.model.matrix import Matrix

__all__ = ["AllExperts", "DenseMLP", "Experts", "fed_forward"]

# Up to this many tokens a few experts are computed all at once: their weights are read once, and so would a loop.
_DENSE_EXPERT_TOKENS = 32
_DENSE_EXPERTS = 16
# And more tokens, as long as what is computed in vain costs less than calling each expert: some 60 microseconds on a
# CPU. 8 experts of 128 x 96, fp32: 0.57 ms against 0.84 for 64 tokens, 0.99 against 1.30 for 128.
_FLOPS_OF_A_CALL = 7e6


class DenseMLP:
    """A gated MLP with the norm before it, prepared: gate and up in one product."""

    def __init__(self, gate_up_FD: Tensor, down_DF: Tensor, norm: Tensor, dtype: torch.dtype) -> None:
        self.gate_up = Matrix((gate_up_FD.detach() * norm).to(dtype))
        self.down = Matrix(down_DF.detach().to(dtype))

    @classmethod
    def of(cls, mlp: GatedMLP, norm: Tensor, dtype: torch.dtype) -> DenseMLP:
        """Of a model's own."""
        return cls(torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)), mlp.down_proj.weight, norm, dtype)

    def __call__(self, x_MD: Tensor) -> Tensor:
        """[M, D] to [M, D]."""
        gate, up = self.gate_up(x_MD).chunk(2, dim=-1)
        return self.down(F.silu(gate).mul_(up))


class AllExperts:
    """All experts of a layer side by side as one wide MLP whose inner columns are weighted by the router."""

    def __init__(self, moe: MixtureOfExperts, norm: Tensor, dtype: torch.dtype) -> None:
        gate_EFD, up_EFD = moe.experts.gate_up_proj.detach().chunk(2, dim=1)
        gates, ups = [gate_EFD.flatten(0, 1)], [up_EFD.flatten(0, 1)]
        downs = [moe.experts.down_proj.detach().transpose(0, 1).flatten(1)]
        self.num_routed_columns = gates[0].shape[0]
        if moe.shared_experts is not None:
            gates.append(moe.shared_experts.gate_proj.weight.detach())
            ups.append(moe.shared_experts.up_proj.weight.detach())
            downs.append(moe.shared_experts.down_proj.weight.detach())
        self.gate_up = Matrix((torch.cat((*gates, *ups)) * norm).to(dtype))
        self.down = Matrix(torch.cat(downs, dim=1).to(dtype))
        in_vain = moe.experts.gate_up_proj.shape[0] - moe.gate.config.num_experts_per_tok
        in_vain_flops = 2 * in_vain * (moe.experts.gate_up_proj[0].numel() + moe.experts.down_proj[0].numel())
        calls_flops = _FLOPS_OF_A_CALL * moe.experts.gate_up_proj.shape[0]
        self.most_tokens = max(_DENSE_EXPERT_TOKENS, int(calls_flops / max(1, in_vain_flops)))

    def __call__(self, x_MD: Tensor, share_ME: Tensor) -> Tensor:
        """[M, D] to [M, D]; an expert's share is 0 where it was not chosen."""
        gate, up = self.gate_up(x_MD).chunk(2, dim=-1)
        active = F.silu(gate).mul_(up)
        active[:, : self.num_routed_columns].view(*share_ME.shape, -1).mul_(share_ME[..., None])
        return self.down(active)


class Experts:
    """One layer's router, routed and shared experts with the norm before them, prepared."""

    def __init__(self, moe: MixtureOfExperts, norm: Tensor, dtype: torch.dtype, config: ModelConfig) -> None:
        self.config, self.router = config, moe.gate
        self.router_weight = moe.gate.weight.detach().float() * norm
        pairs = zip(moe.experts.gate_up_proj, moe.experts.down_proj, strict=True)
        self.each = [DenseMLP(gate_up_FD, down_DF, norm, dtype) for gate_up_FD, down_DF in pairs]
        self.shared = None if moe.shared_experts is None else DenseMLP.of(moe.shared_experts, norm, dtype)
        self.all = AllExperts(moe, norm, dtype) if config.n_routed_experts <= _DENSE_EXPERTS else None

    def __call__(self, x_MD: Tensor, chosen: list[Tensor]) -> Tensor:
        """[M, D] to [M, D]; the ids [M, K] of the experts that the tokens took are appended to `chosen`."""
        scores_ME = F.linear(x_MD.float(), self.router_weight).sigmoid_()
        ids_MK, weights_MK = route(scores_ME, self.router.e_score_correction_bias, self.config)
        chosen.append(ids_MK)
        if self.all is not None and x_MD.shape[0] <= self.all.most_tokens:
            return self.all(x_MD, torch.zeros_like(scores_ME).scatter_(1, ids_MK, weights_MK).to(x_MD.dtype))
        place_P, split = places(ids_MK, torch.bincount(ids_MK.flatten(), minlength=len(self.each)))
        parts = dispatch(x_MD, place_P, sum(split)).split(split)
        out_RD = torch.cat([expert(rows) for expert, rows in zip(self.each, parts, strict=True) if len(rows)])
        out_MD = combine(out_RD[place_P].unflatten(0, ids_MK.shape), weights_MK)
        return out_MD if self.shared is None else out_MD.add_(self.shared(x_MD))


def fed_forward(feed_forward: DenseMLP | Experts, x_MD: Tensor, chosen: list[Tensor]) -> Tensor:
    """[M, D] to [M, D]; `chosen` as in `Experts`."""
    return feed_forward(x_MD, chosen) if isinstance(feed_forward, Experts) else feed_forward(x_MD)
