"""Inference with a latent cache: what is kept per token is the latent and one rotated key, not keys and values.

With queries carried into the latent space (the up-projection of keys is absorbed into the query, that of values into
the output; arXiv 2405.04434, section 2.1.2) decoding reads `kv_lora_rank + qk_rope_head_dim` numbers a token and layer.

B rows, T new tokens a row, S cached positions, D hidden size, H heads, N = qk_nope_head_dim, R = qk_rope_head_dim,
V = v_head_dim, L = kv_lora_rank, X = L + R, E experts, F expert intermediate size, M = B * T, C vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from crosschip.errors import ModelError
from crosschip.model.attention import LATENT_NORM_EPS, causal_attention
from crosschip.model.config import ModelConfig
from crosschip.model.experts import MixtureOfExperts, Router, apply_experts, route
from crosschip.model.layers import GatedMLP, rms_norm
from crosschip.model.rope import attention_scale, rope_table, rotate
from crosschip.model.transformer import Block, Transformer

__all__ = ["Decoder", "LatentCache", "generate"]

# Up to this many tokens all experts are computed in one product: it reads every weight once, and so would a loop.
_DENSE_EXPERT_TOKENS = 32


@dataclass
class LatentCache:
    """One latent row per slot and position: `rows[layer]` is [num_slots, max_len, X]."""

    rows: list[Tensor]
    num_slots: int
    max_len: int


@dataclass
class _Span:
    """Where the new tokens of one call go, and what they may see; the same for every layer."""

    slots: Tensor  # [B]
    positions_BT: Tensor
    cos_BTr: Tensor
    sin_BTr: Tensor
    num_cached: int  # S: the longest row after this call
    contiguous_from: int | None  # first slot when the slots are neighbours: then the cache is read without a copy
    fresh: bool  # nothing was cached before: keys and values can be expanded instead
    mask_B1S: Tensor | None  # [B, T, S], -inf where a token may not look; None when everything cached may be seen


class _Attention:
    """One layer's attention weights, prepared."""

    def __init__(self, block: Block, dtype: torch.dtype, config: ModelConfig) -> None:
        attention = block.self_attn

        def weight(name: str) -> Tensor:
            found: Tensor = getattr(attention, name).weight
            return found.detach().to(dtype)

        self.config, self.scale = config, attention_scale(config)
        query = "q_proj" if config.q_lora_rank is None else "q_a_proj"
        self.q_width = getattr(attention, query).out_features
        self.down = torch.cat((weight(query), weight("kv_a_proj_with_mqa")))
        self.down_bias: Tensor | None = None
        if config.attention_bias:
            biases = [getattr(attention, name).bias for name in (query, "kv_a_proj_with_mqa")]
            zeros = torch.zeros(self.q_width, device=self.down.device)
            self.down_bias = torch.cat([zeros if b is None else b.detach() for b in biases]).to(dtype)
        self.q_norm = None if config.q_lora_rank is None else weight("q_a_layernorm")
        self.q_up = None if config.q_lora_rank is None else weight("q_b_proj")
        self.kv_norm = weight("kv_a_layernorm")
        up_HXL = weight("kv_b_proj").unflatten(0, (config.num_attention_heads, -1))
        self.key_up_HNL, self.value_up_HVL = up_HXL.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        self.out = weight("o_proj")
        self.out_bias = attention.o_proj.bias.detach().to(dtype) if config.attention_bias else None

    def __call__(self, x_BTD: Tensor, span: _Span, cache_SPX: Tensor) -> Tensor:
        config = self.config
        q, latent_BTL, k_BTR = F.linear(x_BTD, self.down, self.down_bias).split(
            [self.q_width, config.kv_lora_rank, config.qk_rope_head_dim], dim=-1
        )
        if self.q_up is not None:
            assert self.q_norm is not None
            q = F.linear(rms_norm(q, self.q_norm, LATENT_NORM_EPS), self.q_up)
        q_BTHX = q.unflatten(-1, (config.num_attention_heads, -1))
        q_BTHN, q_BTHR = q_BTHX.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        q_BTHR = rotate(q_BTHR, span.cos_BTr[:, :, None], span.sin_BTr[:, :, None], config.rope_interleave)
        k_BTR = rotate(k_BTR, span.cos_BTr, span.sin_BTr, config.rope_interleave)
        latent_BTL = rms_norm(latent_BTL, self.kv_norm, LATENT_NORM_EPS)
        cache_SPX[span.slots[:, None], span.positions_BT] = torch.cat((latent_BTL, k_BTR), dim=-1)
        if span.fresh:
            out_BTHV = self._expanded(q_BTHN, q_BTHR, latent_BTL, k_BTR)
        else:
            out_BTHV = self._absorbed(q_BTHN, q_BTHR, _read_cache(cache_SPX, span), span.mask_B1S)
        return F.linear(out_BTHV.flatten(2), self.out, self.out_bias)

    def _expanded(self, q_BTHN: Tensor, q_BTHR: Tensor, latent_BTL: Tensor, k_BTR: Tensor) -> Tensor:
        k_BTHN = torch.einsum("btl,hnl->bthn", latent_BTL, self.key_up_HNL)
        v_BTHV = torch.einsum("btl,hvl->bthv", latent_BTL, self.value_up_HVL)
        k_BTHR = k_BTR[:, :, None].expand(-1, -1, q_BTHN.shape[2], -1)
        q_BTHX, k_BTHX = torch.cat((q_BTHN, q_BTHR), dim=-1), torch.cat((k_BTHN, k_BTHR), dim=-1)
        return causal_attention(q_BTHX, k_BTHX, v_BTHV, self.scale)

    def _absorbed(self, q_BTHN: Tensor, q_BTHR: Tensor, cache_BSX: Tensor, mask_BTS: Tensor | None) -> Tensor:
        batch, time, heads, _ = q_BTHN.shape
        q_HML = torch.bmm(q_BTHN.flatten(0, 1).transpose(0, 1), self.key_up_HNL)
        q_BTHL = q_HML.transpose(0, 1).unflatten(0, (batch, time))
        q_BTHX = torch.cat((q_BTHL, q_BTHR), dim=-1).mul_(self.scale)
        scores = torch.bmm(q_BTHX.flatten(1, 2), cache_BSX.transpose(1, 2)).float()  # [B, T * H, S]
        if mask_BTS is not None:
            scores = (scores.unflatten(1, (time, heads)) + mask_BTS[:, :, None]).flatten(1, 2)
        probs = scores.softmax(dim=-1).to(cache_BSX.dtype)
        mixed_BTHL = torch.bmm(probs, cache_BSX[..., : self.config.kv_lora_rank]).unflatten(1, (time, heads))
        out_HMV = torch.bmm(mixed_BTHL.flatten(0, 1).transpose(0, 1), self.value_up_HVL.transpose(1, 2))
        return out_HMV.transpose(0, 1).unflatten(0, (batch, time))


