"""The work of one layer on one chip, operator by operator, and how long each takes on a roofline.

A product of m x k by k x n runs at the chip's product rate on its dimensions filled up to tiles, and its result is
written when it is done; it never takes less than its operands take to be read. Element-wise work is the bytes it
passes. A backward pass has two products for each of the forward pass. t tokens, T the tensor-parallel width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from crosschip.plan.architecture import Architecture, LatentAttention
from crosschip.plan.counts import attended_tokens
from crosschip.plan.hardware import Hardware

__all__ = ["LayerTime", "Shape", "Work", "head_time", "layer_time", "layer_work", "work_s"]

# Fused attention reaches these shares of the product rate, forward and backward: assumed from the published rates of
# FlashAttention-2 (arXiv 2307.08691: 230 and 190 of about 270 TFLOP/s on A100).
FUSED_FORWARD, FUSED_BACKWARD = 0.75, 0.65
FP8_SHARE = 0.9  # of the bf16 share of the datasheet that fp8 products reach, assumed
# Scales of the present values, as trainers in fp8 take them: each operand is read for its largest value and once more
# for the cast (two bytes each), and written (one). Hopper's fp8 products want both operands along the summed dimension,
# so the backward pass copies what it has turned (one byte read, one written). From the notes of torchao.float8 on
# dynamic and of TransformerEngine on current scaling.
_FP8_CAST_BYTES, _FP8_TURN_BYTES = 5.0, 2.0
_FUSED_BACKWARD_PRODUCTS = 2.5  # scores are computed again
_STREAM_BACKWARD = 1.5  # inputs and gradients are read, gradients written


@dataclass(frozen=True)
class Shape:
    """What of a layout decides the time of a layer: tokens of a micro-batch on one chip, and how widths are cut."""

    tokens: float
    seq_len: int
    tensor: int = 1
    expert: int = 1  # chips that the experts lie on
    sequence_parallel: bool = True
    fused_attention: bool = True
    fp8: bool = False
    imbalance: float = 1.0  # rows of the fullest chip over the mean
    stream_factor: float = 1.0  # bytes that element-wise work passes over those of fused operators


@dataclass(frozen=True)
class Work:
    """One operator: `count` products of m x k by k x n, or `stream_bytes`, or `flops` of fused attention."""

    name: str
    m: float = 0.0
    n: float = 0.0
    k: float = 0.0
    count: float = 1.0
    stream_bytes: float = 0.0
    fused_flops: float = 0.0
    launches: float = 1.0
    linear: bool = True  # may run in fp8, and is one of those that `alternate` recomputes
    core: bool = False  # what `selective` recomputes: scores that were written out, else what is cheap to make again


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer for a micro-batch; `core` and `linear` are parts of `forward` that can be recomputed."""

    forward: float
    backward: float
    core: float
    linear: float
    shared: float  # shared experts, both ways: they can run while tokens travel


def layer_work(architecture: Architecture, is_moe: bool, shape: Shape) -> Iterator[Work]:
    """Forward operators of one layer."""
    t, hidden, parts = shape.tokens, architecture.hidden_size, shape.tensor
    rows = t / (parts if shape.sequence_parallel else 1)
    # Per norm: read and write; per residual sum: two reads and one write; bf16.
    passes = 2 * architecture.norms_per_layer + 3 * 2
    yield Work("norms and residual sums", stream_bytes=passes * rows * hidden * 2, core=shape.fused_attention)
    yield from _attention_work(architecture, shape)
    if is_moe:
        yield from _expert_work(architecture, shape)
    else:
        yield from _feed_forward_work(
            "feed-forward", architecture, t, architecture.intermediate_size / parts, 1, shape.fused_attention
        )


def _feed_forward_work(
    name: str, architecture: Architecture, m: float, inner: float, count: float, cheap: bool
) -> Iterator[Work]:
    into = 2 if architecture.gated else 1
    yield Work(f"{name} in", m, into * inner, architecture.hidden_size, count, launches=count)
    yield Work(f"{name} activation", stream_bytes=(into + 1) * m * count * inner * 2, core=cheap)
    yield Work(f"{name} out", m, architecture.hidden_size, inner, count, launches=count)


def _expert_work(architecture: Architecture, shape: Shape) -> Iterator[Work]:
    experts = architecture.experts
    assert experts is not None
    t, hidden = shape.tokens, architecture.hidden_size
    yield Work("router", t, experts.num_experts, hidden, linear=False)
    # Each chip of a tensor-parallel group takes its part of the tokens to whole experts.
    rows = t / shape.tensor * experts.per_token * shape.imbalance
    # Sorting by expert and back copies each row; with experts elsewhere once more on arrival and before departure.
    copies = 4 + (4 if shape.expert > 1 else 0)
    yield Work("dispatch and combine", stream_bytes=copies * rows * hidden * 2)
    local = max(1.0, experts.num_experts / shape.expert)
    inner = float(experts.intermediate_size)
    yield from _feed_forward_work("experts", architecture, rows / local, inner, local, shape.fused_attention)
    if experts.num_shared:
        width = experts.shared_width / shape.tensor
        yield from _feed_forward_work("shared experts", architecture, t, width, 1, shape.fused_attention)


