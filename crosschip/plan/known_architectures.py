"""Architectures of published models by name, and a likely shape where only a number of parameters is known."""

from __future__ import annotations

import functools
import itertools
import math
import re
import tomllib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from crosschip.plan.architecture import Architecture, Experts, GroupedQueryAttention, LatentAttention
from crosschip.plan.counts import active_parameters, num_parameters

__all__ = ["architecture_for", "known_architecture", "known_architectures", "likely_architecture"]

_TABLE = Path(__file__).parent / "data" / "architectures.toml"
_USUALLY_CHOSEN = 2  # experts of the few that a name like 8x7B tells
# Experts and how many of them are chosen, the usual ones first: Qwen3, Mixtral and Grok-1, Phi-3.5-MoE, DBRX,
# DeepSeek-V2-Lite, Qwen2-57B-A14B and Pangu Pro MoE, DeepSeek-V3, Qwen3-Next.
_USUAL_EXPERTS = ((128, 8), (8, 2), (16, 2), (16, 4), (64, 6), (64, 8), (256, 8), (512, 10))
# All experts of a layer together over the width of a state: Pangu Pro MoE has 17, Mixtral 28, Qwen3 48, GPT-OSS 128.
_EXPERTS_WIDTH, _USUAL_EXPERTS_WIDTH = (16, 130), 48
_ROUNDING = 0.05  # of both published sizes together, within which the more usual shape counts
_USUAL_ASPECT = 100  # width over depth
_SAME_MODEL = 0.08  # relative distance of parameter totals up to which a name is believed


def _attention(row: dict[str, Any]) -> GroupedQueryAttention | LatentAttention:
    if "latent" in row:
        heads, q_rank, kv_rank, nope, rope, value = row["latent"]
        return LatentAttention(heads, kv_rank, nope, rope, value, q_rank or None)
    heads, kv_heads, width = row["heads"]
    window, share = row.get("window", (None, 0.0))
    plain = row.get("plain", False)
    return GroupedQueryAttention(
        heads, kv_heads, width,
        bias=row.get("qkv_bias", plain), out_bias=row.get("out_bias", plain), qk_norm=row.get("qk_norm", False),
        window=window, window_share=share, num_sinks=row.get("sinks", 0),
    )  # fmt: skip


def _experts(row: dict[str, Any]) -> Experts | None:
    if "experts" not in row:
        return None
    num, per_token, inner = row["experts"]
    return Experts(
        num, per_token, inner, row.get("shared", 0), first_dense=row.get("first_dense", 0), every=row.get("every", 1),
        bias=row.get("expert_bias", False),
    )  # fmt: skip


def _architecture(row: dict[str, Any]) -> Architecture:
    plain = row.get("plain", False)
    return Architecture(
        name=row["name"],
        hidden_size=row["hidden"],
        num_layers=row["layers"],
        vocab_size=row["vocab"],
        attention=_attention(row),
        intermediate_size=row["ffn"],
        gated=row.get("gated", not plain),
        mlp_bias=row.get("mlp_bias", plain),
        experts=_experts(row),
        num_mtp=row.get("mtp", 0),
        tied=row.get("tied", False),
        norm_shift=row.get("norm_shift", plain),
        norms_per_layer=row.get("norms", 2),
        embedding_norm=row.get("embedding_norm", False),
        learned_positions=row.get("positions", 0),
        train_seq_len=row["seq_len"],
        train_batch=row.get("batch"),
        train_layout=row.get("layout", ""),
        interleaved=row.get("interleaved", True),
        train_fp8=row.get("fp8", False),
        zero_bubble=row.get("zero_bubble", False),
        fused_attention=row.get("fused", True),
        source=row["source"],
    )


@functools.cache
def known_architectures() -> tuple[tuple[tuple[str, ...], Architecture], ...]:
    """Every model of the table with the patterns of its names."""
    table = tomllib.loads(_TABLE.read_text(encoding="utf-8"))
    return tuple((tuple(row["matches"]), _architecture(row)) for row in table["model"])


def known_architecture(name: str) -> Architecture | None:
    """The published model of this name, the most specific pattern first; None if there is none."""
    wanted = re.sub(r"[\s_]+", " ", name.lower()).strip()
    wanted = re.sub(r"llama(\d)", r"llama \1", wanted)
    found = [
        (match.end() - match.start(), architecture)
        for patterns, architecture in known_architectures()
        for pattern in patterns
        if (match := re.search(pattern, wanted))
    ]
    return max(found, key=lambda each: each[0])[1] if found else None