def _read_cache(cache_SPX: Tensor, span: _Span) -> Tensor:
    if span.contiguous_from is not None:
        last = span.contiguous_from + span.slots.shape[0]
        return cache_SPX[span.contiguous_from : last, : span.num_cached]
    return cache_SPX[span.slots, : span.num_cached]


class _FeedForward:
    """One layer's dense MLP, or its experts, prepared."""

    def __init__(self, block: Block, dtype: torch.dtype, config: ModelConfig) -> None:
        self.config = config
        mlp = block.mlp
        dense = mlp if isinstance(mlp, GatedMLP) else mlp.shared_experts
        self.gate_up = self.down = None
        if dense is not None:
            self.gate_up = torch.cat((dense.gate_proj.weight, dense.up_proj.weight)).detach().to(dtype)
            self.down = dense.down_proj.weight.detach().to(dtype)
        self.router: Router | None = None
        if isinstance(mlp, MixtureOfExperts):
            self.router = mlp.gate
            self.router_weight = mlp.gate.weight.detach().float()
            self.expert_gate_up_EFD = mlp.experts.gate_up_proj.detach().to(dtype)
            self.expert_down_EDF = mlp.experts.down_proj.detach().to(dtype)

    def __call__(self, x_MD: Tensor) -> Tensor:
        out_MD = None
        if self.gate_up is not None:
            assert self.down is not None
            out_MD = F.linear(_swiglu(F.linear(x_MD, self.gate_up)), self.down)
        if self.router is None:
            assert out_MD is not None
            return out_MD
        routed_MD = self._routed(x_MD)
        return routed_MD if out_MD is None else routed_MD.add_(out_MD)

    def _routed(self, x_MD: Tensor) -> Tensor:
        assert self.router is not None
        scores_ME = F.linear(x_MD.float(), self.router_weight).sigmoid()
        ids_MK, weights_MK = route(scores_ME, self.router.e_score_correction_bias, self.config)
        num_experts = scores_ME.shape[1]
        if x_MD.shape[0] > _DENSE_EXPERT_TOKENS or ids_MK.numel() < num_experts:
            out_MD, _ = apply_experts(x_MD, ids_MK, weights_MK, self.expert_gate_up_EFD, self.expert_down_EDF)
            return out_MD
        share_ME = torch.zeros_like(scores_ME).scatter_(1, ids_MK, weights_MK).to(x_MD.dtype)
        inner_ME2F = F.linear(x_MD, self.expert_gate_up_EFD.flatten(0, 1)).unflatten(1, (num_experts, -1))
        active_MEF = _swiglu(inner_ME2F).mul_(share_ME[..., None])
        return torch.bmm(active_MEF.transpose(0, 1), self.expert_down_EDF.transpose(1, 2)).sum(0)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class Decoder:
    """A model prepared for inference. Weights are read once: make a new decoder after an update."""

    def __init__(self, model: Transformer, dtype: torch.dtype | None = None) -> None:
        self.config = model.config
        self.dtype = dtype or model.embed_tokens.weight.dtype
        self.device = model.embed_tokens.weight.device
        self._embedding = model.embed_tokens.weight.detach().to(self.dtype)
        self._output = model.lm_head.weight.detach().to(self.dtype)
        self._norm = model.norm.weight.detach().to(self.dtype)
        self._layers = []
        for block in model.layers:
            assert isinstance(block, Block)
            self._layers.append(
                (
                    block.input_layernorm.weight.detach().to(self.dtype),
                    _Attention(block, self.dtype, self.config),
                    block.post_attention_layernorm.weight.detach().to(self.dtype),
                    _FeedForward(block, self.dtype, self.config),
                )
            )
        self._rope_P2r = torch.empty(0)

    def new_cache(self, num_slots: int, max_len: int) -> LatentCache:
        """Memory for `num_slots` sequences of up to `max_len` tokens."""
        if max_len > self.config.max_position_embeddings:
            raise ModelError(
                f"a cache of {max_len} positions, but the model knows {self.config.max_position_embeddings}",
                "ask for shorter sequences",
            )
        shape = (num_slots, max_len, self.config.latent_dim)
        rows = [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in self._layers]
        self._rope_P2r = rope_table(self.config, max_len, self.device)
        return LatentCache(rows, num_slots, max_len)

    @torch.inference_mode()
    def extend(self, tokens_BT: Tensor, start_B: Tensor, slots_B: Tensor, cache: LatentCache) -> Tensor:
        """Append T tokens to each row; states after the final norm, [B, T, D].

        Token t of row b takes position `start_B[b] + t` of slot `slots_B[b]` and sees positions 0 to its own. Rows may
        be padded on the right: the padding lies past the row's length and is overwritten later. The three inputs are
        int64 on the CPU; slots are distinct.
        """
        span = self._span(start_B, slots_B, tokens_BT.shape[1], cache)
        x_BTD = F.embedding(tokens_BT.to(self.device), self._embedding)
        eps = self.config.rms_norm_eps
        for (norm_1, attention, norm_2, feed_forward), rows in zip(self._layers, cache.rows, strict=True):
            x_BTD = x_BTD + attention(rms_norm(x_BTD, norm_1, eps), span, rows)
            x_BTD = x_BTD + feed_forward(rms_norm(x_BTD, norm_2, eps).flatten(0, 1)).view_as(x_BTD)
        return rms_norm(x_BTD, self._norm, eps)

    def _span(self, start_B: Tensor, slots_B: Tensor, time: int, cache: LatentCache) -> _Span:
        starts, slots = start_B.tolist(), slots_B.tolist()
        num_cached = max(starts) + time
        assert num_cached <= cache.max_len, (num_cached, cache.max_len)
        positions_BT = (start_B[:, None] + torch.arange(time)).to(self.device)
        rope_BT2r = self._rope_P2r[positions_BT]
        neighbours = slots == list(range(slots[0], slots[0] + len(slots)))
        mask = None
        if time > 1 or min(starts) != max(starts):
            seen_BTS = torch.arange(num_cached, device=self.device) <= positions_BT[..., None]
            mask = torch.zeros(seen_BTS.shape, device=self.device).masked_fill_(~seen_BTS, -torch.inf)
        return _Span(
            slots=slots_B.to(self.device),
            positions_BT=positions_BT,
            cos_BTr=rope_BT2r[:, :, 0],
            sin_BTr=rope_BT2r[:, :, 1],
            num_cached=num_cached,
            contiguous_from=slots[0] if neighbours else None,
            fresh=max(starts) == 0 and time > 1,
            mask_B1S=mask,
        )

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., C] in fp32."""
        return F.linear(hidden, self._output).float()


def generate(decoder: Decoder, prompts: list[list[int]], max_new_tokens: int, stop_ids: set[int]) -> list[list[int]]:
    """Greedy answers to a batch of prompts; an answer ends with its stop id if one came."""
    if not prompts:
        return []
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    if int(lengths.min()) == 0:
        raise ModelError("an empty prompt", "give at least one token, the beginning-of-text token for example")
    room = decoder.config.max_position_embeddings - int(lengths.max())
    if room < 1:
        raise ModelError(
            f"a prompt of {int(lengths.max())} tokens fills all {decoder.config.max_position_embeddings} "
            "positions of the model",
            "shorten the prompt",
        )
    max_new_tokens = min(max_new_tokens, room)
    cache = decoder.new_cache(len(prompts), int(lengths.max()) + max_new_tokens)
    padded_BT = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        padded_BT[row, : len(prompt)] = torch.tensor(prompt)
    slots = torch.arange(len(prompts))
    hidden = decoder.extend(padded_BT, torch.zeros_like(lengths), slots, cache)
    next_B = decoder.logits(hidden[slots, lengths - 1]).argmax(-1).cpu()
    answers: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    for step in range(max_new_tokens):
        for row, token in enumerate(next_B.tolist()):
            if row in running:
                answers[row].append(token)
                if token in stop_ids:
                    running.discard(row)
        if not running or step == max_new_tokens - 1:
            break
        next_B = decoder.logits(decoder.extend(next_B[:, None], lengths + step, slots, cache)[:, 0]).argmax(-1).cpu()
    return answers
