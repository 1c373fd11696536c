"""Floating point operations one trained token costs, from the architecture alone. Pure arithmetic, no torch.

Only matrix products count, each multiply-add as two operations, and the backward pass as two forward passes: the usual
model FLOPs of "model FLOPs utilisation" (Chowdhery et al. 2022, appendix B). Attention counts the causal half only;
recomputation, the optimizer and the embedding lookup count nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crosschip.model import ModelConfig

__all__ = ["train_flops_per_token"]


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Operations of one token's forward and backward pass in sequences of `seq_len` tokens."""
    dense_layers = min(config.first_k_dense_replace, config.num_hidden_layers)
    moe_layers = config.num_hidden_layers - dense_layers
    attention = _attention_products(config, seq_len)
    head = config.hidden_size * config.vocab_size
    dense = attention + 3 * config.hidden_size * config.intermediate_size
    moe = attention + _moe_products(config)
    # One prediction module: the joined projection (2h -> h), one layer, the shared head; arXiv 2412.19437, section 2.2.
    mtp = config.num_nextn_predict_layers * (2 * config.hidden_size**2 + (moe if moe_layers else dense) + head)
    return 6.0 * (dense_layers * dense + moe_layers * moe + head + mtp)


def _attention_products(config: ModelConfig, seq_len: int) -> float:
    """Multiply-adds per token of one latent attention, scores and values included."""
    qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    heads, hidden = config.num_attention_heads, config.hidden_size
    if config.q_lora_rank is None:
        query = hidden * heads * qk_head_dim
    else:
        query = config.q_lora_rank * (hidden + heads * qk_head_dim)
    key_value = hidden * (config.kv_lora_rank + config.qk_rope_head_dim)
    key_value += config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    output = heads * config.v_head_dim * hidden
    scores = heads * (qk_head_dim + config.v_head_dim) * (seq_len + 1) / 2
    return query + key_value + output + scores


def _moe_products(config: ModelConfig) -> float:
    """Multiply-adds per token of one mixture of experts: the router, the chosen experts and the shared ones."""
    num_experts = config.num_experts_per_tok + config.n_shared_experts
    router = config.hidden_size * config.n_routed_experts
    return router + 3 * config.hidden_size * config.moe_intermediate_size * num_experts