def likely_architecture(
    name: str, total: float, active: float | None = None, num_experts: int | None = None, per_token: int | None = None
) -> Architecture:
    """A usual shape with about `total` parameters (`active` of them for one token), marked as assumed.

    Dense: width near 100 x depth, heads of 128, eight key heads, gated, a vocabulary of 128,000. With experts: of the
    usual numbers of them, chosen and shared, those that bring both sizes nearest, unless told; the rest as dense ones.
    """
    is_moe = active is not None and active < 0.95 * total
    told = _USUAL_EXPERTS if num_experts is None or per_token is None else ((num_experts, per_token),)
    shapes = _dense_shapes()
    if active is not None and is_moe:
        shapes = _moe_shapes(total, active, told) or shapes
    wanted = (total, active if active is not None and is_moe else total)

    def distance(shape: Architecture) -> float:
        return abs(num_parameters(shape) / wanted[0] - 1) + abs(active_parameters(shape) / wanted[1] - 1)

    def unlikeness(shape: Architecture) -> tuple[float, float]:
        if shape.experts is None:
            return distance(shape), 0.0
        aspect = shape.hidden_size / shape.num_layers / _USUAL_ASPECT
        width = shape.experts.num_experts * shape.experts.intermediate_size / shape.hidden_size / _USUAL_EXPERTS_WIDTH
        return max(_ROUNDING, distance(shape)), abs(math.log(aspect)) + abs(math.log(width))

    best = min(shapes, key=unlikeness)
    words = f"no published widths for {name!r}: a usual shape with {num_parameters(best) / 1e9:.4g} B parameters"
    if best.experts is not None:
        words += f", {active_parameters(best) / 1e9:.4g} B of them active, {best.experts.num_experts} experts"
    return replace(best, name=name, assumed=words, source="assumed")


@functools.cache
def _dense_shapes() -> tuple[Architecture, ...]:
    shapes = []
    for heads in range(4, 225, 4):
        hidden = 128 * heads
        for layers in range(max(4, hidden // 180), hidden // 70 + 2, 2):
            inner = round(8 / 3 * hidden / 256) * 256
            attention = GroupedQueryAttention(heads, min(8, heads), 128)
            shapes.append(Architecture("", hidden, layers, 128_000 if hidden > 1500 else 50_000, attention, inner))
    return tuple(shapes)


def _moe_shapes(total: float, active: float, usual: Iterable[tuple[int, int]]) -> tuple[Architecture, ...]:
    """For each width, depth and number of experts the experts as wide as the total wants them, and as many
    shared ones as the active parameters want. Tensor parallelism of 8 divides all heads."""
    shapes = []
    for heads, (num_experts, per_token) in itertools.product(range(8, 97, 8), usual):
        hidden = 128 * heads
        for layers in range(max(8, hidden // 160), hidden // 60 + 2, 2):
            each = (total - active) / ((num_experts - per_token) * 3 * hidden * (layers - 1))
            inner = max(64, round(each / 64) * 64)
            if not _EXPERTS_WIDTH[0] <= num_experts * inner / hidden <= _EXPERTS_WIDTH[1]:
                continue
            attention = GroupedQueryAttention(heads, min(8, heads), 128)
            experts = Experts(num_experts, per_token, inner, first_dense=1)
            shape = Architecture("", hidden, layers, 128_000, attention, 3 * hidden, experts=experts)
            missing = (active - active_parameters(shape)) / (3 * hidden * inner * (layers - 1))
            num_shared = min(per_token, max(0, round(missing)))
            shapes.append(replace(shape, experts=replace(experts, num_shared=num_shared)))
    return tuple(shapes)


def architecture_for(name: str, total: float | None = None, active: float | None = None) -> Architecture:
    """The published model of this name if its size agrees with `total`, else a likely shape, which says so."""
    known = known_architecture(name)
    if known is not None and (total is None or abs(num_parameters(known, False) / total - 1) <= _SAME_MODEL):
        return known
    assert total is not None, f"no published widths for {name!r} and no number of parameters"
    found = re.search(r"(\d+)\s*x\s*\d", name.lower())  # 8x7B: eight experts, two of them chosen as usual
    if found is None or int(found.group(1)) <= _USUALLY_CHOSEN:  # of two experts both would be chosen: no mixture
        return likely_architecture(name, total, active)
    return likely_architecture(name, total, active, int(found.group(1)), _USUALLY_CHOSEN)
