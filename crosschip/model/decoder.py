"""Inference with a latent cache: what is kept per token is the latent and one rotated key, not keys and values.

Two identities save work. With queries carried into the latent space (the up-projection of keys is absorbed into the
query, that of values into the output; arXiv 2405.04434, section 2.1.2) decoding reads `kv_lora_rank +
qk_rope_head_dim` numbers a token and layer. And the weights of a norm are multiplied into the matrices that read it.

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
from crosschip.model.experts import MixtureOfExperts, combine, dispatch, places, route
from crosschip.model.layers import GatedMLP
from crosschip.model.matrix import Matrix
from crosschip.model.rope import attention_scale, rope_table, rotate
from crosschip.model.transformer import Block, Transformer

__all__ = ["Decoder", "LatentCache", "generate"]

# Up to this many tokens a few experts are computed all at once: their weights are read once, and so would a loop.
_DENSE_EXPERT_TOKENS = 32
_DENSE_EXPERTS = 16


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
    cos_BT1r: Tensor
    sin_BT1r: Tensor
    num_cached: int  # S: the longest row after this call
    contiguous_from: int | None  # first slot when the slots are neighbours: then the cache is read without a copy
    fresh: bool  # nothing was cached before: keys and values can be expanded instead
    mask_BTS: Tensor | None  # [B, T, S], -inf where a token may not look; None when everything cached may be seen


class _Attention:
    """One layer's attention weights with its input norm, prepared."""

    def __init__(self, block: Block, dtype: torch.dtype, config: ModelConfig) -> None:
        attention, self.config = block.self_attn, config

        def tensor(name: str, part: str = "weight") -> Tensor:
            found: Tensor = getattr(getattr(attention, name), part)
            return found.detach().float()

        scale, low_rank = attention_scale(config), config.q_lora_rank is not None
        query = tensor("q_a_proj") if low_rank else tensor("q_proj") * scale
        self.q_width = query.shape[0]
        bias = None
        if config.attention_bias:
            q_bias = tensor("q_a_proj", "bias") if low_rank else query.new_zeros(self.q_width)
            bias = torch.cat((q_bias, tensor("kv_a_proj_with_mqa", "bias"))).to(dtype)
        norm = block.input_layernorm.weight.detach().float()
        self.first = Matrix((torch.cat((query, tensor("kv_a_proj_with_mqa"))) * norm).to(dtype), bias)
        self.q_up: Matrix | None = None
        if low_rank:
            self.q_up = Matrix((tensor("q_b_proj") * tensor("q_a_layernorm") * scale).to(dtype))
        up_HXL = (
            (tensor("kv_b_proj") * tensor("kv_a_layernorm")).to(dtype).unflatten(0, (config.num_attention_heads, -1))
        )
        self.key_up_HNL, self.value_up_HVL = up_HXL.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        out_bias = tensor("o_proj", "bias").to(dtype) if config.attention_bias else None
        self.out = Matrix(tensor("o_proj").to(dtype), out_bias)

    def __call__(self, x_BTD: Tensor, span: _Span, cache_SPX: Tensor) -> Tensor:
        config = self.config
        q, latent_BTL, k_BTR = self.first(_unit(x_BTD, config.rms_norm_eps)).split(
            [self.q_width, config.kv_lora_rank, config.qk_rope_head_dim], dim=-1
        )
        if self.q_up is not None:
            q = self.q_up(_unit(q, LATENT_NORM_EPS))
        q_BTHX = q.unflatten(-1, (config.num_attention_heads, -1))
        q_BTHN, q_BTHR = q_BTHX.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        both = torch.cat((q_BTHR, k_BTR[:, :, None]), dim=2)
        rotated = rotate(both, span.cos_BT1r, span.sin_BT1r, config.rope_interleave)
        q_BTHR, k_BTR = rotated[:, :, :-1], rotated[:, :, -1]
        latent_BTL = _unit(latent_BTL, LATENT_NORM_EPS)
        cache_SPX[span.slots[:, None], span.positions_BT] = torch.cat((latent_BTL, k_BTR), dim=-1)
        if span.fresh:
            out_BTHV = self._expanded(q_BTHN, q_BTHR, latent_BTL, k_BTR)
        else:
            out_BTHV = self._absorbed(q_BTHN, q_BTHR, _read_cache(cache_SPX, span), span.mask_BTS)
        return self.out(out_BTHV.flatten(2))

    def _expanded(self, q_BTHN: Tensor, q_BTHR: Tensor, latent_BTL: Tensor, k_BTR: Tensor) -> Tensor:
        k_BTHN = torch.einsum("btl,hnl->bthn", latent_BTL, self.key_up_HNL)
        v_BTHV = torch.einsum("btl,hvl->bthv", latent_BTL, self.value_up_HVL)
        k_BTHR = k_BTR[:, :, None].expand(-1, -1, q_BTHN.shape[2], -1)
        q_BTHX, k_BTHX = torch.cat((q_BTHN, q_BTHR), dim=-1), torch.cat((k_BTHN, k_BTHR), dim=-1)
        return causal_attention(q_BTHX, k_BTHX, v_BTHV, 1.0)

    def _absorbed(self, q_BTHN: Tensor, q_BTHR: Tensor, cache_BSX: Tensor, mask_BTS: Tensor | None) -> Tensor:
        batch, time, heads, _ = q_BTHN.shape
        q_HML = torch.bmm(q_BTHN.flatten(0, 1).transpose(0, 1), self.key_up_HNL)
        q_BTHL = q_HML.transpose(0, 1).unflatten(0, (batch, time))
        q_BTHX = torch.cat((q_BTHL, q_BTHR), dim=-1)
        scores = torch.bmm(q_BTHX.flatten(1, 2), cache_BSX.transpose(1, 2)).float()  # [B, T * H, S]
        if mask_BTS is not None:
            scores = (scores.unflatten(1, (time, heads)) + mask_BTS[:, :, None]).flatten(1, 2)
        probs = scores.softmax(dim=-1).to(cache_BSX.dtype)
        mixed_BTHL = torch.bmm(probs, cache_BSX[..., : self.config.kv_lora_rank]).unflatten(1, (time, heads))
        out_HMV = torch.bmm(mixed_BTHL.flatten(0, 1).transpose(0, 1), self.value_up_HVL.transpose(1, 2))
        return out_HMV.transpose(0, 1).unflatten(0, (batch, time))


