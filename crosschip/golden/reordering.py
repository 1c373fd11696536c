"""The same model with its inner dimensions in another order: every sum runs in another order, on any chip.

In exact arithmetic nothing changes. What does change is how far an honest chip's rounding goes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosschip.model import Transformer
from crosschip.model.attention import LatentAttention
from crosschip.model.experts import MixtureOfExperts
from crosschip.model.layers import GatedMLP, RMSNorm
from crosschip.model.transformer import Block, MultiTokenPrediction

__all__ = ["reorder"]


@torch.no_grad()
def reorder(model: Transformer, seed: int) -> Tensor:
    """Permute, in place, the hidden dimension everywhere and the inner dimension of every MLP, expert and latent.

    Returns the order that puts a hidden state back: `x[..., order]`.
    """
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randperm(config.hidden_size, generator=generator)
    _take(model.embed_tokens.weight, 1, hidden)
    _take(model.norm.weight, 0, hidden)
    if model.lm_head.weight is not model.embed_tokens.weight:
        _take(model.lm_head.weight, 1, hidden)
    for module in model.mtp:
        assert isinstance(module, MultiTokenPrediction)
        for norm in (module.enorm, module.hnorm, module.shared_head["norm"]):
            assert isinstance(norm, RMSNorm)
            _take(norm.weight, 0, hidden)
        _take(module.eh_proj.weight, 0, hidden)
        _take(module.eh_proj.weight, 1, torch.cat((hidden, hidden + config.hidden_size)))
    for block in (*model.layers, *model.mtp):
        assert isinstance(block, Block)
        _take(block.input_layernorm.weight, 0, hidden)
        _take(block.post_attention_layernorm.weight, 0, hidden)
        _reorder_attention(block.self_attn, hidden, generator)
        if isinstance(block.mlp, MixtureOfExperts):
            _reorder_experts(block.mlp, hidden, generator)
        else:
            _reorder_mlp(block.mlp, hidden, generator)
    return hidden.argsort()


def _take(parameter: Tensor, dim: int, order: Tensor) -> None:
    parameter.copy_(parameter.index_select(dim, order.to(parameter.device)))


def _reorder_attention(attention: LatentAttention, hidden: Tensor, generator: torch.Generator) -> None:
    config = attention.config
    query = attention.q_proj if config.q_lora_rank is None else attention.q_a_proj
    _take(query.weight, 1, hidden)
    _take(attention.kv_a_proj_with_mqa.weight, 1, hidden)
    _take(attention.o_proj.weight, 0, hidden)
    if attention.o_proj.bias is not None:
        _take(attention.o_proj.bias, 0, hidden)
    latent = torch.randperm(config.kv_lora_rank, generator=generator)
    rows = torch.cat((latent, torch.arange(config.kv_lora_rank, config.latent_dim)))
    _take(attention.kv_a_proj_with_mqa.weight, 0, rows)
    if attention.kv_a_proj_with_mqa.bias is not None:
        _take(attention.kv_a_proj_with_mqa.bias, 0, rows)
    _take(attention.kv_a_layernorm.weight, 0, latent)
    _take(attention.kv_b_proj.weight, 1, latent)


def _reorder_mlp(mlp: GatedMLP, hidden: Tensor, generator: torch.Generator) -> None:
    inner = torch.randperm(mlp.gate_proj.out_features, generator=generator)
    for projection in (mlp.gate_proj, mlp.up_proj):
        _take(projection.weight, 1, hidden)
        _take(projection.weight, 0, inner)
    _take(mlp.down_proj.weight, 0, hidden)
    _take(mlp.down_proj.weight, 1, inner)


def _reorder_experts(mixture: MixtureOfExperts, hidden: Tensor, generator: torch.Generator) -> None:
    _take(mixture.gate.weight, 1, hidden)
    experts = mixture.experts
    width = experts.down_proj.shape[2]
    inner = torch.randperm(width, generator=generator)
    _take(experts.gate_up_proj, 2, hidden)
    _take(experts.gate_up_proj, 1, torch.cat((inner, inner + width)))
    _take(experts.down_proj, 1, hidden)
    _take(experts.down_proj, 2, inner)
    if mixture.shared_experts is not None:
        _reorder_mlp(mixture.shared_experts, hidden, generator)
