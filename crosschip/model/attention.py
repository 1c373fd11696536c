"""Multi-head latent attention (arXiv 2405.04434, section 2.1) for training: keys and values are expanded.

B batch, T positions, D hidden size, H heads, N = qk_nope_head_dim, R = qk_rope_head_dim, V = v_head_dim,
L = kv_lora_rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosschip.model.config import ModelConfig
from crosschip.model.layers import Linear, RMSNorm
from crosschip.model.rope import attention_scale, rotate

__all__ = ["LatentAttention", "causal_attention"]

# The two inner norms have this eps in the published code whatever `rms_norm_eps` says.
LATENT_NORM_EPS = 1e-6


class LatentAttention(nn.Module):
    """MLA with or without low-rank queries. Parameter names are those of the published weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = attention_scale(config)
        heads, width = config.num_attention_heads, config.hidden_size
        if config.q_lora_rank is None:
            self.q_proj = Linear(width, heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(width, config.q_lora_rank, bias=config.attention_bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(width, config.latent_dim, bias=config.attention_bias)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, width, bias=config.attention_bias)

    def queries(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] to [B, T, H, N + R], before rotation."""
        if self.config.q_lora_rank is None:
            flat = self.q_proj(x_BTD)
        else:
            flat = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))
        return flat.unflatten(-1, (self.config.num_attention_heads, self.config.qk_head_dim))

    def forward(self, x_BTD: Tensor, rope_T2r: Tensor) -> Tensor:
        """Causal self-attention over whole sequences; `rope_T2r` is `rope_table`'s rows for the T positions."""
        config = self.config
        cos, sin = rope_T2r.unbind(1)
        q_BTHN, q_BTHR = self.queries(x_BTD).split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        q_BTHR = rotate(q_BTHR, cos[:, None], sin[:, None], config.rope_interleave)
        latent_BTL, k_BTR = self.kv_a_proj_with_mqa(x_BTD).split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
        k_BTR = rotate(k_BTR, cos, sin, config.rope_interleave)
        kv_BTHX = self.kv_b_proj(self.kv_a_layernorm(latent_BTL)).unflatten(-1, (config.num_attention_heads, -1))
        k_BTHN, v_BTHV = kv_BTHX.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        k_BTHR = k_BTR[:, :, None].expand(-1, -1, config.num_attention_heads, -1)
        q_BTHX = torch.cat((q_BTHN, q_BTHR), dim=-1)
        k_BTHX = torch.cat((k_BTHN, k_BTHR), dim=-1)
        out_BTHV = causal_attention(q_BTHX, k_BTHX, v_BTHV, self.scale)
        return self.o_proj(out_BTHV.flatten(2))


# On CPUs, PyTorch's fused attention needs equal head sizes and is slower than plain products up to about this length;
# beyond it, its memory (linear in the length, not quadratic) decides.
_PLAIN_LENGTH = 1024
_QUERY_BLOCK = 128


def causal_attention(q_BTHX: Tensor, k_BTHX: Tensor, v_BTHV: Tensor, scale: float) -> Tensor:
    """softmax(q k^T * scale + causal mask) v: [B, T, H, X], [B, T, H, X], [B, T, H, V] to [B, T, H, V]."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHX * scale, k_BTHX, v_BTHV))
    if q.device.type == "cpu" and q.shape[2] <= _PLAIN_LENGTH:
        flat = (x.flatten(0, 1).contiguous() for x in (q, k, v))
        out_GTV: Tensor = _BlockwiseAttention.apply(*flat)  # type: ignore[no-untyped-call]
        return out_GTV.unflatten(0, q.shape[:2]).transpose(1, 2)
    # Fused kernels of several vendors, Nvidia's and Huawei's among them, want values as wide as keys.
    wide = F.pad(v, (0, q.shape[-1] - v.shape[-1])) if v.shape[-1] < q.shape[-1] else v
    out = F.scaled_dot_product_attention(q, k, wide, is_causal=True, scale=1.0)
    return out[..., : v.shape[-1]].transpose(1, 2)


class _BlockwiseAttention(torch.autograd.Function):
    """Plain products over blocks of queries, each against the keys up to its end: half of the square is skipped.

    Written out because autograd would pad every block's key and value gradients to full length and add them up.
    Scores are rounded to the compute dtype as in any unfused attention; the softmax runs in fp32 inside its kernel.
    G = B * H.
    """

    @staticmethod
    def forward(ctx: Any, q_GTX: Tensor, k_GTX: Tensor, v_GTV: Tensor) -> Tensor:
        out_GTV = torch.empty_like(v_GTV)
        probs = []
        for first, last in _blocks(q_GTX.shape[1]):
            scores = torch.bmm(q_GTX[:, first:last], k_GTX[:, :last].transpose(1, 2))
            future = torch.full((last - first, last - first), -torch.inf, dtype=q_GTX.dtype, device=q_GTX.device)
            scores[:, :, first:] += future.triu_(1)
            probs.append(scores.softmax(dim=-1))
            out_GTV[:, first:last] = torch.bmm(probs[-1], v_GTV[:, :last])
        ctx.save_for_backward(q_GTX, k_GTX, v_GTV, *probs)
        return out_GTV

    @staticmethod
    def backward(ctx: Any, grad_GTV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_GTX, k_GTX, v_GTV, *probs = ctx.saved_tensors
        grad_q_GTX, grad_k_GTX, grad_v_GTV = (torch.zeros_like(x) for x in (q_GTX, k_GTX, v_GTV))
        for (first, last), prob in zip(_blocks(q_GTX.shape[1]), probs, strict=True):
            grad = grad_GTV[:, first:last]
            grad_v_GTV[:, :last] += torch.bmm(prob.transpose(1, 2), grad)
            grad_prob = torch.bmm(grad, v_GTV[:, :last].transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_prob, prob, -1, prob.dtype)
            grad_q_GTX[:, first:last] = torch.bmm(grad_scores, k_GTX[:, :last])
            grad_k_GTX[:, :last] += torch.bmm(grad_scores.transpose(1, 2), q_GTX[:, first:last])
        return grad_q_GTX, grad_k_GTX, grad_v_GTV


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(first, min(first + _QUERY_BLOCK, length)) for first in range(0, length, _QUERY_BLOCK)]
