"""One new token for each of some rows, in fp32 on a CPU, all layers in one call of compiled code (`step`).

For models whose step takes the time of its calls (`Decoder` says which). What is computed is what `Decoder.extend`
computes, its sums in another order. M rows, D hidden size, H heads, N = qk_nope_head_dim, V = v_head_dim,
L = kv_lora_rank, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from crosschip.model.attention import LATENT_NORM_EPS
from crosschip.model.config import ModelConfig
from crosschip.model.feed_forward import DenseMLP, Experts
from crosschip.model.latent_attention import LatentAttention
from crosschip.model.latent_cache import BLOCK_TOKENS, LatentCache
from crosschip.model.rows.intrinsics import LANES
from crosschip.model.rows.numbers import CACHE_LINE, COUNTERS_A_LAYER, LAYER_TYPE, STEP_TYPE, Layer, Step
from crosschip.model.rows.step import take_step
from crosschip.model.rows.thread_team import barrier_address, call_together

__all__ = ["RowStep"]

Array = NDArray[Any]


class RowStep:
    """The layers of a decoder, prepared for steps of one token a row."""

    def __init__(self, layers: Sequence[tuple[LatentAttention, DenseMLP | Experts]], config: ModelConfig) -> None:
        self._config = config
        self._kept: list[Array] = []  # what the addresses of the layers are of
        packed = [Layer(**self._attention(attention), **self._networks(part)) for attention, part in layers]
        self._layers = np.array(packed, LAYER_TYPE)
        factors = (config.rms_norm_eps, LATENT_NORM_EPS, config.routed_scaling_factor)
        self._floats = np.array(factors, np.float32)
        self._sizes = self._sizes_of(layers[0][0])
        self._widths = self._widths_of(packed)

    def __call__(self, x_MD: Tensor, start_B: Tensor, slots_B: Tensor, cache: LatentCache) -> Tensor:
        """States before the final norm's weight, [M, D], from embeddings, which are overwritten."""
        num_rows, longest = len(x_MD), int(start_B.max()) + 1
        start_B, slots_B = start_B.contiguous(), slots_B.contiguous()
        if longest > cache.rope_P2r.shape[0]:  # the kernels look at no bounds
            raise IndexError(f"position {longest - 1} is beyond the {cache.rope_P2r.shape[0]} of the cache")
        heads = self._config.num_attention_heads
        everyone = np.arange(max(num_rows, heads))
        written = np.empty(num_rows, np.int64)
        counters = np.zeros(CACHE_LINE // 8 * (COUNTERS_A_LAYER * len(self._layers) + 1), np.int64)
        layers, ids = self._with_cache(cache, num_rows)
        memory, places = self._memory(num_rows)
        step = Step(
            **self._sizes,
            **places,
            num_rows=num_rows,
            longest=longest,
            table_width=cache.tables_SW.shape[1],
            layers_at=layers.ctypes.data,
            rope_at=cache.rope_P2r.data_ptr(),
            start_at=start_B.data_ptr(),
            slots_at=slots_B.data_ptr(),
            tables_at=cache.tables_SW.data_ptr(),
            written_at=written.ctypes.data,
            everyone_at=everyone.ctypes.data,
            x_at=x_MD.data_ptr(),
            counters_at=counters.ctypes.data,
            floats_at=self._floats.ctypes.data,
            barrier_at=barrier_address(),
        )
        numbers = np.array([step], STEP_TYPE)
        call_together(take_step.address, numbers.ctypes.data)
        if cache.routes is not None:
            cache.routes.write(torch.from_numpy(written), list(torch.from_numpy(ids)))
        return memory[: num_rows * x_MD.shape[1]].view(x_MD.shape)

    def _with_cache(self, cache: LatentCache, num_rows: int) -> tuple[Array, Array]:
        """The layers with their rows of this cache, and where the ids of chosen experts go, [layers, M, K]."""
        layers = self._layers.copy()
        mixtures = layers["experts"] > 0
        ids = np.empty((int(mixtures.sum()), num_rows, self._config.num_experts_per_tok), np.int64)
        layers["cache_at"] = [rows.data_ptr() for rows in cache.rows[: len(layers)]]
        layers["ids_at"][mixtures] = ids.ctypes.data + ids[:1].nbytes * np.arange(len(ids))
        return layers, ids

    def _memory(self, num_rows: int) -> tuple[Tensor, dict[str, int]]:
        """Room for what the parts of a step hand on; the normalised states come first."""
        memory = torch.empty(num_rows * sum(self._widths.values()), dtype=torch.float32, device="cpu")
        places, end = {}, 0
        for name, width in self._widths.items():
            places[name] = memory.data_ptr() + 4 * end
            end += num_rows * width
        memory[end - num_rows * self._widths["out_at"] :] = 0.0  # what comes last is added to the embeddings
        if not self._config.q_lora_rank:
            places["q_at"] = places["first_at"]
        return memory, places

    def _sizes_of(self, attention: LatentAttention) -> dict[str, int]:
        config, columns = self._config, attention.first.out_features
        first_width = _filled_up(columns)
        q_up = attention.q_up
        return {
            "num_layers": len(self._layers),
            "hidden": config.hidden_size,
            "heads": config.num_attention_heads,
            "plain": config.qk_nope_head_dim,
            "rotary": config.qk_rope_head_dim,
            "latent": config.kv_lora_rank,
            "low_rank": config.q_lora_rank or 0,
            "chosen": config.num_experts_per_tok,
            "groups": config.n_group,
            "chosen_groups": config.topk_group,
            "normalises": int(config.norm_topk_prob),
            "first_turning": attention.q_parts[0],
            "key_column": columns - config.latent_dim,
            "block": BLOCK_TOKENS,
            "first_width": first_width,
            "q_width": first_width if q_up is None else _filled_up(q_up.out_features),
            "query_width": _filled_up(config.latent_dim),
            "latent_width": _filled_up(config.kv_lora_rank),
            "values_width": _filled_up(config.v_head_dim),
            "hidden_width": _filled_up(config.hidden_size),
        }

    def _widths_of(self, layers: Sequence[Layer]) -> dict[str, int]:
        """Numbers a row of what the parts of a step hand on."""
        sizes, chosen = self._sizes, self._config.num_experts_per_tok
        return {
            "normed_at": sizes["hidden"],
            "first_at": sizes["first_width"],
            "low_at": sizes["low_rank"],
            "q_at": sizes["q_width"] if sizes["low_rank"] else 0,
            "query_at": sizes["heads"] * sizes["query_width"],
            "mixed_at": sizes["heads"] * sizes["latent_width"],
            "seen_at": sizes["heads"] * sizes["values_width"],
            "shared_at": max(layer.shared for layer in layers),
            "routed_at": chosen * max(layer.inner for layer in layers),
            "shares_at": chosen,
            "out_at": sizes["hidden_width"],
        }

    def _attention(self, attention: LatentAttention) -> dict[str, int]:
        config = self._config
        out, out_bias = attention.out.dense()
        by_head = out.unflatten(1, (config.num_attention_heads, -1))
        first, first_bias = attention.first.dense()
        return {
            "first_at": self._panels([first]),
            "first_bias_at": self._numbers(first_bias),
            "q_up_at": 0 if attention.q_up is None else self._panels([attention.q_up.dense()[0]]),
            "key_up_at": self._panels(list(attention.key_up_HNL.transpose(1, 2))),
            "value_up_at": self._panels(list(attention.value_up_HLV.transpose(1, 2))),
            "out_at": self._panels([_whole_rows(by_head).flatten(1)]),
            "out_bias_at": self._numbers(out_bias),
            "cache_at": 0,
        }

    def _networks(self, part: DenseMLP | Experts) -> dict[str, int]:
        """A dense network counts as a shared one without experts beside it."""
        experts = part.each if isinstance(part, Experts) else []
        shared = part.shared if isinstance(part, Experts) else part
        found = {
            "experts": len(experts),
            "ids_at": 0,
            "inner": _filled_up(experts[0].down.in_features) if experts else 0,
            "shared": 0 if shared is None else _filled_up(shared.down.in_features),
            "shared_gate_up_at": 0 if shared is None else self._panels(_gate_and_up(shared)),
            "shared_down_at": 0 if shared is None else self._panels([_down(shared)]),
            "gate_up_at": self._panels([weight for expert in experts for weight in _gate_and_up(expert)]),
            "down_at": self._panels([_down(expert) for expert in experts]),
        }
        router = part.router_weight if isinstance(part, Experts) else None
        bias = part.router.e_score_correction_bias.detach() if isinstance(part, Experts) else None
        return {**found, "router_at": self._numbers(router), "router_bias_at": self._numbers(bias)}

    def _panels(self, weights: Sequence[Tensor]) -> int:
        """The address of matrices [out, in], all alike, in panels of `LANES` outputs."""
        if not weights:
            return 0
        by_input = _whole_rows(torch.stack(list(weights)).transpose(1, 2))
        return self._numbers(by_input.unflatten(2, (-1, LANES)).transpose(1, 2))

    def _numbers(self, values: Tensor | None) -> int:
        """The address of a copy, filled up to whole vectors."""
        if values is None:
            return 0
        kept = np.zeros(_filled_up(values.numel()), np.float32)
        kept[: values.numel()] = values.contiguous().flatten().numpy()
        self._kept.append(kept)
        return int(kept.ctypes.data)


def _filled_up(size: int) -> int:
    return -(-size // LANES) * LANES


def _gate_and_up(network: DenseMLP) -> tuple[Tensor, Tensor]:
    gate, up = network.gate_up.dense()[0].chunk(2)
    return gate, up


def _down(network: DenseMLP) -> Tensor:
    """With as many inputs as the inner numbers are filled up to."""
    return _whole_rows(network.down.dense()[0])


def _whole_rows(weight: Tensor) -> Tensor:
    """With zeros at the end of each row, to whole vectors."""
    return F.pad(weight, (0, _filled_up(weight.shape[-1]) - weight.shape[-1]))
