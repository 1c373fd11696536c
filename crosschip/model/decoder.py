"""Inference with a latent cache: what is kept per token is the latent and one rotated key, not keys and values.

Two identities save work. With queries carried into the latent space (the up-projection of keys is absorbed into the
query, that of values into the output; arXiv 2405.04434, section 2.1.2) decoding reads `kv_lora_rank +
qk_rope_head_dim` numbers a token and layer. And the weights of a norm are multiplied into the matrices that read it.

B rows, T new tokens a row, S cached positions, D hidden size, H heads, N = qk_nope_head_dim, R = qk_rope_head_dim,
V = v_head_dim, L = kv_lora_rank, X = L + R, E experts, F expert intermediate size, M = B * T, C vocabulary.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from crosschip.errors import ModelError
from crosschip.model.experts import MixtureOfExperts
from crosschip.model.feed_forward import DenseMLP, Experts, fed_forward
from crosschip.model.latent_attention import LatentAttention, Span, unit_rms
from crosschip.model.latent_cache import BLOCK_TOKENS, LatentCache
from crosschip.model.matrix import Matrix
from crosschip.model.rope import rope_table
from crosschip.model.route_record import RouteRecord
from crosschip.model.transformer import Block, MultiTokenPrediction, Transformer

if TYPE_CHECKING:
    from crosschip.model.rows import RowStep

__all__ = ["Decoder", "LatentCache", "generate"]

logger = logging.getLogger("crosschip.model")

# On CPUs long rows are read faster one by one (16 rows of 2048 tokens, fp32: 4.8 ms a layer against 9.7 in one product,
# and 18.1 where their blocks are scattered and gathered first).
_BY_ROW_FROM = 1024
# Up to so many numbers in all heads' queries to a row of the cache, and weights in all layers (64 MB), a step's time is
# that of its calls (`rows`).
_SMALL_ATTENTION, _SMALL_LAYERS = 2048, 16_000_000


class _Draft:
    """The first multi-token-prediction module, prepared: from states and the tokens after them to states one further.

    The two norms before `eh_proj` are in its weights; arXiv 2412.19437, section 2.2.
    """

    def __init__(self, module: MultiTokenPrediction, decoder: Decoder) -> None:
        norms = torch.cat((module.enorm.weight, module.hnorm.weight)).detach().float()
        self.join = Matrix((module.eh_proj.weight.detach().float() * norms).to(decoder.dtype))
        self.attention = LatentAttention(module, decoder.dtype, decoder.config)
        self.feed_forward = decoder._feed_forward(module)
        norm = module.shared_head["norm"].get_parameter("weight")
        self.norm = norm.detach().to(decoder.dtype)

    def __call__(self, next_MD: Tensor, state_MD: Tensor, span: Span, rows_PX: Tensor, eps: float) -> Tensor:
        x_MD = self.join(torch.cat((unit_rms(next_MD, eps), unit_rms(state_MD, eps)), dim=-1))
        x_MD += self.attention(x_MD, span, rows_PX)
        x_MD += fed_forward(self.feed_forward, unit_rms(x_MD, eps), [])
        return F.rms_norm(x_MD, (x_MD.shape[-1],), self.norm, eps)


class Decoder:
    """A model prepared for inference. Weights are read once: make a new decoder after an update.

    With `by_kernels`, steps of one token a row are one call of compiled code where the model, its dtype and its device
    suit it (`rows`), and else, and always without, of torch's own operators.
    """

    def __init__(self, model: Transformer, dtype: torch.dtype | None = None, by_kernels: bool = False) -> None:
        self.config = model.config
        self.dtype = dtype or model.embed_tokens.weight.dtype
        self.device = model.embed_tokens.weight.device
        self._embedding = model.embed_tokens.weight.detach().to(self.dtype)
        self._output = Matrix(model.lm_head.weight.detach().to(self.dtype))
        self._norm = model.norm.weight.detach().to(self.dtype)
        blocks = [block for block in model.layers if isinstance(block, Block)]
        self._layers = [(LatentAttention(b, self.dtype, self.config), self._feed_forward(b)) for b in blocks]
        modules = [module for module in model.mtp if isinstance(module, MultiTokenPrediction)]
        self._draft = _Draft(modules[0], self) if modules else None
        self._row_step = self._prepare_row_step(blocks) if by_kernels else None

    def computes_all_alike(self, num_rows: int) -> bool:
        """Whether a step of so many rows computes the same products whatever experts are chosen, or each row alone."""
        if self._row_step is not None:
            return True
        experts = [feed_forward for _, feed_forward in self._layers if isinstance(feed_forward, Experts)]
        return all(each.all is not None and num_rows <= each.all.most_tokens for each in experts)

    @property
    def can_draft(self) -> bool:
        """Whether the model has a module that predicts one token further."""
        return self._draft is not None

    def _prepare_row_step(self, blocks: list[Block]) -> RowStep | None:
        """None where products, and not calls, are what takes a step's time, and where nothing can be compiled."""
        num_weights = sum(parameter.numel() for block in blocks for parameter in block.parameters())
        is_small = self.config.num_attention_heads * self.config.latent_dim <= _SMALL_ATTENTION
        if self.device.type != "cpu" or self.dtype != torch.float32 or not is_small or num_weights > _SMALL_LAYERS:
            return None
        try:
            from crosschip.model.rows import RowStep  # numba, and the first time some 20 seconds of compiling
        except Exception as error:  # numba is missing, refuses this numpy or is switched off, or knows no such CPU
            logger.warning("decode steps are not compiled, and slower (%s: %s)", type(error).__name__, error)
            return None
        return RowStep(self._layers, self.config)

    def _feed_forward(self, block: Block) -> DenseMLP | Experts:
        norm = block.post_attention_layernorm.weight.detach().float()
        if isinstance(block.mlp, MixtureOfExperts):
            return Experts(block.mlp, norm, self.dtype, self.config)
        return DenseMLP.of(block.mlp, norm, self.dtype)

    def new_cache(
        self,
        num_slots: int,
        max_len: int,
        num_blocks: int | None = None,
        drafts: bool = False,
        record_routes: bool = False,
    ) -> LatentCache:
        """Memory for `num_slots` sequences of up to `max_len` tokens, each whole; or for `num_blocks` blocks of
        `BLOCK_TOKENS` tokens that they share (`LatentCache.set_blocks` says how). `draft` needs a layer more. With
        `record_routes`, `extend` keeps which experts each token took.
        """
        if max_len > self.config.max_position_embeddings:
            raise ModelError(
                f"a cache of {max_len} positions, but the model knows {self.config.max_position_embeddings}",
                "ask for shorter sequences",
            )
        width, layers = self.config.latent_dim, len(self._layers) + drafts
        # Padding may reach to the end of the last block.
        rope_P2r = rope_table(self.config, -(-max_len // BLOCK_TOKENS) * BLOCK_TOKENS, self.device)
        cache = LatentCache(layers, width, rope_P2r, num_slots, max_len, num_blocks, self.dtype, self.device)
        if record_routes:
            cache.routes = RouteRecord(self.config, cache.rows[0].shape[0], self.device)
        return cache

    @torch.inference_mode()
    def extend(self, tokens_BT: Tensor, start_B: Tensor, slots_B: Tensor, cache: LatentCache) -> Tensor:
        """Append T tokens to each row; states after the final norm, [B, T, D].

        Token t of row b takes position `start_B[b] + t` of slot `slots_B[b]` and sees positions 0 to its own. Rows may
        be padded on the right: the padding lies past the row's length and is overwritten later, or past its blocks and
        is lost. The three inputs are int64 on the CPU; slots are distinct.
        """
        x_MD = F.embedding(tokens_BT.to(self.device).flatten(), self._embedding)
        if self._row_step is not None and tokens_BT.shape[1] == 1:
            return self._row_step(x_MD, start_B, slots_B, cache).mul_(self._norm)[:, None]
        span = self._span(start_B, slots_B, tokens_BT.shape[1], cache)
        eps, chosen = self.config.rms_norm_eps, list[Tensor]()
        for (attention, feed_forward), rows in zip(self._layers, cache.rows, strict=False):
            x_MD += attention(x_MD, span, rows)
            x_MD += fed_forward(feed_forward, unit_rms(x_MD, eps), chosen)
        if cache.routes is not None:
            cache.routes.write(span.places.written_M, chosen)
        return F.rms_norm(x_MD, (x_MD.shape[-1],), self._norm, eps).view(*tokens_BT.shape, -1)

    @torch.inference_mode()
    def draft(self, next_BT: Tensor, state_BTD: Tensor, start_B: Tensor, slots_B: Tensor, cache: LatentCache) -> Tensor:
        """States one token further ahead, for `logits`, [B, T, D]: from what `extend` gave at these positions and the
        tokens that follow them. Arguments as for `extend`; the cache must be one for drafts, and is filled in order.
        """
        assert self._draft is not None
        span = self._span(start_B, slots_B, next_BT.shape[1], cache)
        next_MD = F.embedding(next_BT.to(self.device).flatten(), self._embedding)
        rows_PX, eps = cache.rows[len(self._layers)], self.config.rms_norm_eps
        return self._draft(next_MD, state_BTD.flatten(0, 1), span, rows_PX, eps).view(state_BTD.shape)

    def _span(self, start_B: Tensor, slots_B: Tensor, time: int, cache: LatentCache) -> Span:
        starts = start_B.tolist()
        num_cached = max(starts) + time
        assert num_cached <= cache.rope_P2r.shape[0], (num_cached, cache.max_len)
        host_positions_BT = start_B[:, None] if time == 1 else start_B[:, None] + torch.arange(time)
        positions_BT = host_positions_BT.to(self.device)
        rope_M2r = cache.rope_P2r[positions_BT.flatten()]
        long = self.device.type == "cpu" and num_cached >= _BY_ROW_FROM and len(starts) > 1
        by_row = time == 1 and (cache.by_row or long)
        mask = None
        if not by_row and (time > 1 or min(starts) != max(starts)):
            seen_BTS = torch.arange(num_cached, device=self.device) <= positions_BT[..., None]
            mask = torch.zeros(seen_BTS.shape, device=self.device).masked_fill_(~seen_BTS, -torch.inf)
        return Span(
            shape_BT=(len(starts), time),
            places=cache.places(slots_B.tolist(), host_positions_BT, num_cached, by_row),
            cos_M1r=rope_M2r[:, :1],
            sin_M1r=rope_M2r[:, 1:],
            fresh=max(starts) == 0 and time > 1,
            lengths_B=[start + 1 for start in starts] if by_row else None,
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