def _unit(x: Tensor, eps: float) -> Tensor:
    """x over the root of its mean square, statistics in fp32; the norm's weight is in the next matrix."""
    return F.rms_norm(x, (x.shape[-1],), None, eps)


def _read_cache(cache_SPX: Tensor, span: _Span) -> Tensor:
    if span.contiguous_from is not None:
        last = span.contiguous_from + span.slots.shape[0]
        return cache_SPX[span.contiguous_from : last, : span.num_cached]
    return cache_SPX[span.slots, : span.num_cached]


class _DenseMLP:
    """A gated MLP with the norm before it, prepared: gate and up in one product."""

    def __init__(self, gate_up_FD: Tensor, down_DF: Tensor, norm: Tensor, dtype: torch.dtype) -> None:
        self.gate_up = Matrix((gate_up_FD.detach() * norm).to(dtype))
        self.down = Matrix(down_DF.detach().to(dtype))

    @classmethod
    def of(cls, mlp: GatedMLP, norm: Tensor, dtype: torch.dtype) -> _DenseMLP:
        return cls(torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)), mlp.down_proj.weight, norm, dtype)

    def __call__(self, x_MD: Tensor) -> Tensor:
        gate, up = self.gate_up(x_MD).chunk(2, dim=-1)
        return self.down(F.silu(gate).mul_(up))


