"""One new token for each of some rows, in fp32 on a CPU: products by torch, all between them by `row_kernels`.

For models whose step takes the time of its calls (`Decoder` says which). What is computed is what `Decoder.extend`
computes, its sums in another order. M rows, D hidden size, H heads, V = v_head_dim, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crosschip.model import row_kernels
from crosschip.model.attention import LATENT_NORM_EPS
from crosschip.model.config import ModelConfig
from crosschip.model.feed_forward import AllExperts, DenseMLP, Experts
from crosschip.model.latent_attention import LatentAttention, Span
from crosschip.model.latent_cache import BLOCK_TOKENS, LatentCache
from crosschip.model.matrix import Matrix

__all__ = ["RowStep"]

Array = NDArray[Any]

# Multiplications of one layer's attention, on one core: beyond it products on all cores are faster.
_MOST_WORK = 2e6
# Rows whose products are computed on one core, each by itself: calling a library takes longer than reading weights that
# fit into the cache. They are kept a second time for that.
_FEW_ROWS = 4
# As many times more rows than by operators are computed by all experts: between the products nearly nothing is left.
# (8 experts of 128 x 96: a step of 64 rows takes 19 ms against 29 with sorted rows, one of 256 rows 52 against 57.)
_MORE_ROWS = 5


class RowStep:
    """The layers of a decoder, prepared for steps of one token a row."""

    def __init__(self, layers: Sequence[tuple[LatentAttention, DenseMLP | Experts]], config: ModelConfig) -> None:
        self._config = config
        self._layers = [(_Attention(attention, config), _FeedForward(part)) for attention, part in layers]

    def attends(self, start_B: Tensor, cache: LatentCache) -> bool:
        """Whether rows of these lengths are attended faster by a kernel than by products on all cores; or must be all
        the same, since how a row is computed may not depend on the others."""
        work = int(start_B.sum()) * self._config.num_attention_heads * self._config.latent_dim * 2
        return cache.by_row or work <= _MOST_WORK

    def __call__(self, x_MD: Tensor, start_B: Tensor, slots_B: Tensor, cache: LatentCache, span: Span | None) -> Tensor:
        """States before the final norm's weight, [M, D], from embeddings, which are overwritten. `span` is for
        attention by products; None: by a kernel."""
        assert int(start_B.max()) < cache.rope_P2r.shape[0], (start_B, cache.max_len)  # the kernels look at no bounds
        x, eps = x_MD.numpy(), self._config.rms_norm_eps
        rows = _Rows(start_B.numpy(), slots_B.numpy(), cache, span)
        normed = np.empty_like(x)
        chosen: list[Tensor] = []
        row_kernels.normalise(x, eps, normed)
        for (attention, feed_forward), rows_PX in zip(self._layers, cache.rows, strict=False):
            row_kernels.add_and_normalise(x, attention(normed, rows, rows_PX), eps, normed)
            row_kernels.add_and_normalise(x, feed_forward(normed, chosen), eps, normed)
        if cache.routes is not None:
            cache.routes.write(torch.from_numpy(rows.written), chosen)
        return torch.from_numpy(normed)


class _Rows:
    """Where the new tokens of one call go: the same for every layer."""

    def __init__(self, start: Array, slots: Array, cache: LatentCache, span: Span | None) -> None:
        self.start, self.slots, self.span = start, slots, span
        self.rope, self.tables = cache.rope_P2r.numpy(), cache.tables_SW.numpy()
        self.written = np.empty(len(start), np.int64)


class _Product:
    """A matrix; of few rows on one core, with a copy of its weight as it lies."""

    def __init__(self, matrix: Matrix) -> None:
        weight, bias = matrix.dense()
        self._matrix, self._weight = matrix, weight.numpy()
        self._bias = np.empty(0, np.float32) if bias is None else bias.numpy()

    def __call__(self, x: Array) -> Array:
        if len(x) > _FEW_ROWS:
            by_torch: Array = self._matrix(torch.from_numpy(x)).numpy()
            return by_torch
        out = np.empty((len(x), len(self._weight)), np.float32)
        row_kernels.multiply(x, self._weight, self._bias, out)
        return out


class _Attention:
    def __init__(self, attention: LatentAttention, config: ModelConfig) -> None:
        self._first, self._out = _Product(attention.first), _Product(attention.out)
        self._q_up = None if attention.q_up is None else _Product(attention.q_up)
        self._key_up = attention.key_up_HNL.contiguous().numpy()
        self._value_up = attention.value_up_HLV.transpose(1, 2).contiguous().numpy()
        self._attention, self._shape = attention, (config.qk_nope_head_dim, config.qk_rope_head_dim)
        self._heads, self._first_turning = config.num_attention_heads, attention.q_parts[0]
        self._low_rank = config.q_lora_rank or 0

    def __call__(self, normed: Array, rows: _Rows, rows_PX: Tensor) -> Array:
        kv = q = self._first(normed)
        if self._q_up is not None:
            low = np.empty((len(kv), self._low_rank), np.float32)
            row_kernels.normalise(kv[:, : self._low_rank], LATENT_NORM_EPS, low)
            q = self._q_up(low)
        cache, where = rows_PX.numpy(), (rows.start, rows.slots, rows.tables, BLOCK_TOKENS)
        row_kernels.keep_and_turn(
            q, self._heads, self._first_turning, kv, rows.rope, *where, LATENT_NORM_EPS, cache, rows.written
        )
        if rows.span is not None:
            return self._out(self._by_products(torch.from_numpy(q), rows_PX, rows.span))
        mixed = np.empty((len(q), self._heads * self._value_up.shape[1]), np.float32)
        row_kernels.attend(q, self._first_turning, self._key_up, self._value_up, cache, *where, mixed)
        return self._out(mixed)

    def _by_products(self, q: Tensor, rows_PX: Tensor, span: Span) -> Array:
        plain, turned = q[:, : self._first_turning], q[:, self._first_turning :]
        q_MHN = plain.view(len(q), -1, self._shape[0])
        q_MHR = turned[:, : self._heads * self._shape[1]].view(len(q), -1, self._shape[1])
        mixed: Array = self._attention.absorbed(q_MHN, q_MHR, rows_PX, span).reshape(len(q), -1).numpy()
        return mixed


class _FeedForward:
    """A dense network, or experts: as one wide network while few rows make that the faster way."""

    def __init__(self, part: DenseMLP | Experts) -> None:
        self._experts = part if isinstance(part, Experts) else None
        wide = self._wide = part if isinstance(part, DenseMLP) else part.all
        self._expert_size, self._most_rows = 0, 0
        if self._experts is not None and isinstance(wide, AllExperts):
            config, bias = self._experts.config, self._experts.router.e_score_correction_bias
            self._router = self._experts.router_weight.numpy(), bias.detach().numpy()
            self._settings = config.norm_topk_prob, config.routed_scaling_factor
            self._num_chosen = config.num_experts_per_tok
            self._expert_size = wide.num_routed_columns // len(bias)
            self._most_rows = _MORE_ROWS * wide.most_tokens if config.n_group == 1 else 0
        if wide is not None:
            self._dense = wide.gate_up.dense()[0].numpy(), wide.down.dense()[0].t().contiguous().numpy()

    def __call__(self, normed: Array, chosen: list[Tensor]) -> Array:
        if self._experts is not None and len(normed) > self._most_rows:
            by_torch: Array = self._experts(torch.from_numpy(normed), chosen).numpy()
            return by_torch
        assert self._wide is not None
        share = self._share(normed, chosen)
        if len(normed) <= _FEW_ROWS:
            out = np.empty_like(normed)
            row_kernels.feed_forward(normed, *self._dense, share, self._expert_size, out)
            return out
        gate_up = self._wide.gate_up(torch.from_numpy(normed)).numpy()
        active = np.empty((len(normed), gate_up.shape[1] // 2), np.float32)
        row_kernels.gate(gate_up, share, self._expert_size, active)
        wide_out: Array = self._wide.down(torch.from_numpy(active)).numpy()
        return wide_out

    def _share(self, normed: Array, chosen: list[Tensor]) -> Array:
        """Of each expert in each row, [M, E]; of a dense network [M, 0]."""
        if self._experts is None:
            return np.empty((len(normed), 0), np.float32)
        weight, bias = self._router
        ids = np.empty((len(normed), self._num_chosen), np.int64)
        share = np.empty((len(normed), len(bias)), np.float32)
        row_kernels.choose_experts(normed, weight, bias, *self._settings, ids, share)
        chosen.append(torch.from_numpy(ids))
        return share