def _attention_work(architecture: Architecture, shape: Shape) -> Iterator[Work]:
    attention, hidden, t = architecture.attention, architecture.hidden_size, shape.tokens
    heads = attention.num_heads / shape.tensor
    if isinstance(attention, LatentAttention):
        rank = attention.q_lora_rank
        if rank is not None:
            yield Work("query down", t, rank, hidden)
        yield Work("query up", t, heads * attention.qk_head_dim, rank or hidden, core=shape.fused_attention)
        yield Work("latent down", t, attention.cached_width, hidden)
        up = attention.qk_nope_head_dim + attention.v_head_dim
        yield Work("latent up", t, heads * up, attention.kv_lora_rank, core=shape.fused_attention)
        # Rotation, and the join of both parts of queries and keys: each read and written.
        yield Work("rotation", stream_bytes=4 * t * heads * attention.qk_head_dim * 2, core=shape.fused_attention)
    else:
        kv_heads = max(1.0, attention.num_kv_heads / shape.tensor)
        yield Work("queries, keys, values", t, (heads + 2 * kv_heads) * attention.head_dim, hidden)
        if not architecture.learned_positions:
            yield Work("rotation", stream_bytes=2 * t * (heads + kv_heads) * attention.head_dim * 2)
    widths = attention.qk_head_dim + attention.v_head_dim
    if shape.fused_attention:
        flops = 2 * t * heads * widths * attended_tokens(architecture, shape.seq_len)
        yield Work("attention", fused_flops=flops, linear=False)
    else:
        seq, squares = shape.seq_len, heads * t / shape.seq_len
        yield Work("scores", seq, seq, attention.qk_head_dim, squares, linear=False, core=True)
        # Softmax and dropout: each reads and writes the scores, and dropout its mask of a byte.
        yield Work("softmax", stream_bytes=9 * squares * seq * seq, linear=False, core=True)
        yield Work("values", seq, attention.v_head_dim, seq, squares, linear=False, core=True)
    yield Work("attention out", t, hidden, heads * attention.v_head_dim)


def _filled(size: float, tile: int) -> float:
    return math.ceil(size / tile) * tile if size > tile / 2 else size


def _product_s(m: float, n: float, k: float, count: float, hardware: Hardware, rate: float) -> float:
    """A product in bf16: fp8 differs by its rate and by the cast that is counted apart."""
    tile, bandwidth = hardware.tile, hardware.memory_bytes_s * hardware.memory_share
    compute = 2.0 * _filled(m, tile) * _filled(n, tile) * k / rate
    written = 2.0 * m * n / bandwidth
    read = 2.0 * (m * k + k * n) / bandwidth
    return count * max(compute + written, read + written)


def work_s(work: Work, hardware: Hardware, fp8: bool = False) -> tuple[float, float]:
    """Seconds of an operator forward and backward; never less than the host takes to issue it."""
    forward, backward = _chip_s(work, hardware, fp8)
    issued_s = work.launches * hardware.call_s
    return max(forward, issued_s), max(backward, issued_s * (2 if work.m else 1))


def _chip_s(work: Work, hardware: Hardware, fp8: bool) -> tuple[float, float]:
    bandwidth = hardware.memory_bytes_s * hardware.memory_share
    rate = hardware.bf16_flops * hardware.efficiency
    if work.fused_flops:
        backward = _FUSED_BACKWARD_PRODUCTS * work.fused_flops / (rate * FUSED_BACKWARD)
        return work.fused_flops / (rate * FUSED_FORWARD) + hardware.launch_s, backward + hardware.launch_s
    if work.stream_bytes:
        forward = work.stream_bytes / bandwidth
        return forward + hardware.launch_s, _STREAM_BACKWARD * forward + hardware.launch_s
    m, n, k, count = work.m, work.n, work.k, work.count
    cast, turn, launch_s = 0.0, 0.0, work.launches * hardware.launch_s
    if fp8 and work.linear and hardware.fp8_flops is not None:
        rate = hardware.fp8_flops * hardware.efficiency * FP8_SHARE
        cast, turn = (each * count / bandwidth for each in (_FP8_CAST_BYTES, _FP8_TURN_BYTES))
    forward = _product_s(m, n, k, count, hardware, rate) + cast * (m * k + n * k) + launch_s
    backward = _product_s(m, k, n, count, hardware, rate) + _product_s(k, n, m, count, hardware, rate)
    return forward, backward + cast * m * n + turn * (m * k + m * n + n * k) + 2 * launch_s


def layer_time(architecture: Architecture, is_moe: bool, shape: Shape, hardware: Hardware) -> LayerTime:
    """One layer without its collectives."""
    forward = backward = core = linear = shared = 0.0
    for work in layer_work(architecture, is_moe, shape):
        if work.stream_bytes and shape.stream_factor != 1.0:
            work = replace(work, stream_bytes=work.stream_bytes * shape.stream_factor)
        ahead, back = work_s(work, hardware, shape.fp8)
        forward, backward = forward + ahead, backward + back
        core += ahead if work.core else 0.0
        linear += ahead if work.linear and not work.stream_bytes else 0.0
        shared += ahead + back if work.name.startswith("shared") else 0.0
    return LayerTime(forward, backward, core, linear, shared)


def head_time(architecture: Architecture, shape: Shape, hardware: Hardware) -> float:
    """Output matrix and loss of a micro-batch, forward and backward, in bf16."""
    columns = architecture.vocab_size / shape.tensor
    ahead, back = work_s(Work("output", shape.tokens, columns, architecture.hidden_size, linear=False), hardware)
    # Logits in fp32: written, and read for the loss and its gradient.
    stream = shape.stream_factor * 5 * 4 * shape.tokens * columns / (hardware.memory_bytes_s * hardware.memory_share)
    return ahead + back + stream
