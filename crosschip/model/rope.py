"""Rotary positions with YaRN scaling (arXiv 2309.00071), as the published DeepSeek-V3 weights expect them.

Shapes: T positions, R = qk_rope_head_dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from crosschip.model.config import ModelConfig

__all__ = ["attention_scale", "rope_table", "rotate"]


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def attention_scale(config: ModelConfig) -> float:
    """The factor on query-key products; YaRN with `mscale_all_dim` sharpens it."""
    scale = config.qk_head_dim**-0.5
    if config.rope_scaling and config.rope_scaling.get("mscale_all_dim"):
        scale *= _yarn_mscale(config.rope_scaling["factor"], config.rope_scaling["mscale_all_dim"]) ** 2
    return scale


def _inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Frequencies of the R/2 pairs in fp32, and the factor on cos and sin."""
    dim, base = config.qk_rope_head_dim, config.rope_theta
    frequencies = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    yarn = config.rope_scaling
    if yarn is None:
        return frequencies, 1.0
    factor, original = yarn["factor"], yarn["original_max_position_embeddings"]

    def correction_dim(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = correction_dim(yarn.get("beta_fast") or 32)
    high = correction_dim(yarn.get("beta_slow") or 1)
    if yarn.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    interpolated_share = ramp.clamp(0, 1)
    scaled = frequencies / factor * interpolated_share + frequencies * (1 - interpolated_share)
    return scaled, _yarn_magnitude(yarn, factor)


def _yarn_magnitude(yarn: dict[str, float], factor: float) -> float:
    if yarn.get("attention_factor") is not None:
        return float(yarn["attention_factor"])
    if yarn.get("mscale") and yarn.get("mscale_all_dim"):
        return _yarn_mscale(factor, yarn["mscale"]) / _yarn_mscale(factor, yarn["mscale_all_dim"])
    return _yarn_mscale(factor, 1.0)


def rope_table(config: ModelConfig, num_positions: int, device: torch.device | str = "cpu") -> Tensor:
    """cos and sin of every position: [num_positions, 2, R/2] in fp32, computed on the CPU."""
    frequencies, magnitude = _inverse_frequencies(config)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    return (torch.stack((angles.cos(), angles.sin()), dim=1) * magnitude).to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the pairs of the last dimension; cos and sin [..., R/2] broadcast against x [..., R].

    Computed in fp32 and returned in x's dtype. With `interleaved`, pairs are (0, 1), (2, 3), ... as in the published
    weights. The result is always laid out as halves: queries and keys alike, so their products do not change.
    """
    wide = x.float()
    if interleaved:
        first, second = wide.unflatten(-1, (-1, 2)).unbind(-1)
    else:
        first, second = wide.chunk(2, dim=-1)
    turned = torch.addcmul(first * cos, second, sin, value=-1.0), torch.addcmul(second * cos, first, sin)
    return torch.cat(turned, dim=-1).to(x.dtype)