class _AllExperts:
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

    def __call__(self, x_MD: Tensor, share_ME: Tensor) -> Tensor:
        gate, up = self.gate_up(x_MD).chunk(2, dim=-1)
        active = F.silu(gate).mul_(up)
        active[:, : self.num_routed_columns].unflatten(1, (share_ME.shape[1], -1)).mul_(share_ME[..., None])
        return self.down(active)


class _Experts:
    """One layer's router, routed and shared experts with the norm before them, prepared."""

    def __init__(self, moe: MixtureOfExperts, norm: Tensor, dtype: torch.dtype, config: ModelConfig) -> None:
        self.config, self.router = config, moe.gate
        self.router_weight = moe.gate.weight.detach().float() * norm
        pairs = zip(moe.experts.gate_up_proj, moe.experts.down_proj, strict=True)
        self.each = [_DenseMLP(gate_up_FD, down_DF, norm, dtype) for gate_up_FD, down_DF in pairs]
        self.shared = None if moe.shared_experts is None else _DenseMLP.of(moe.shared_experts, norm, dtype)
        self.all = _AllExperts(moe, norm, dtype) if config.n_routed_experts <= _DENSE_EXPERTS else None

    def __call__(self, x_MD: Tensor) -> Tensor:
        scores_ME = F.linear(x_MD.float(), self.router_weight).sigmoid_()
        ids_MK, weights_MK = route(scores_ME, self.router.e_score_correction_bias, self.config)
        if self.all is not None and x_MD.shape[0] <= _DENSE_EXPERT_TOKENS:
            return self.all(x_MD, torch.zeros_like(scores_ME).scatter_(1, ids_MK, weights_MK).to(x_MD.dtype))
        place_P, split = places(ids_MK, torch.bincount(ids_MK.flatten(), minlength=len(self.each)))
        parts = dispatch(x_MD, place_P, sum(split)).split(split)
        out_RD = torch.cat([expert(rows) for expert, rows in zip(self.each, parts, strict=True) if len(rows)])
        out_MD = combine(out_RD[place_P].unflatten(0, ids_MK.shape), weights_MK)
        return out_MD if self.shared is None else out_MD.add_(self.shared(x_MD))


class Decoder:
    """A model prepared for inference. Weights are read once: make a new decoder after an update."""

    def __init__(self, model: Transformer, dtype: torch.dtype | None = None) -> None:
        self.config = model.config
        self.dtype = dtype or model.embed_tokens.weight.dtype
        self.device = model.embed_tokens.weight.device
        self._embedding = model.embed_tokens.weight.detach().to(self.dtype)
        self._output = Matrix(model.lm_head.weight.detach().to(self.dtype))
        self._norm = model.norm.weight.detach().to(self.dtype)
        blocks = [block for block in model.layers if isinstance(block, Block)]
        self._layers = [(_Attention(b, self.dtype, self.config), self._feed_forward(b)) for b in blocks]
        self._rope_P2r = torch.empty(0)

    def _feed_forward(self, block: Block) -> _DenseMLP | _Experts:
        norm = block.post_attention_layernorm.weight.detach().float()
        if isinstance(block.mlp, MixtureOfExperts):
            return _Experts(block.mlp, norm, self.dtype, self.config)
        return _DenseMLP.of(block.mlp, norm, self.dtype)

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
        for (attention, feed_forward), rows in zip(self._layers, cache.rows, strict=True):
            x_BTD += attention(x_BTD, span, rows)
            x_BTD += feed_forward(_unit(x_BTD, eps).flatten(0, 1)).view_as(x_BTD)
        return F.rms_norm(x_BTD, (x_BTD.shape[-1],), self._norm, eps)

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
            cos_BT1r=rope_BT2r[:, :, :1],
            sin_BT1r=rope_BT2r[:, :, 1:],
            num_cached=num_cached,
            contiguous_from=slots[0] if neighbours else None,
            fresh=max(starts) == 0 and time > 1,
            mask_BTS=mask,
        )

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., C] in fp32."""
        return self._output(hidden).float()


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
