"""Attention over the latent cache, its weights prepared for inference: of a fresh prompt with keys and values written
out, of all else in the latent space.

B rows, T new tokens a row, M = B * T, S cached positions, D hidden size, H heads, N = qk_nope_head_dim,
R = qk_rope_head_dim, V = v_head_dim, L = kv_lora_rank, X = L + R.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crosschip.model.attention import LATENT_NORM_EPS, causal_attention
from crosschip.model.config import ModelConfig
from crosschip.model.latent_cache import Places, read_row, read_rows
from crosschip.model.matrix import Matrix
from crosschip.model.rope import attention_scale, rotate
from crosschip.model.transformer import Block

__all__ = ["LatentAttention", "Span", "unit_rms"]


@dataclass
class Span:
    """Where the new tokens of one call go, and what they may see; the same for every layer."""

    shape_BT: tuple[int, int]
    places: Places
    cos_M1r: Tensor
    sin_M1r: Tensor
    fresh: bool  # nothing was cached before: keys and values can be expanded instead
    lengths_B: list[int] | None  # each row is attended by itself, over so many positions
    mask_BTS: Tensor | None  # [B, T, S], -inf where a token may not look; None when everything cached may be seen


class LatentAttention:
    """One layer's attention weights with its input norm, prepared.

    The outputs of the projections are put in another order than the published one, so that no product's result has to
    be put together again: queries without a position, then all that is rotated (by halves, the key after the queries),
    then the latent.
    """

    def __init__(self, block: Block, dtype: torch.dtype, config: ModelConfig) -> None:
        attention, self.config = block.self_attn, config

        def tensor(name: str, part: str = "weight") -> Tensor:
            found: Tensor = getattr(getattr(attention, name), part)
            return found.detach().float()

        scale, low_rank = attention_scale(config), config.q_lora_rank is not None
        heads, q_order, kv_order = config.num_attention_heads, _query_order(config), _key_order(config)
        query = tensor("q_a_proj") if low_rank else (tensor("q_proj") * scale)[q_order]
        bias = None
        if config.attention_bias:
            q_bias = tensor("q_a_proj", "bias") if low_rank else query.new_zeros(query.shape[0])
            bias = torch.cat((q_bias, tensor("kv_a_proj_with_mqa", "bias")[kv_order])).to(dtype)
        norm = block.input_layernorm.weight.detach().float()
        self.first = Matrix((torch.cat((query, tensor("kv_a_proj_with_mqa")[kv_order])) * norm).to(dtype), bias)
        self.q_up: Matrix | None = None
        if low_rank:
            self.q_up = Matrix((tensor("q_b_proj") * tensor("q_a_layernorm") * scale)[q_order].to(dtype))
        self.q_parts = [heads * config.qk_nope_head_dim, heads * config.qk_rope_head_dim]
        up_HXL = (tensor("kv_b_proj") * tensor("kv_a_layernorm")).to(dtype).unflatten(0, (heads, -1))
        self.key_up_HNL, value_up_HVL = up_HXL.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        self.value_up_HLV = value_up_HVL.transpose(1, 2)
        out_bias = tensor("o_proj", "bias").to(dtype) if config.attention_bias else None
        self.out = Matrix(tensor("o_proj").to(dtype), out_bias)

    def __call__(self, x_MD: Tensor, span: Span, rows_PX: Tensor) -> Tensor:
        """[M, D] to [M, D]: the tokens' latents are written to `rows_PX`, this layer's cache, and attended to."""
        config, num_tokens = self.config, len(x_MD)
        # `view` and `split_with_sizes` are C++; `unflatten` and `split` go through Python, forty times a token.
        q_Mn, turning_Mr, latent_ML = self._project(unit_rms(x_MD, config.rms_norm_eps))
        q_MHN = q_Mn.view(num_tokens, -1, config.qk_nope_head_dim)
        turning_MHR = turning_Mr.view(num_tokens, -1, config.qk_rope_head_dim)
        turned_MHR = rotate(turning_MHR, span.cos_M1r, span.sin_M1r, interleaved=False)
        q_MHR, k_MR = turned_MHR[:, :-1], turned_MHR[:, -1]
        latent_ML = unit_rms(latent_ML, LATENT_NORM_EPS)
        rows_PX.index_copy_(0, span.places.written_M, torch.cat((latent_ML, k_MR), dim=-1))
        if span.fresh:
            out_MHV = self._expanded(q_MHN, q_MHR, latent_ML, k_MR, span.shape_BT)
        else:
            out_MHV = self._absorbed(q_MHN, q_MHR, rows_PX, span)
        return self.out(out_MHV.reshape(num_tokens, -1))

    def _project(self, x_MD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All heads' queries without a position, all that is rotated, and the latent."""
        config, (q_N, q_R) = self.config, self.q_parts
        key_parts = [config.qk_rope_head_dim, config.kv_lora_rank]
        projected = self.first(x_MD)
        if self.q_up is None:
            q_Mn, turning_Mr, latent_ML = projected.split_with_sizes([q_N, q_R + key_parts[0], key_parts[1]], -1)
            return q_Mn, turning_Mr, latent_ML
        low, k_MR, latent_ML = projected.split_with_sizes([projected.shape[-1] - sum(key_parts), *key_parts], -1)
        q_Mn, q_Mr = self.q_up(unit_rms(low, LATENT_NORM_EPS)).split_with_sizes([q_N, q_R], -1)
        return q_Mn, torch.cat((q_Mr, k_MR), dim=-1), latent_ML

    def _expanded(
        self, q_MHN: Tensor, q_MHR: Tensor, latent_ML: Tensor, k_MR: Tensor, shape_BT: tuple[int, int]
    ) -> Tensor:
        latent_BTL = latent_ML.view(*shape_BT, -1)
        k_BTHN = torch.einsum("btl,hnl->bthn", latent_BTL, self.key_up_HNL)
        v_BTHV = torch.einsum("btl,hlv->bthv", latent_BTL, self.value_up_HLV)
        k_BTHR = k_MR.unflatten(0, shape_BT)[:, :, None].expand(-1, -1, q_MHN.shape[1], -1)
        q_BTHX = torch.cat((q_MHN, q_MHR), dim=-1).unflatten(0, shape_BT)
        return causal_attention(q_BTHX, torch.cat((k_BTHN, k_BTHR), dim=-1), v_BTHV, 1.0)

    def _absorbed(self, q_MHN: Tensor, q_MHR: Tensor, rows_PX: Tensor, span: Span) -> Tensor:
        """[M, H, V]: what the queries, rotated where they turn, read from this layer's cache."""
        q_HML = torch.bmm(q_MHN.transpose(0, 1), self.key_up_HNL)
        q_MHX = torch.cat((q_HML.transpose(0, 1), q_MHR), dim=-1)
        mixed_MHL = (self._mix_together if span.lengths_B is None else self._mix_by_row)(q_MHX, rows_PX, span)
        return torch.bmm(mixed_MHL.transpose(0, 1), self.value_up_HLV).transpose(0, 1)

    def _mix_together(self, q_MHX: Tensor, rows_PX: Tensor, span: Span) -> Tensor:
        """The latents that each query sees, weighted: all rows in one product, as long as the longest."""
        (batch, time), (tokens, heads, width) = span.shape_BT, q_MHX.shape
        cache_BSX = read_rows(rows_PX, span.places)
        scores = torch.bmm(q_MHX.view(batch, time * heads, width), cache_BSX.transpose(1, 2)).float()  # [B, T * H, S]
        if span.mask_BTS is not None:
            masked_BTHS = scores.view(batch, time, heads, -1) + span.mask_BTS[:, :, None]
            scores = masked_BTHS.view(scores.shape)
        probs = scores.softmax(dim=-1).to(cache_BSX.dtype)
        return torch.bmm(probs, cache_BSX[..., : self.config.kv_lora_rank]).view(tokens, heads, -1)

    def _mix_by_row(self, q_MHX: Tensor, rows_PX: Tensor, span: Span) -> Tensor:
        """The same for rows of one token, each over its own length."""
        assert span.lengths_B is not None
        mixed = []
        for row, length in enumerate(span.lengths_B):
            cache_SX = read_row(rows_PX, span.places, row, length)
            probs_HS = torch.mm(q_MHX[row], cache_SX.t()).float().softmax(dim=-1).to(cache_SX.dtype)
            mixed.append(torch.mm(probs_HS, cache_SX[:, : self.config.kv_lora_rank]))
        return torch.stack(mixed)


def _halves(config: ModelConfig) -> Tensor:
    """[R] the order in which the published rotary dimensions are laid out as halves (`rotate` says why it may be)."""
    order_R = torch.arange(config.qk_rope_head_dim)
    return order_R.view(-1, 2).t().flatten() if config.rope_interleave else order_R


def _query_order(config: ModelConfig) -> Tensor:
    """The rows of the query projection: all heads' without a position, then all heads' rotated ones."""
    rows_HX = torch.arange(config.num_attention_heads * config.qk_head_dim).view(config.num_attention_heads, -1)
    plain_HN, turning_HR = rows_HX.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=1)
    return torch.cat((plain_HN.flatten(), turning_HR[:, _halves(config)].flatten()))


def _key_order(config: ModelConfig) -> Tensor:
    """The rows of the projection of latent and key: the rotated key, then the latent."""
    return torch.cat((config.kv_lora_rank + _halves(config), torch.arange(config.kv_lora_rank)))


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """x over the root of its mean square, statistics in fp32; the norm's weight is in the next matrix."""
    return torch.rms_norm(x, (x.shape[-1],), None, eps)
